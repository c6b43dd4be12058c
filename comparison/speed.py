"""Measures the speed of every GRU in training and inference: `python compare.py speed`.

Each framework has its own process (comparison/contenders.py). The contenders take turns, so that
disturbances by other programs affect all of them alike. A result is the median of several
repetitions, with the first and third quartiles or, in inference, of single calls, with the 99th
percentile.
"""

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
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
"""The process of each contender."""
Seconds = dict[str, list[float]]
"""The durations of each contender."""
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
# The time per token of the kernel alone, by the length of the reviews: with one input dimension,
# the input product, whose share falls with the length, is negligible.
LENGTHS = tuple(Task(64, T, 128, input_size=1) for T in (50, 200, 1000, 2000))
# The homework: batch 1, H 128, Adam, 4 epochs of 14,227 reviews.
RECIPE = Task(1, 200, 128, training=True)
RECIPE_STEPS = 4 * 14_227
INFERENCE = tuple(Task(B, T, 128, backward=False) for T, B in product((20, 200), (1, 8, 64)))
CALL = Task(1, 1, 1, backward=False, input_size=1)  # measures the overhead of a call


def affordable(name: str, task: Task) -> bool:
    """Whether to time a contender on a task; the loop is too slow for more than 64 x 200 words."""
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

    report receives lines of progress.
    """
    with _started(processes) as pools:
        started = {
            name: pool.submit(contenders.start, name, device) for name, pool in pools.items()
        }
        training, inference = (
            {name: pools[p] for p, names in started.items() for name in names.result()[part]}
            for part in range(2)
        )
        peaks = [
            [pools[n].submit(contenders.peak, n).result() for n in ("torch", "jax") if n in pools]
            for _ in range(REPETITIONS)
        ]
        # The larger of the two, because PyTorch's product (MKL) takes twice as long on AMD.
        peak = float(np.median(peaks, axis=0).max())
        rows = []
        for task in tasks:
            report(f"measuring {task.name}")
            names = [name for name in training if chosen(name, task)]
            rows += _rows(task, _time(training, names, task), peak)
        if device != "cpu":
            return Speed(rows, [], [], peak)
        report("measuring the cost of a token in short and in long reviews")
        fused = [name for name in training if name.endswith(" fused")]
        lengths = [
            Length(name, task.T, 1e9 * float(np.median(seconds)) / batch_of(task.B, task.T).words)
            for task in LENGTHS
            for name, seconds in _time(training, fused, task).items()
        ]
        report("measuring the homework's recipe")
        names = [n for n in training if n in (REFERENCE, "torch loop", "torch fused", "jax fused")]
        medians = {n: float(np.median(s)) for n, s in _time(training, names, RECIPE).items()}
        recipe = [
            Recipe(name, 1 / median, median * RECIPE_STEPS) for name, median in medians.items()
        ]
        names = _available(inference, report)
        latencies = []
        for task in (*INFERENCE, CALL):
            report(f"measuring inference, B {task.B}, T {task.T}")
            latencies.append(_latencies(task, _time(inference, names, task, True)))
    *others, calls = latencies
    return Speed(rows, lengths, recipe, peak, list(chain(*others)), calls)


@contextmanager
def _started(names: Iterable[str]) -> Iterator[dict[str, ProcessPoolExecutor]]:
    """A process for each of these peers, within the block."""
    with ExitStack() as stack:
        pools = {
            name: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
            for name in names
        }
        # The first submission starts a process, which inherits the blocked SIGINT:
        # common/program.py unblocks it when it can handle the signal.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            for pool in pools.values():
                pool.submit(int)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        yield pools


def _available(owners: Owners, report: Callable[[str], object]) -> list[str]:
    """The contenders that can run inference on this machine; reports the others."""
    names = []
    for name, owner in owners.items():
        try:
            owner.submit(contenders.seconds, name, CALL, True).result()
        except (Missing, ImportError) as error:  # the ONNX graph needs the package onnx
            report(f"{name} is left out: {error}")
        else:
            names.append(name)
    return names


def _time(owners: Owners, names: Iterable[str], task: Task, inference: bool = False) -> Seconds:
    """The durations of each contender, in REPETITIONS interleaved rounds."""
    seconds: Seconds = {name: [] for name in names}
    for _ in range(REPETITIONS):
        for name, durations in seconds.items():
            round_ = owners[name].submit(contenders.seconds, name, task, inference)
            durations.extend(round_.result())
    for pool in set(owners.values()):
        pool.submit(contenders.ready.cache_clear).result()
    return seconds


def _latencies(task: Task, seconds: Seconds) -> list[Latency]:
    reference = float(np.median(seconds[BUILT_IN]))
    rows = []
    for name, durations in seconds.items():
        p50, p99 = np.quantile(durations, [0.5, 0.99]).tolist()
        speeds = {"tokens_per_second": task.B * task.T / p50, "ratio": reference / p50}
        rows.append(Latency(**asdict(task), contender=name, p50=p50, p99=p99, **speeds))
    return rows


def _rows(task: Task, seconds: Seconds, peak: float) -> list[Timed]:
    batch = batch_of(task.B, task.T)
    flops = _flops(task, batch.words, len(batch.distinct))
    reference = float(np.median(seconds[REFERENCE]))
    rows = []
    for name, durations in seconds.items():
        slow, median, fast = np.quantile(durations, [0.75, 0.5, 0.25]).tolist()
        speeds = {
            "tokens_per_second": batch.words / median,
            "quartiles": (batch.words / slow, batch.words / fast),
            "ratio": reference / median,
            "peak_fraction": flops / median / peak,
        }
        rows.append(Timed(**asdict(task), contender=name, **speeds))
    return rows


def _flops(task: Task, words: int, distinct: int) -> float:
    """The operations of the necessary matrix products of a task.

    Forward: the recurrent product of every word and the input product of every distinct word.
    Backward: twice the recurrent product, for states and weights, and once the input product, for
    weights.
    """
    recurrent = 2 * words * 3 * task.H * task.H
    inputs = 2 * distinct * 3 * task.H * task.input_size
    directions = 1 + task.bidirectional
    return directions * (recurrent * (3 if task.backward else 1) + inputs * (1 + task.backward))
