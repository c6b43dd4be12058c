"""Bad input: one clear line on standard error and exit status 2, never a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it and says why, in one line."""


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turn an InputError into its one line on standard error and exit status 2.

    Works as a context manager and as a decorator of a main function.
    """
    try:
        yield
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        sys.stderr.close()
        sys.exit(141)
