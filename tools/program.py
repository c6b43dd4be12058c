"""What the programs of tools/ and benchmarks/ share: the command line, Markdown tables, memory."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import tyro

from common.errors import exit_on_input_error


def run_program(main: Callable[..., int | None]) -> None:
    """Call a program's main function with the arguments of the command line, then exit.

    The parameters of `main` are the options of the program, and the docstring of its module is the
    description in --help. `main` returns the exit status, or None for 0. An InputError ends the
    program with one line.
    """
    program = sys.modules["__main__"]
    assert program.__spec__ is not None
    name = f"python -m {program.__spec__.name}"
    with exit_on_input_error():
        sys.exit(tyro.cli(main, prog=name, description=program.__doc__))


def print_row(*cells: object) -> None:
    """Print a row of a Markdown table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_header(*cells: str) -> None:
    """Print the header of a Markdown table."""
    print_row(*cells)
    print("|---" * len(cells) + "|", flush=True)


def memory_of(process: int, file: str = "status") -> Counter[str]:
    """The sizes in bytes that /proc/PROCESS/status, or another file there, lists.

    After the end of the process, all sizes are 0.
    """
    try:
        lines = Path(f"/proc/{process}/{file}").read_text().splitlines()
    except OSError:
        return Counter()
    kib = (line.split() for line in lines if line.endswith(" kB"))
    return Counter({name.rstrip(":"): int(size) * 1024 for name, size, _ in kib})


def children_of(process: int) -> list[int]:
    """The child processes that the threads of a process have started."""
    files = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for path in files for child in path.read_text().split()]
