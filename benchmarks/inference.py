"""What asking a trained model takes: python -m benchmarks.inference RUN_DIR"""

import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module

import numpy as np

TEXT = "what a wonderful film i would see it again and again if only there were more of them to see"
CALLS = {
    "predict 1 text": ("predict", [TEXT]),
    "predict 8": ("predict", [TEXT] * 8),
    "predict 1,024": ("predict", [TEXT] * 1024),
    "explain": ("explain", TEXT),
}


def median(call: Callable[[], object]) -> float:
    """Milliseconds, of calls of half a second at least; not the first ones."""
    for _ in range(3):
        call()
    seconds: list[float] = []
    while sum(seconds) < 0.5 or len(seconds) < 10:
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds)) * 1000


def main() -> None:
    print("| ms |", " | ".join(CALLS), "|")
    print("|---|" + "---|" * len(CALLS))
    for name in ("torch_impl", "jax_impl"):
        model = import_module(name).load(sys.argv[1])
        times = [median(partial(getattr(model, what), of)) for what, of in CALLS.values()]
        print(f"| {name} |", " | ".join(f"{each:.2f}" for each in times), "|", flush=True)


if __name__ == "__main__":
    main()
