"""Medians of measurements that alternate, so that disturbances affect all of them alike."""

import time
import timeit
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import TypeVar

K = TypeVar("K")


def medians(measurements: Mapping[K, Callable[[], float]], repetitions: int) -> dict[K, float]:
    """The median value of each measurement over interleaved repetitions."""
    values: dict[K, list[float]] = {name: [] for name in measurements}
    for _ in range(repetitions):
        for name, measure in measurements.items():
            values[name].append(measure())
    return {name: median(each) for name, each in values.items()}


def median_seconds(
    calls: Mapping[K, Callable[[], object]],
    repetitions: int,
    number: int = 1,
    timer: Callable[[], float] = time.perf_counter,
) -> dict[K, float]:
    """The median duration of each call over interleaved repetitions of `number` calls."""
    measurements = {name: partial(_seconds, call, number, timer) for name, call in calls.items()}
    return medians(measurements, repetitions)


def _seconds(call: Callable[[], object], number: int, timer: Callable[[], float]) -> float:
    call()  # not timed: the caches hold the data of another implementation
    return timeit.timeit(call, timer=timer, number=number) / number
