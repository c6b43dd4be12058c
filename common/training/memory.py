"""The memory of a process: how much it has needed, and what it does with what it frees."""

import ctypes
import resource
import sys


def keep_freed_memory(by_all_threads: bool = False) -> None:
    """Keep freed memory for the next allocation instead of giving it back to the system.

    A training step needs some tens of MB; to get them anew each time, page by page, can take as
    long as the computation. Only glibc gives large pieces back at once: elsewhere, does nothing.

    by_all_threads: not only what the main one allocates. It has to come before there are others,
    which then wait for each other when they allocate: 4 % of a step of XLA's on two cores.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        if by_all_threads:
            mallopt(-8, 1)  # M_ARENA_MAX


def give_back() -> None:
    """Give what is free back to the system, all the same: it was needed once."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def peak_bytes() -> int:
    """The most memory that the process has had so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB on Linux
