"""How much of the parity checks' float32 bounds do errors take, over many draws?

python -m tools.float32_bounds 40 resets        so many times parity.DRAWS draws of these sizes

For each size and implementation this prints the number of tensors that were checked, how many of
them were beyond their bound, the median and the largest share of its bound that an error took, and
the errors themselves in units in the last place: median, 99th percentile and largest.
docs/parity.md argues the bounds.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from comparison import parity
from comparison.implementations import Case


def groups(size: parity.Size, reset_after: bool, count: int) -> Iterator[tuple[Case, ...]]:
    """What the checks draw once, with further seeds."""
    for start in range(0, count * parity.DRAWS, parity.DRAWS):
        seeds = range(start, start + parity.DRAWS)
        yield tuple(parity.draw(size, reset_after, seed) for seed in seeds)


@parity.one_thread()
def main(count: int, names: list[str]) -> None:
    """Check so many groups of draws of the sizes of these names."""
    # XLA compiles anew for each implementation that is made.
    implementations = (*parity.implementations(), parity.SIMPLE_CELL)
    sizes = [size for size in (*parity.SIZES, *parity.RESETS) if size.name in names]
    cells = [(size, after) for size in sizes for after in (False, True)]
    cells += [(replace(size, cell="rnn"), False) for size in sizes]
    for size, reset_after in cells:
        kind = "no reset" if size.cell == "rnn" else f"reset {'after' if reset_after else 'before'}"
        print(f"{size.cell}, {size.name}, {kind}", flush=True)
        rows: dict[str, list[tuple[float, float, str]]] = {}
        for draws in groups(size, reset_after, count):
            for each in implementations:
                if each.can(draws[0], "float32"):
                    checks = parity.check(each, draws, np.float32)
                    rows.setdefault(each.name, []).extend(
                        (check.strain, check.ulp, check.check) for check in checks
                    )
        for name, found in rows.items():
            strains, ulps, _ = zip(*found, strict=True)
            share, _, tensor = max(found)
            failed = sum(strain > 1 for strain in strains)
            errors = " ".join(f"{each:5.1f}" for each in np.quantile(ulps, (0.5, 0.99, 1)))
            print(
                f"  {name:22} {len(found):6} {failed:3}   {np.median(strains):.2f} {share:.2f} "
                f"{tensor:28} {errors}",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
