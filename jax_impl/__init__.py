"""The GRU text classifier in JAX/Flax; torch_impl is its twin."""

from jax_impl.classifier import Classifier
from jax_impl.gru import GRU, gru
from jax_impl.learner import Learner

__all__ = ["GRU", "Classifier", "Learner", "gru"]
