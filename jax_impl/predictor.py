"""A classifier that answers and explains its answers in JAX. Its twin: torch_impl/predictor.py.

A predictor consists of parameters, word vectors and the forward computation; training (learner.py)
adds the loss, the gradients and the optimizer.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from common.data.batches import Inputs
from common.errors import InputError
from common.inference import predictor
from common.params import ModelConfig
from jax_impl.classifier import CELLS, Classifier
from jax_impl.layers import canonical
from jax_impl.trace import explain


def find_device(name: str) -> jax.Device:
    """The device named auto, cpu or cuda. Raises InputError if the machine has none."""
    try:
        return jax.local_devices(backend=None if name == "auto" else name)[0]
    except RuntimeError:
        raise InputError(f"--device {name}: JAX finds no such device on this machine") from None


class Predictor(predictor.Predictor):
    """The predictor of common/inference/predictor.py in JAX."""

    def __init__(
        self,
        config: ModelConfig,
        parameters: Mapping[str, np.ndarray],
        vectors: Float[np.ndarray, "V D"],
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        self.device = find_device(device)
        cell, kind = CELLS[config.cell], self.device.platform
        resolved = cell.resolve(config.implementation, kind, config.dtype, config.hidden_size)
        self.implementation = resolved
        self.config = dataclasses.replace(config, implementation=resolved)
        with jax.default_device(self.device):
            model = Classifier(self.config, parameters, vectors, jnp.dtype(dtype))
        self.graph, *states = nnx.split(model, nnx.Param, ...)
        # On the device on which a training step leaves them; otherwise JAX compiles the first step
        # twice.
        self.state, self.frozen = jax.device_put(states, self.device)

    def logits(self, inputs: Inputs) -> Float[np.ndarray, "B C"]:
        arrays, ratios = self._arrays(inputs), self._ratios(inputs)
        return np.asarray(self._logits(self.state, self.frozen, *arrays, {}, ratios))

    def explain(self, inputs: Inputs, labels: Int[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        model = nnx.merge(self.graph, self.state, self.frozen)
        explanation = explain(
            canonical(model, model.names),
            model.vectors[...],
            *self._arrays(inputs),
            labels,
            ratios=self._ratios(inputs),
            config=self.config,
        )
        return {name: np.asarray(value) for name, value in explanation.items()}

    # NumPy arrays go to the state's device without jax.device_put, which is slower.

    def _array(self, array: np.ndarray) -> np.ndarray:
        """The array in the dtype of the parameters; an array of bytes keeps its dtype."""
        if array.dtype == np.uint8:
            return array
        return array.astype(jax.tree.leaves(self.state)[0].dtype, copy=False)

    def _arrays(self, inputs: Inputs) -> tuple[Any, Any, Any]:
        return inputs.distinct, inputs.tokens, inputs.lengths

    def _ratios(self, inputs: Inputs) -> Any:
        return None if inputs.ratios is None else self._array(inputs.ratios)

    @partial(jax.jit, static_argnums=0)
    def _logits(self, state: nnx.State, frozen: nnx.State, *inputs: Any) -> Float[Array, "B C"]:
        return nnx.merge(self.graph, state, frozen)(*inputs)
