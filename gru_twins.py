"""The command gru-twins: a short name for each of the project's programs.

gru-twins compare                        the same as python -m compare
gru-twins train --framework jax          the same as python -m jax_impl.train
"""

import argparse
import os
import sys
from difflib import get_close_matches

from common import __version__
from common.errors import InputError, exit_on_input_error

FRAMEWORKS = ("torch", "jax")
# By name, the module, in which {} stands for the framework, and what it does.
COMMANDS = {
    "compare": ("compare", "compare the twins: train, check parity, measure, write a report"),
    "train": ("{}_impl.train", "train a classifier"),
    "predict": ("{}_impl.predict", "classify texts"),
    "explain": ("{}_impl.explain", "say why a text was classified so, word by word"),
    "export": ("{}_impl.export", "write a trained model for other programs to run"),
    "serve": ("{}_impl.serve", "classify texts over HTTP"),
    "convert": ("common.convert", "convert parameters between the layouts of frameworks"),
}
HELP = """\
usage: gru-twins COMMAND [--framework {torch,jax}] [OPTIONS]

One GRU text classifier, twice from one specification: in PyTorch and in JAX.

{commands}

Each has a --help of its own. --framework is not for compare and convert, which
know both or none; torch is the default. gru-twins --version says which version
this is.
"""


@exit_on_input_error()
def main() -> None:
    """Become the program that the command line names."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        commands = "\n".join(f"  {name:<9} {about}" for name, (_, about) in COMMANDS.items())
        print(HELP.replace("{commands}", commands), end="")
        return
    if name == "--version":
        print(f"gru-twins {__version__}")
        return
    if name not in COMMANDS:
        hint = (
            "; did you mean {}?".format(*close)
            if (close := get_close_matches(name, COMMANDS))
            else ""
        )
        raise InputError(f"{name}: expected one of {', '.join(COMMANDS)}{hint}")
    module, program = COMMANDS[name][0], f"gru-twins {name}"
    if "{}" in module:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--framework", nargs="?", default="torch", const="")
        known, arguments = parser.parse_known_args(arguments)
        if known.framework not in FRAMEWORKS:
            raise InputError(f"--framework {known.framework}: expected torch or jax")
        module = module.format(known.framework)
    # -P: nothing of the folder it is called in stands in for a module.
    options = ["-X", f"gru_twins={program}", "-P", "-m", module]
    os.execv(sys.executable, [sys.executable, *options, *arguments])


if __name__ == "__main__":
    main()
