"""A file per framework or runtime, with all that the comparison needs of it.

A file has the name of its package; if that is not installed, the peer is left out. The file defines
one or both of

    contenders(variant, device) -> Contenders    sets up a process of `compare.py speed` and returns
                                                 its contenders
    implementations() -> list[Implementation]    returns the implementations that `compare.py
                                                 parity` checks

Each peer, or each of its VARIANTS, is timed in its own process.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any

VARIANTS = {"torch": ("", "-default"), "keras": ("-torch", "-jax")}
# The frameworks of the twins come first in all tables.
_NAMES = dict.fromkeys(("torch", "jax", *(module.name for module in iter_modules(__path__))))
INSTALLED = [name for name in _NAMES if find_spec(name)]
PROCESSES = tuple(name + each for name in INSTALLED for each in VARIANTS.get(name, ("",)))


def function(peer: str, name: str) -> Callable[..., Any] | None:
    """A function of a peer's file; None if the file does not define it."""
    return getattr(import_module(f"{__name__}.{peer}"), name, None)
