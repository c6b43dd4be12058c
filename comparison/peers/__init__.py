"""One file a framework or runtime: all that the comparison knows of it.

A file is named after the package that it needs; where that is not installed, the peer is left out.
The file defines either or both of

    contenders(variant, device) -> Contenders    sets the process up for `compare.py speed` and
                                                 returns what is timed in it
    implementations() -> list[Implementation]    returns what `compare.py parity` checks

A peer is timed in a process of its own, or in several, one for each of its VARIANTS.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any

VARIANTS = {"torch": ("", "-default"), "keras": ("-torch", "-jax")}
# Those that the twins are written in come first in all tables.
_NAMES = dict.fromkeys(("torch", "jax", *(module.name for module in iter_modules(__path__))))
INSTALLED = [name for name in _NAMES if find_spec(name)]
PROCESSES = tuple(name + way for name in INSTALLED for way in VARIANTS.get(name, ("",)))


def function(peer: str, name: str) -> Callable[..., Any] | None:
    """A function of a peer's file; None where the file does not define it."""
    return getattr(import_module(f"{__name__}.{peer}"), name, None)
