"""Errors that end a program with one line on standard error and an exit status.

2: bad input, or a file that cannot be read or written. 3: numbers that are not finite. 4: another
worker of the training is lost. 128 plus the number of the signal (130, 143): Ctrl-C or SIGTERM.
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
    """Invalid user input; the message, one line, names the input and the problem."""


class NotFiniteError(ArithmeticError):
    """A loss or a gradient of the training is infinite or NaN."""


class Stopped(Exception):
    """A signal stopped the training after a checkpoint was saved."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{message}")
        self.status = 128 + number


def masked(text: str) -> str:
    """The text with users and passwords of URLs masked."""
    return re.sub(r"://[^/@\s]+@", "://***@", text)


def print_error(message: object) -> None:
    """Print a message as one line on standard error."""
    print(" ".join(str(message).split()), file=sys.stderr, flush=True)


def status_of(error: Exception) -> int:
    """The exit status for an error."""
    if isinstance(error, Stopped):
        return error.status
    return 3 if isinstance(error, NotFiniteError) else 2


def interrupt_again(unraisable: Any) -> None:
    """An unraisablehook that raises a Ctrl-C again outside of the callback in which it arrived.

    Python discards a Ctrl-C in a callback, such as JAX's for the garbage collector.
    """
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turn the errors above into one line on standard error and an exit status.

    Works as a context manager and as a decorator of a main function.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set by common/program.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = interrupt_again
    try:
        yield
    except (InputError, NotFiniteError) as error:
        print_error(f"error: {error}")
        sys.exit(status_of(error))
    except Stopped as stopped:
        print_error(stopped)
        sys.exit(stopped.status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output (head, less) has exited
        sys.stderr.close()
        sys.exit(141)
