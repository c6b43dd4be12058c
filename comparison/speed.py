"""`python compare.py speed`: every GRU that runs here, training and inference, measured in one run.

The frameworks live in processes of their own (see comparison.contenders), which take turns, so that
a busy moment of the machine falls on all of them alike. Every figure is the median of repetitions,
beside it the spread between the first and the third quartile; in inference, of single calls, the
99th percentile.
"""

import signal
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from itertools import chain, product
from multiprocessing import get_context

import numpy as np
from msgspec.structs import asdict

from common.report.schema import BUILT_IN, REFERENCE, Latency, Length, Recipe, Speed, Task, Timed
from comparison import contenders
from comparison.contenders import batch_of
from comparison.implementations import Missing
from comparison.peers import PROCESSES

Owners = Mapping[str, Executor]
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
INFERENCE = tuple(Task(B, T, 128, backward=False) for T, B in product((20, 200), (1, 8, 64)))
# Next to nothing to compute: what is left is what stands around it.
CALL = Task(1, 1, 1, backward=False, input_size=1)


def affordable(name: str, task: Task) -> bool:
    """Whether a contender is timed on a task: of the loop, only what is a matter of few seconds."""
    return name != "torch loop" or task.B * task.T <= 64 * 200


def measure(
    tasks: Iterable[Task],
    report: Callable[[str], object],
    device: str = "cpu",
    chosen: Callable[[str, Task], bool] = affordable,
    processes: Iterable[str] = PROCESSES,
) -> Speed:
    """Time the contenders on the tasks for which they are chosen, and, on the CPU, on the
    homework's recipe and in inference.

    report is told, in a line of text, what is being measured.
    """
    with ExitStack() as stack:
        pools = {
            name: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
            for name in processes
        }
        # A process inherits the block: a Ctrl-C waits until common/program.py is ready for it.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        for pool in pools.values():
            pool.submit(int)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        owners, inferring = _owners(pools, device)
        # The faster one: PyTorch's product, MKL's, takes twice as long as XLA's on AMD.
        peaks = [
            [pools[n].submit(contenders.peak, n).result() for n in ("torch", "jax") if n in pools]
            for _ in range(REPETITIONS)
        ]
        peak = float(np.median(peaks, axis=0).max())
        rows = []
        for task in tasks:
            report(f"measuring {task.name}")
            names = [name for name in owners if chosen(name, task)]
            rows += _rows(task, _time(owners, names, task), peak)
        if device != "cpu":
            return Speed(rows, [], [], peak)
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
        names = _there(inferring, report)
        latencies = []
        for task in (*INFERENCE, CALL):
            report(f"measuring inference, B {task.B}, T {task.T}")
            latencies.append(_latencies(task, _time(inferring, names, task, True)))
    *found, calls = latencies
    return Speed(rows, lengths, recipe, peak, list(chain(*found)), calls)


def _owners(pools: dict[str, ProcessPoolExecutor], device: str) -> tuple[Owners, Owners]:
    """The process of each contender in training, and in inference, once all have started."""
    there = {name: pool.submit(contenders.start, name, device) for name, pool in pools.items()}
    training, inferring = (
        {name: pools[each] for each, found in there.items() for name in found.result()[part]}
        for part in range(2)
    )
    return training, inferring


def _there(owners: Owners, report: Callable[[str], object]) -> list[str]:
    """Those that can be compiled here; report is told which cannot."""
    names = []
    for name, owner in owners.items():
        try:
            owner.submit(contenders.seconds, name, CALL, True).result()
        except (Missing, ImportError) as error:  # ONNX's graph needs the package onnx
            report(f"{name} is left out: {error}")
        else:
            names.append(name)
    return names


def _time(
    owners: Owners, names: Iterable[str], task: Task, inference: bool = False
) -> dict[str, list[float]]:
    """Seconds of each contender, REPETITIONS rounds of them, interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(REPETITIONS):
        for name, found in seconds.items():
            found.extend(owners[name].submit(contenders.seconds, name, task, inference).result())
    for pool in set(owners.values()):
        pool.submit(contenders.ready.cache_clear).result()
    return seconds


def _latencies(task: Task, seconds: dict[str, list[float]]) -> list[Latency]:
    reference = float(np.quantile(seconds[BUILT_IN], 0.5))
    rows = []
    for name, found in seconds.items():
        p50, p99 = np.quantile(found, [0.5, 0.99]).tolist()
        speeds = {"tokens_per_second": task.B * task.T / p50, "ratio": reference / p50}
        rows.append(Latency(**asdict(task), contender=name, p50=p50, p99=p99, **speeds))
    return rows


def _rows(task: Task, seconds: dict[str, list[float]], peak: float) -> list[Timed]:
    batch = batch_of(task.B, task.T)
    flops = _flops(task, batch.words, len(batch.distinct))
    reference = float(np.quantile(seconds[REFERENCE], 0.5))
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
