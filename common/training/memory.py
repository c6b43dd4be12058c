"""The memory of a process: how much it has needed, and what it does with what it frees."""

import ctypes
import resource
import sys


def keep_freed_memory() -> None:
    """Keep freed memory for the next allocation instead of giving it back to the system.

    A training step needs some tens of MB; to get them anew each time, page by page, can take as
    long as the computation. Only glibc gives large pieces back at once: elsewhere, does nothing.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-8, 1)  # M_ARENA_MAX: what other threads allocate from gives large pieces back


def give_back() -> None:
    """Give what is free back to the system, all the same: it was needed once."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def peak_bytes() -> int:
    """The most memory that the process has had so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB on Linux
