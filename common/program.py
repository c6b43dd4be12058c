"""What a program of this project sets in its process before its imports, which take seconds."""

import os
import signal
import sys

from common.errors import InputError, print_error
from common.extras import require


def start(*extras: str, limit_spinning: bool = True) -> None:
    """Prepare the process: Ctrl-C, the parent's death and the threads of PyTorch.

    extras: those that the program needs. If a package of theirs is missing, the program ends with
    one line and status 2.

    A Ctrl-C ends the program at once, without a traceback, until exit_on_input_error restores
    Python's handler. With `-X die_with_parent`, the process ends with its parent, which may be
    killed and start this program elsewhere.

    limit_spinning: The OpenMP threads of PyTorch spin for 10 ms and more while they wait. On a
    machine with other load, this starves the thread that they wait for, and training takes two to
    ten times as long. With the limit, threads sleep after half a millisecond, which suffices for
    the short steps of nn.GRU. OpenMP reads the variable when PyTorch is loaded.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # see comparison/speed.py
    if "die_with_parent" in sys._xoptions and sys.platform == "linux":
        import ctypes  # slow to import

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if limit_spinning:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        require(*extras)
    except InputError as error:
        print_error(f"error: {error}")
        sys.exit(2)
