"""SIGINT (Ctrl-C) and SIGTERM as requests that a program takes up when it is ready to."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def caught(handle: Callable[[int], object]) -> Iterator[None]:
    """Within, the two signals call handle(number of the signal).

    One that is ignored (as nohup and shells do for jobs in the background) stays ignored. In
    another thread than the main one this does nothing: Python lets only the main one do so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, lambda number, frame: handle(number))
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Yields a list: empty, or with the number of the first signal. The second ends the process."""
    asked: list[int] = []

    def handle(number: int) -> None:
        if asked:
            if sys.stdout.isatty():
                os.write(1, b"\x1b[?25h\n")  # the cursor, which the progress bar has hidden
            os._exit(128 + number)
        asked.append(number)

    with caught(handle):
        yield asked
