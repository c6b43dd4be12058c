"""What `python compare.py speed` times of inference: single calls, forward only.

All read the same reviews of real words, every one at least T words long and cut to T, so that there
is no padding, and return the last state, which is compared with the oracle's before it is timed.
"""

import time
from functools import cache

import numpy as np

from common import oracle
from common.report.schema import Task
from comparison import contenders
from comparison.contenders import Run, batch_of, weights_of, word_vectors

TOLERANCE = 1e-4  # of the last state, absolute; another kind of reset is a hundred times as far off
# In a round, at least so many seconds and calls. What another process has left behind (its threads
# spin for a while) is over after the first.
WARM_UP = 0.03, 3
TIMED = 0.1, 20


@cache
def problem(task: Task) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The weights, x [T, B, D] and the last state that the oracle computes from them."""
    batch, weights = batch_of(task.B, task.T, shortest=1), weights_of(task)
    x = word_vectors(task.input_size)[batch.distinct[batch.tokens]]
    return weights, x, oracle.forward(weights, x, batch.lengths, reset_after=True).h_last


@cache
def ready(name: str, task: Task) -> Run:
    """A contender at a task, compiled. Raises ArithmeticError where its last state is wrong."""
    weights, x, expected = problem(task)
    process = contenders.here[-1]
    with process.within():
        run = process.inference[name](weights, x)
        error = np.abs(np.asarray(run()).reshape(expected.shape) - expected).max()
    if not error <= process.tolerances.get(name, TOLERANCE):
        raise ArithmeticError(f"{name}, {task.name}: the last state is off by {error:.1e}")
    return run


def check(name: str, task: Task) -> None:
    """Raise what a contender raises at a task."""
    ready(name, task)


def seconds(name: str, task: Task) -> list[float]:
    """What each call of a round takes."""
    run = ready(name, task)
    with contenders.here[-1].within():
        for enough, calls in (WARM_UP, TIMED):
            durations: list[float] = []
            end = time.perf_counter() + enough
            while len(durations) < calls or time.perf_counter() < end:
                started = time.perf_counter()
                run()
                durations.append(time.perf_counter() - started)
    return durations
