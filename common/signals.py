"""SIGINT (Ctrl-C) and SIGTERM as requests that a program handles when it is ready."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def caught(handle: Callable[[int], object]) -> Iterator[None]:
    """Within the block, the two signals call handle(signal number).

    An ignored signal (nohup, background jobs of shells) stays ignored. Outside of the main thread,
    in which alone Python allows signal handlers, this does nothing.
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
    """Yield a list that receives the number of the first signal. A second ends the process."""
    requests: list[int] = []

    def handle(number: int) -> None:
        if requests:
            if sys.stdout.isatty():
                os.write(1, b"\x1b[?25h\n")  # show the cursor, which the progress bar has hidden
            os._exit(128 + number)
        requests.append(number)

    with caught(handle):
        yield requests
