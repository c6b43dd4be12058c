"""Measures the errors of the parity checks relative to their float32 bounds, over many draws.

Prints for each size and implementation the number of checked tensors, the number of tensors beyond
their bound, the median and the largest ratio of an error to its bound, the tensor with the largest
ratio, and the errors in units in the last place: median, 99th percentile and maximum.
docs/parity.md derives the bounds.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from tyro.conf import Positional

from comparison import parity
from comparison.implementations import Case
from tools.program import run_program


def groups(size: parity.Size, reset_after: bool, count: int) -> Iterator[tuple[Case, ...]]:
    """The draws of a check, repeated with other seeds."""
    for start in range(0, count * parity.DRAWS, parity.DRAWS):
        seeds = range(start, start + parity.DRAWS)
        yield tuple(parity.draw(size, reset_after, seed) for seed in seeds)


@parity.one_thread()
def main(count: Positional[int], names: Positional[list[str]]) -> None:
    """Check and print.

    Args:
        count: The number of groups of parity.DRAWS draws each.
        names: The sizes to check, by name.
    """
    # Created once, because XLA compiles for each new implementation.
    implementations = (*parity.implementations(), parity.SIMPLE_CELL)
    sizes = [size for size in (*parity.SIZES, *parity.RESETS) if size.name in names]
    cases = [(size, after) for size in sizes for after in (False, True)]
    cases += [(replace(size, cell="rnn"), False) for size in sizes]
    for size, reset_after in cases:
        kind = "no reset" if size.cell == "rnn" else f"reset {'after' if reset_after else 'before'}"
        print(f"{size.cell}, {size.name}, {kind}", flush=True)
        rows: dict[str, list[tuple[float, float, str]]] = {}
        for draws in groups(size, reset_after, count):
            for each in implementations:
                if each.can(draws[0], "float32"):
                    rows.setdefault(each.name, []).extend(
                        (check.strain, check.ulp, check.check)
                        for check in parity.check(each, draws, np.float32)
                    )
        for name, checks in rows.items():
            strains, ulps, _ = zip(*checks, strict=True)
            share, _, tensor = max(checks)
            failed = sum(strain > 1 for strain in strains)
            errors = " ".join(f"{each:5.1f}" for each in np.quantile(ulps, (0.5, 0.99, 1)))
            print(
                f"  {name:22} {len(checks):6} {failed:3}   {np.median(strains):.2f} {share:.2f} "
                f"{tensor:28} {errors}",
                flush=True,
            )


if __name__ == "__main__":
    run_program(main)
