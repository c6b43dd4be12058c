"""What a process does with memory that it no longer needs."""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed_memory() -> None:
    """Keep freed memory for the next allocation instead of giving it back to the system.

    A training step needs some tens of MB; to get them anew each time, page by page, can take as
    long as the computation. Only glibc gives large pieces back at once: elsewhere, does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, 2**30)
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
