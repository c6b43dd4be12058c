"""What ends a program early: one clear line on standard error, never a traceback.

Exit status 2: bad input, or a file that cannot be read or written. 3: numbers that are not finite.
4: another worker of the same training is gone. 128 and the number of the signal (130, 143): stopped
by Ctrl-C or SIGTERM.
"""

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOST = 4


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it and says why, in one line."""


class NotFiniteError(ArithmeticError):
    """Training cannot go on: a loss or a gradient is infinite or no number."""


class Stopped(Exception):
    """Training stopped because a signal asked for it, after saving where it stood."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{message}")
        self.status = 128 + number


def masked(text: str) -> str:
    """Without the users and passwords of the URLs in it."""
    return re.sub(r"://[^/@\s]+@", "://***@", text)


def complain(message: object) -> None:
    """Say what is wrong, in one line on standard error."""
    print(" ".join(str(message).split()), file=sys.stderr, flush=True)


def status_of(error: Exception) -> int:
    """The exit status that stands for it."""
    if isinstance(error, Stopped):
        return error.status
    return 3 if isinstance(error, NotFiniteError) else 2


def interrupt_again(unraisable: Any) -> None:
    """Python's unraisablehook, but for a Ctrl-C that arrives in a callback, such as JAX's for the
    garbage collector: Python discards that, so it is raised once more, outside the callback."""
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turn the errors above into their one line on standard error and their exit status.

    Works as a context manager and as a decorator of a main function.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as common/__init__.py has set it
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = interrupt_again
    try:
        yield
    except (InputError, NotFiniteError) as error:
        complain(f"error: {error}")
        sys.exit(status_of(error))
    except Stopped as stopped:
        complain(stopped)
        sys.exit(stopped.status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        sys.stderr.close()
        sys.exit(141)
