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

# A Ctrl-C during the imports, which take seconds, ends the program at once, without a traceback;
# exit_on_input_error then restores Python's handler.
if is_own_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# The OpenMP threads of PyTorch spin for 10 ms and more while they wait. On a machine with other
# load, this starves the thread that they wait for, and training takes two to ten times as long.
# With this limit, threads sleep after half a millisecond, which suffices for the short steps of
# nn.GRU. OpenMP reads the variable when PyTorch is loaded. compare.py is excluded, because it
# measures PyTorch with its defaults; it trains in programs of their own.
if is_own_program() and sys.argv[:1] == ["-m"]:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
