"""The code shared by the twins: data, word vectors, batches, parameters, training loop, metrics.

Nothing in this package imports torch or jax, except common/convert/files.py, which imports torch to
read and write .pt files.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

__version__ = "0.1.0"
PROGRAMS = ("common", "comparison", "jax_impl", "torch_impl")


def is_own_program() -> bool:
    """Whether the main program is one of this project (compare.py, `python -m ...`).

    Signals and the environment of other programs, which import the layer, are left unchanged.
    """
    if sys.argv[:1] == ["-m"]:  # while Python imports the packages of the module
        words = sys.orig_argv
        module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
        return module.partition(".")[0] in PROGRAMS
    script = Path(__file__).resolve().parents[1] / "compare.py"
    return bool(sys.argv[:1]) and Path(sys.argv[0]).resolve() == script


# The parent may be killed and start this program elsewhere, so this process must end with it.
if "die_with_parent" in sys._xoptions and sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

# To import takes seconds. A Ctrl-C meanwhile ends the program there and then, without a traceback;
# exit_on_input_error, around what it does, gives Python back its own handling.
if is_own_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# PyTorch's threads, OpenMP's, spin while they wait for work, 10 ms and more. On a machine where
# others work, too, that takes the time away from the thread that they wait for: training takes two
# to ten times as long. In a program of ours they go to sleep after half a millisecond, which is
# enough for the short steps of nn.GRU. OpenMP reads this when it is loaded, along with PyTorch. Not
# in compare.py, which measures PyTorch as it comes; what it trains is a program in turn.
if is_own_program() and sys.argv[:1] == ["-m"]:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
