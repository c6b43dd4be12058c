"""The GRU text classifier in PyTorch; jax_impl is its twin."""

from common import __version__  # before what takes long: see there, Ctrl-C
from torch_impl.classifier import Classifier
from torch_impl.modules import GRU, GRUCell

__all__ = ["GRU", "Classifier", "GRUCell", "__version__"]
