"""What the two twins share: data, word vectors, batches, parameters, training loop, metrics.

Nothing in here imports torch or jax.
"""

import signal
import sys

PROGRAMS = ("common", "comparison", "jax_impl", "torch_impl")


def starting() -> bool:
    """Whether Python is importing one of this project's programs: compare.py, `python -m ...`."""
    if sys.argv[0] == "-m":  # while it imports the packages that the module is in
        return any(word.startswith(PROGRAMS) for word in sys.orig_argv[1:])
    return sys.argv[0].endswith("compare.py")


# To import takes seconds. A Ctrl-C meanwhile ends the program there and then, without a traceback;
# exit_on_input_error, around what it does, gives Python back its own handling.
if starting() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
