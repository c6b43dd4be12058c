"""`python compare.py speed`: tokens a second of every GRU that runs here, measured in one run.

The frameworks live in processes of their own (see comparison.contenders), which take turns, so that
a busy moment of the machine falls on all of them alike. Every figure is the median of repetitions,
beside it the spread between the first and the third quartile.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context

import numpy as np
from msgspec.structs import asdict

from common.report.schema import REFERENCE, Length, Recipe, Speed, Task, Timed
from comparison import contenders
from comparison.contenders import PROCESSES, batch_of

REPETITIONS = 5
SHORT = (
    Task(64, 200, 128),
    Task(64, 200, 128, backward=False),
    Task(64, 200, 128, bidirectional=True),
    Task(256, 50, 256),
)
FULL = tuple(
    Task(B, T, H, bidirectional, backward)
    for B, T, H in product((1, 16, 64, 256), (50, 200, 1000), (64, 128, 256, 512))
    for bidirectional, backward in product((False, True), repeat=2)
)
# Does a word cost the kernel the same in long reviews? With next to no input product, of which
# there is less for each word, the longer the reviews are.
LENGTHS = tuple(Task(64, T, 128, input_size=1) for T in (50, 200, 1000, 2000))
# The homework: batch 1, H 128, Adam, 4 epochs of 14,227 reviews.
RECIPE = Task(1, 200, 128, training=True)
RECIPE_STEPS = 4 * 14_227


def measure(tasks: Iterable[Task], report: Callable[[str], object]) -> Speed:
    """Time all contenders on all tasks and on the homework's recipe.

    report is told, in a line of text, what is being measured.
    """
    with ExitStack() as stack:
        pools = {
            name: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
            for name in PROCESSES
            if find_spec(name.partition("-")[0])
        }
        there = {name: pool.submit(contenders.start, name) for name, pool in pools.items()}
        owners = {name: pools[each] for each, found in there.items() for name in found.result()}
        # The faster one: PyTorch's product, MKL's, takes twice as long as XLA's on AMD.
        peaks = [
            [pools[name].submit(contenders.peak, name).result() for name in ("torch", "jax")]
            for _ in range(REPETITIONS)
        ]
        peak = float(np.median(peaks, axis=0).max())
        rows = []
        for task in tasks:
            report(f"measuring {task.name}")
            # The loop takes seconds: only where it is a matter of a few.
            names = [n for n in owners if n != "torch loop" or task.B * task.T <= 64 * 200]
            rows += _rows(task, _time(owners, names, task), peak)
        report("measuring the cost of a token in short and in long reviews")
        fused = [name for name in owners if name.endswith(" fused")]
        lengths = [
            Length(name, task.T, 1e9 * float(np.median(seconds)) / batch_of(task.B, task.T).words)
            for task in LENGTHS
            for name, seconds in _time(owners, fused, task).items()
        ]
        report("measuring the homework's recipe")
        ours = [n for n in owners if n in (REFERENCE, "torch loop", "torch fused", "jax fused")]
        recipe = [
            Recipe(name, float(1 / np.median(seconds)), float(np.median(seconds) * RECIPE_STEPS))
            for name, seconds in _time(owners, ours, RECIPE).items()
        ]
    return Speed(rows, lengths, recipe, peak)


def _time(
    owners: dict[str, ProcessPoolExecutor], names: Iterable[str], task: Task
) -> dict[str, list[float]]:
    """Seconds of each contender, REPETITIONS of them, interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(REPETITIONS):
        for name, found in seconds.items():
            found.append(owners[name].submit(contenders.seconds, name, task).result())
    for pool in set(owners.values()):
        pool.submit(contenders.ready.cache_clear).result()
    return seconds


def _rows(task: Task, seconds: dict[str, list[float]], peak: float) -> list[Timed]:
    batch = batch_of(task.B, task.T)
    flops = _flops(task, batch.words, len(batch.distinct))
    reference = float(np.median(seconds[REFERENCE]))
    rows = []
    for name, found in seconds.items():
        slow, median, fast = np.quantile(found, [0.75, 0.5, 0.25]).tolist()
        speeds = {
            "tokens_per_second": batch.words / median,
            "quartiles": (batch.words / slow, batch.words / fast),
            "ratio": reference / median,
            "peak_fraction": flops / median / peak,
        }
        rows.append(Timed(**asdict(task), contender=name, **speeds))
    return rows


def _flops(task: Task, words: int, distinct: int) -> float:
    """Operations in the matrix products that the task cannot do without.

    Forward: the recurrent product of every word and the input product of every distinct one.
    Backward: twice the former, for states and weights, and once the latter, for weights.
    """
    recurrent = 2 * words * 3 * task.H * task.H
    inputs = 2 * distinct * 3 * task.H * task.input_size
    directions = 1 + task.bidirectional
    return directions * (recurrent * (3 if task.backward else 1) + inputs * (1 + task.backward))
