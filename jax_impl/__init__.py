"""The GRU text classifier in JAX/Flax; torch_impl is its twin."""

from typing import TYPE_CHECKING, Any

from common import __version__  # before what takes long: see there, Ctrl-C
from jax_impl.classifier import Classifier
from jax_impl.modules import GRU, GRUCell, Recurrent

if TYPE_CHECKING:
    from jax_impl.predict import load

__all__ = ["GRU", "Classifier", "GRUCell", "Recurrent", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jax_impl.predict import load  # a layer alone need not bring the whole program

    return load
