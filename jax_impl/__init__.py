"""The GRU text classifier in JAX/Flax; torch_impl is its twin."""

from common import __version__  # before what takes long: see there, Ctrl-C
from jax_impl.classifier import Classifier
from jax_impl.modules import GRU, GRUCell

__all__ = ["GRU", "Classifier", "GRUCell", "__version__"]
