"""The memory of a process: its peak, and the treatment of freed memory."""

import ctypes
import resource
import sys


def keep_freed_memory(by_all_threads: bool = False) -> None:
    """Keep freed memory for the next allocation instead of returning it to the system.

    A training step needs some tens of MB. Mapping them again in each step, page by page, can take
    as long as the computation. Only glibc returns large blocks at once; with another C library,
    this function does nothing.

    by_all_threads: also keep the memory of other threads than the main thread. This must be called
    before they are started. They then share one arena and wait for each other when they allocate,
    which costs 4 % of a step in XLA on two cores.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        if by_all_threads:
            mallopt(-8, 1)  # M_ARENA_MAX


def give_back() -> None:
    """Return free memory to the system, such as the memory of a peak that will not recur."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def peak_bytes() -> int:
    """The peak of the resident memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB on Linux
