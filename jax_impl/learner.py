"""What the training loop drives, in JAX/Flax. Its twin is torch_impl/learner.py."""

import dataclasses
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jaxtyping import Float

from common.data.batches import Batch
from common.errors import InputError
from common.params import ModelConfig, init
from common.training import learner
from common.training.learner import Arrays
from common.training.options import TrainConfig
from jax_impl.classifier import CELLS, Classifier, cross_entropy
from jax_impl.layers import canonical, register
from jax_impl.trace import explain

FRAMEWORK = "jax"
MOMENTS = {"first_moment": "mu", "second_moment": "nu"}  # in optax.adam


def make_deterministic() -> None:
    """Have JAX compute the same numbers each time on a GPU, too: slower there.

    It has to come before JAX first computes.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()


def find_device(name: str) -> jax.Device:
    """The device called auto, cpu or cuda. Raises InputError where the machine has none."""
    try:
        return jax.devices(None if name == "auto" else name)[0]
    except RuntimeError:
        raise InputError(f"--device {name}: JAX finds no such device on this machine") from None


class Learner(learner.Learner):
    """The learner that common/training/learner.py describes, in JAX."""

    def __init__(
        self,
        config: ModelConfig,
        training: TrainConfig,
        vectors: Float[np.ndarray, "V D"],
        parameters: Arrays | None = None,
        dtype: str = "float32",
    ) -> None:
        self.device = find_device(training.device)
        cell, device = CELLS[config.cell], self.device
        self.implementation = cell.resolve(config.implementation, device.platform, config.dtype)
        self.compilations = 0
        config = dataclasses.replace(config, implementation=self.implementation)
        parameters = parameters or init(config, training.seed, vectors)
        with jax.default_device(device):
            model = Classifier(config, parameters, vectors, jnp.dtype(dtype))
        self.graph, *states = nnx.split(model, nnx.Param, ...)
        # Where a step leaves them: otherwise JAX compiles the first step twice.
        self.state, self.frozen = jax.device_put(states, device)
        self.optimizer = optax.adam(training.learning_rate, *training.betas, training.eps)
        self.moments = jax.device_put(self.optimizer.init(self.state), device)
        self.training = training
        self.gradient_norm = jnp.zeros(())

    def step(self, batch: Batch) -> Float[Array, ""]:
        loss, gradients = self._backward(self.state, self.frozen, *self._arrays(batch))
        updated = self._update(self.state, self.moments, gradients)
        self.state, self.moments, self.gradient_norm = updated
        return loss

    def logits(self, batch: Batch) -> Float[np.ndarray, "B C"]:
        return np.asarray(self._logits(self.state, self.frozen, *self._arrays(batch)[:3]))

    def gradients(self, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
        loss, gradients = self._backward(self.state, self.frozen, *self._arrays(batch))
        return float(loss), self._read(gradients)

    def explain(self, batch: Batch) -> dict[str, np.ndarray]:
        model = nnx.merge(self.graph, self.state, self.frozen)
        parameters = canonical(model, model.names)
        arrays = model.vectors[...], *self._arrays(batch)
        found = explain(parameters, *arrays, reset_after=model.config.reset_after)
        return {name: np.asarray(value) for name, value in found.items()}

    def parameters(self) -> dict[str, np.ndarray]:
        return self._read(self.state)

    def optimizer_state(self) -> dict[str, np.ndarray]:
        state = {"step": np.array(int(optax.tree.get(self.moments, "count")))}
        for ours, theirs in MOMENTS.items():
            values = self._read(optax.tree.get(self.moments, theirs))
            state |= {f"{ours}.{name}": value for name, value in values.items()}
        return state

    def load(self, parameters: Arrays, optimizer_state: Arrays | None = None) -> None:
        self.state = self._written(parameters)
        if optimizer_state is None:
            return
        for ours, theirs in MOMENTS.items():
            values = {name: optimizer_state[f"{ours}.{name}"] for name in parameters}
            self.moments = optax.tree.set(self.moments, **{theirs: self._written(values)})
        count = jnp.asarray(optimizer_state["step"], jnp.int32)
        self.moments = optax.tree.set(self.moments, count=count)

    def _arrays(self, batch: Batch) -> tuple[Array, ...]:
        arrays = (batch.distinct, batch.tokens, batch.lengths, batch.labels)
        return tuple(jax.device_put(arrays, self.device))

    @partial(jax.jit, static_argnums=0)
    def _logits(self, state: nnx.State, frozen: nnx.State, *inputs: Array) -> Float[Array, "B C"]:
        return nnx.merge(self.graph, state, frozen)(*inputs)

    @partial(jax.jit, static_argnums=0)
    def _backward(
        self, state: nnx.State, frozen: nnx.State, *arrays: Array
    ) -> tuple[Float[Array, ""], nnx.State]:
        self.compilations += 1  # runs when JAX traces this, once for each shape of a batch

        def loss(state: nnx.State) -> Float[Array, ""]:
            *inputs, labels = arrays
            return cross_entropy(self._logits(state, frozen, *inputs), labels)

        return jax.value_and_grad(loss)(state)

    # Apart from the gradients, so that it is compiled once, and not for each shape of a batch.
    @partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def _update(
        self, state: nnx.State, moments: optax.OptState, gradients: nnx.State
    ) -> tuple[nnx.State, optax.OptState, Float[Array, ""]]:
        norm = optax.tree.norm(gradients)
        if (clip_norm := self.training.clip_norm) is not None:
            # As torch.nn.utils.clip_grads_with_norm_ does; optax.clip_by_global_norm has no 1e-6.
            scale = jnp.minimum(clip_norm / (norm + 1e-6), 1)
            gradients = jax.tree.map(lambda gradient: gradient * scale, gradients)
        updates, moments = self.optimizer.update(gradients, moments, state)
        return optax.apply_updates(state, updates), moments, norm

    def _read(self, state: nnx.State) -> dict[str, np.ndarray]:
        model = nnx.merge(self.graph, state, self.frozen)
        return {name: np.array(value) for name, value in canonical(model, model.names).items()}

    def _written(self, values: Arrays) -> nnx.State:
        model = nnx.merge(self.graph, self.state, self.frozen)
        register(model, values, model.vectors[...].dtype)
        return jax.device_put(nnx.state(model, nnx.Param), self.device)
