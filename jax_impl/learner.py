"""What the training loop drives, in JAX/Flax. Its twin is torch_impl/learner.py."""

import dataclasses
import os
from collections.abc import Mapping
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
from common.training.options import TrainConfig
from jax_impl.classifier import CELLS, Classifier, cross_entropy
from jax_impl.layers import canonical
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


class Learner:
    """A classifier with its loss and its optimizer (Adam).

    parameters: canonical (see common/params.py), by default drawn from the seed. vectors [V, D].
    """

    def __init__(
        self,
        config: ModelConfig,
        training: TrainConfig,
        vectors: Float[np.ndarray, "V D"],
        parameters: Mapping[str, np.ndarray] | None = None,
        dtype: str = "float32",
    ) -> None:
        """dtype="float64" works where JAX's x64 mode is on."""
        self.device = find_device(training.device)
        self.implementation = CELLS[config.cell].resolve(
            config.implementation, self.device.platform
        )
        config = dataclasses.replace(config, implementation=self.implementation)
        self.compilations = 0  # of the training step
        parameters = parameters or init(config, training.seed, vectors)
        self.names = tuple(parameters)
        with jax.default_device(self.device):
            model = Classifier(config, parameters, vectors, jnp.dtype(dtype))
        self.graph, state = nnx.split(model)
        self.state, self.frozen = nnx.split_state(state, nnx.Param, ...)
        self.optimizer = optax.adam(
            training.learning_rate, b1=training.betas[0], b2=training.betas[1], eps=training.eps
        )
        self.moments = self.optimizer.init(self.state)
        # Where a step leaves them: otherwise JAX compiles the first step twice.
        self.state, self.frozen, self.moments = jax.device_put(
            (self.state, self.frozen, self.moments), self.device
        )
        self.clip_norm = training.clip_norm
        self.gradient_norm = jnp.zeros(())

    def step(self, batch: Batch) -> Float[Array, ""]:
        """One step of the optimizer on a batch; returns the loss before it.

        Leaves the norm of the gradient, before clipping, in self.gradient_norm.
        """
        loss, gradients = self._backward(self.state, self.frozen, *self._arrays(batch))
        self.state, self.moments, self.gradient_norm = self._update(
            self.state, self.moments, gradients
        )
        return loss

    def logits(self, batch: Batch) -> Float[np.ndarray, "B C"]:
        """The logits of a batch."""
        return np.asarray(self._logits(self.state, self.frozen, *self._arrays(batch)[:3]))

    def gradients(self, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
        """The loss of a batch and its gradient with respect to every parameter."""
        loss, gradients = self._backward(self.state, self.frozen, *self._arrays(batch))
        return float(loss), self._read(gradients)

    def explain(self, batch: Batch) -> dict[str, np.ndarray]:
        """How the model comes to its answers on a batch: see `explain` in jax_impl/trace.py."""
        model = nnx.merge(self.graph, self.state, self.frozen)
        found = explain(
            canonical(model, model.names),
            model.vectors[...],
            *self._arrays(batch),
            reset_after=model.config.reset_after,
        )
        return {name: np.asarray(value) for name, value in found.items()}

    def parameters(self) -> dict[str, np.ndarray]:
        """A copy of the parameters under their canonical names."""
        return self._read(self.state)

    def optimizer_state(self) -> dict[str, np.ndarray]:
        """A copy of Adam's state: step [], first_moment.NAME and second_moment.NAME."""
        adam = self.moments[0]
        state = {"step": np.array(int(adam.count))}
        for ours, theirs in MOMENTS.items():
            values = self._read(getattr(adam, theirs))
            state |= {f"{ours}.{name}": value for name, value in values.items()}
        return state

    def load(
        self,
        parameters: Mapping[str, np.ndarray],
        optimizer_state: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Go on from what `parameters` and `optimizer_state` once returned, in either framework."""
        self.state = self._written(self.state, parameters)
        if optimizer_state is None:
            return
        adam, *others = self.moments
        for ours, theirs in MOMENTS.items():
            values = {name: optimizer_state[f"{ours}.{name}"] for name in parameters}
            adam = adam._replace(**{theirs: self._written(getattr(adam, theirs), values)})
        count = jnp.asarray(optimizer_state["step"], adam.count.dtype)
        self.moments = (adam._replace(count=count), *others)

    def _arrays(self, batch: Batch) -> tuple[Array, ...]:
        arrays = (batch.distinct, batch.tokens, batch.lengths, batch.labels)
        return tuple(jax.device_put(arrays, self.device))

    @partial(jax.jit, static_argnums=0)
    def _logits(self, state: nnx.State, frozen: nnx.State, *inputs: Array) -> Float[Array, "B C"]:
        return nnx.merge(self.graph, state, frozen)(*inputs)

    @partial(jax.jit, static_argnums=0)
    def _backward(
        self, state: nnx.State, frozen: nnx.State, *inputs_and_labels: Array
    ) -> tuple[Float[Array, ""], nnx.State]:
        self.compilations += 1  # runs when JAX traces this, once for each shape of a batch

        def loss(state: nnx.State) -> Float[Array, ""]:
            *inputs, labels = inputs_and_labels
            return cross_entropy(self._logits(state, frozen, *inputs), labels)

        return jax.value_and_grad(loss)(state)

    # Apart from the gradients, so that it is compiled once, and not for each shape of a batch.
    @partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def _update(
        self, state: nnx.State, moments: optax.OptState, gradients: nnx.State
    ) -> tuple[nnx.State, optax.OptState, Float[Array, ""]]:
        norm = optax.tree.norm(gradients)
        if self.clip_norm is not None:
            # As torch.nn.utils.clip_grads_with_norm_ does; optax.clip_by_global_norm has no 1e-6.
            scale = jnp.minimum(self.clip_norm / (norm + 1e-6), 1)
            gradients = jax.tree.map(lambda gradient: gradient * scale, gradients)
        updates, moments = self.optimizer.update(gradients, moments, state)
        return optax.apply_updates(state, updates), moments, norm

    def _read(self, state: nnx.State) -> dict[str, np.ndarray]:
        return {name: np.array(state[name.replace(".", "_")][...]) for name in self.names}

    def _written(self, state: nnx.State, values: Mapping[str, np.ndarray]) -> nnx.State:
        named = {name.replace(".", "_"): value for name, value in values.items()}
        return jax.tree.map_with_path(
            lambda path, old: jax.device_put(named[path[0].key].astype(old.dtype), self.device),
            state,
        )
