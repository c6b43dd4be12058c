"""What a process does with memory that it no longer needs."""

import ctypes


def keep_freed_memory() -> None:
    """Keep freed memory for the next allocation instead of giving it back to the system.

    A training step needs some tens of MB; to get them anew each time, page by page, can take as
    long as the computation. Only glibc gives large pieces back at once: elsewhere, does nothing.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
