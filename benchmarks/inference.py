"""The latency of a trained model in both frameworks, in milliseconds."""

from functools import partial
from importlib import import_module
from pathlib import Path

from tyro.conf import Positional

from benchmarks.timing import median_seconds
from tools.program import print_header, print_row, run_program

TEXT = "what a wonderful film i would see it again and again if only there were more of them to see"
CALLS = {
    "predict 1 text": ("predict", [TEXT]),
    "predict 8": ("predict", [TEXT] * 8),
    "predict 1,024": ("predict", [TEXT] * 1024),
    "explain": ("explain", TEXT),
}


def main(run_dir: Positional[Path]) -> None:
    print_header("ms", *CALLS)
    for framework in ("torch_impl", "jax_impl"):
        model = import_module(framework).load(run_dir)
        # Calls do not alternate: the threads of one call would still spin during the next one.
        calls = [partial(getattr(model, method), argument) for method, argument in CALLS.values()]
        print_row(framework, *(f"{median_seconds({'': each}, 50)[''] * 1e3:.2f}" for each in calls))


if __name__ == "__main__":
    run_program(main)
