"""The training steps in JAX/Flax, for the training loop. Its twin is torch_impl/learner.py."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.flatten_util import ravel_pytree
from jaxtyping import Float, Int

from common.data.batches import Batch
from common.params import ModelConfig, init
from common.training import learner
from common.training.dropout import masks
from common.training.learner import Arrays
from common.training.options import TrainConfig
from common.training.recipe import PLAIN, Recipe, learning_rate, weight_of
from common.training.world import ALONE, World
from jax_impl.classifier import CELLS, Reduction, cross_entropy
from jax_impl.layers import canonical, register
from jax_impl.predictor import Predictor, find_device

FRAMEWORK = "jax"
MOMENTS = {"first_moment": "mu", "second_moment": "nu"}  # in optax.adam
VECTORS = "vectors_weight"  # the word vectors that are trained, in the state


def make_deterministic() -> None:
    """Make JAX deterministic on a GPU, too, where this is slower.

    It must be called before JAX first computes.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()


def join() -> AbstractContextManager[World]:
    """A context with the other workers, which torchrun or srun has started."""
    from jax_impl import world  # needed only with workers

    return world.join()


def check(options: TrainConfig) -> None:
    """Raise InputError if the device, or a recurrence for these options, is not available."""
    find_device(options.device)
    CELLS[options.cell].resolve(options.implementation, None, options.dtype)


class Learner(Predictor, learner.Learner):
    """The learner of common/training/learner.py in JAX."""

    def __init__(
        self,
        config: ModelConfig,
        training: TrainConfig,
        vectors: Float[np.ndarray, "V D"],
        parameters: Arrays | None = None,
        dtype: str = "float32",
        recipe: Recipe = PLAIN,
        world: World = ALONE,
    ) -> None:
        parameters = parameters or init(config, training.seed, vectors)
        super().__init__(config, parameters, vectors, training.device, dtype)
        self.compilations = 0
        self.training, self.recipe, self.taken = training, recipe, 0
        self.moments = jax.device_put(self._optimizer().init(self.state), self.device)
        weights = recipe.class_weights
        self.class_weights = (
            None if weights is None else jnp.asarray(self._array(np.array(weights)))
        )
        self.gradient_norm = jnp.zeros(())
        self.world, self.stop_requests, self.exchange = world, jnp.zeros(()), None
        if (shares := training.shares or 1) > 1:
            from jax_impl.world import Exchange

            self.exchange = Exchange(world, shares, self.device.platform)

    def step(self, *shares: Batch, stop_requested: bool = False) -> Float[Array, ""]:
        loss, gradients, rows = self._gradients(shares, stop_requested)
        rate = None
        if self.training.scheduled:
            rate = self._array(np.array(learning_rate(self.training, self.recipe, self.taken)))
        updated = self._update(self.state, self.moments, gradients, rate, rows)
        self.state, self.moments, self.gradient_norm = updated
        self.taken += 1
        return loss

    def gradients(self, *shares: Batch) -> tuple[float, dict[str, np.ndarray]]:
        loss, gradients, rows = self._gradients(shares, dropping=False)
        if rows is not None:
            zeros = jax.tree.map(jnp.zeros_like, self.state)
            gradients = self._put(zeros, gradients, jnp.asarray(rows))
        return float(loss), self._named(gradients)

    def _optimizer(self, rate: Any = None) -> optax.GradientTransformation:
        """The optimizer with this learning rate, by default --learning-rate."""
        rate = self.training.learning_rate if rate is None else rate
        return optax.adam(rate, *self.training.betas, self.training.eps)

    def _rows(self, batch: Batch) -> Int[np.ndarray, " K"] | None:
        """The rows of the word vectors that a step changes; a number past the end is padding."""
        if not self.config.train_vectors:
            return None
        rows = np.full(self._padded(len(batch.distinct)), self.config.vocabulary_size)
        rows[: batch.num_distinct] = batch.distinct[: batch.num_distinct]
        return rows

    def _gradients(
        self, shares: Sequence[Batch], stop_requested: bool = False, dropping: bool = True
    ) -> tuple[Float[Array, ""], nnx.State, Int[np.ndarray, " K"] | None]:
        """The loss of a batch, its gradients and the rows of trained word vectors that they belong
        to; a row number past the end is padding."""
        if self.exchange is None:
            [batch] = shares
            result = self._share(batch, self.state, self.frozen, dropping=dropping)
            return *result, self._rows(batch)
        rows = size = None
        places: list[Any] = [None] * len(shares)
        if self.config.train_vectors:
            named = [share.distinct[: share.num_distinct] for share in shares]
            union, places = self.world.union(named)
            size = 1 << len(union).bit_length()  # few sizes: XLA compiles the update for each
            beyond = np.full(size - len(union), self.config.vocabulary_size)
            rows = np.append(union, beyond)
        mine = []
        copies = {self.device: (self.state, self.frozen)}
        for number, (share, place) in enumerate(zip(shares, places, strict=True)):
            device = self.exchange.device(number)
            if device not in copies:
                copies[device] = jax.device_put(copies[self.device], device)
            loss, gradients = self._share(share, *copies[device], "sum", dropping)
            counts = self._array(np.array([weight_of(share.labels, self.recipe), stop_requested]))
            if place is not None:
                padding = np.full(self._padded(len(share.distinct)) - len(place), size)
                gradients = self._among(gradients, np.append(place, padding), size)
            mine.append(self._flat(loss, counts, gradients))
        loss, self.stop_requests, gradients = self._split(self.exchange(mine), self.state, rows)
        return loss, gradients, rows

    def _share(
        self,
        batch: Batch,
        state: nnx.State,
        frozen: nnx.State,
        reduction: Reduction = "mean",
        dropping: bool = True,
    ) -> tuple[Float[Array, ""], nnx.State]:
        dropped = masks(self.config, self.training, batch, self.taken) if dropping else {}
        dropout_masks = {name: self._array(mask) for name, mask in dropped.items()}
        arguments = dropout_masks, self._ratios(batch), *self._arrays(batch), batch.labels
        return self._backward(state, frozen, reduction, *arguments)

    @partial(jax.jit, static_argnums=(0, 3))
    def _among(self, gradients: nnx.State, place: Int[Array, " K"], size: int) -> nnx.State:
        """The gradients, with that of the word vectors scattered to `size` rows, at `place`."""
        part: Any = gradients[VECTORS]
        whole = jnp.zeros((size, self.config.input_size), part[...].dtype)
        whole = whole.at[place].set(part[...], mode="drop")
        return nnx.State({**gradients, VECTORS: part.replace(whole)})

    @partial(jax.jit, static_argnums=0)
    def _flat(
        self, loss: Float[Array, ""], counts: Float[Array, "2"], gradients: nnx.State
    ) -> Float[Array, " P"]:
        """All values, concatenated to one vector."""
        return jnp.concatenate([loss[None], counts, ravel_pytree(gradients)[0]])

    @partial(jax.jit, static_argnums=0)
    def _split(
        self, total: Float[Array, " P"], state: nnx.State, rows: Int[Array, " K"] | None
    ) -> tuple[Float[Array, ""], Float[Array, ""], nnx.State]:
        """The mean loss, the requests and the mean gradients from the sum of `_flat` vectors."""
        loss, weight, stop_requests = total[:3]
        like = state if rows is None else self._take(state, rows)
        unravel: Any = ravel_pytree(like)[1]
        return loss / weight, stop_requests, unravel(total[3:] / weight)

    @partial(jax.jit, static_argnums=(0, 3))
    def _backward(
        self,
        state: nnx.State,
        frozen: nnx.State,
        reduction: Reduction,
        dropped: dict[str, Array],
        ratios: Float[Array, "T B E"] | None,
        *arrays: Array,
    ) -> tuple[Float[Array, ""], nnx.State]:
        """The loss and its gradients; that of trained word vectors has only the batch's rows."""
        self.compilations += 1  # runs when JAX traces this, once for each shape of a batch
        distinct, *inputs, labels = arrays
        if self.config.train_vectors:
            state, distinct = self._take(state, distinct), jnp.arange(len(distinct))

        def loss(state: nnx.State) -> Float[Array, ""]:
            logits = self._logits(state, frozen, distinct, *inputs, dropped, ratios)
            return cross_entropy(logits, labels, self.class_weights, reduction)

        value, gradients = jax.value_and_grad(loss)(state)
        if self.config.train_vectors:
            rows: Any = gradients[VECTORS]
            missing = self._padded(len(distinct)) - len(distinct)
            whole = jnp.pad(rows[...], ((0, missing), (0, 0)))
            gradients = nnx.State({**gradients, VECTORS: rows.replace(whole)})
        return value, gradients

    # Separate from the gradients, so that it is compiled only once or, with trained vectors, for
    # each size of `_padded`.
    @partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def _update(
        self,
        state: nnx.State,
        moments: optax.OptState,
        gradients: nnx.State,
        rate: Float[Array, ""] | None,
        rows: Int[Array, " K"] | None,
    ) -> tuple[nnx.State, optax.OptState, Float[Array, ""]]:
        norm = optax.tree.norm(gradients)
        if (clip_norm := self.training.clip_norm) is not None:
            # As torch.nn.utils.clip_grads_with_norm_ does; optax.clip_by_global_norm has no 1e-6.
            scale = jnp.minimum(clip_norm / (norm + 1e-6), 1)
            gradients = jax.tree.map(lambda gradient: gradient * scale, gradients)
        optimizer, whole = self._optimizer(rate), (state, moments)
        if rows is not None:
            take = partial(self._take, rows=rows)
            state, moments = jax.tree.map(take, whole, is_leaf=self._is_state)
        updates, moments = optimizer.update(gradients, moments, state)
        state = optax.apply_updates(state, updates)
        if rows is not None:
            put = partial(self._put, rows=rows)
            state, moments = jax.tree.map(put, whole, (state, moments), is_leaf=self._is_state)
        return state, moments, norm

    def _read(self, kind: str) -> dict[str, np.ndarray]:
        if kind in MOMENTS:
            return self._named(optax.tree.get(self.moments, MOMENTS[kind]))
        return self._named(self.state)

    def _write(self, kind: str, values: Arrays) -> None:
        model = nnx.merge(self.graph, self.state, self.frozen)
        register(model, values, model.vectors[...].dtype)
        state = jax.device_put(nnx.state(model, nnx.Param), self.device)
        if kind in MOMENTS:
            new = {MOMENTS[kind]: state, "count": jnp.asarray(self.taken, jnp.int32)}
            self.moments = optax.tree.set(self.moments, **new)
        else:
            self.state = state

    def _named(self, state: Any) -> dict[str, np.ndarray]:
        model = nnx.merge(self.graph, state, self.frozen)
        return {name: np.array(value) for name, value in canonical(model, model.names).items()}

    @staticmethod
    def _padded(count: int) -> int:
        """The number of rows to which an update of `count` word vectors is padded; few sizes occur,
        because XLA compiles the update for each."""
        return 1 << max(11, (count - 1).bit_length())

    @staticmethod
    def _is_state(tree: Any) -> bool:
        return isinstance(tree, nnx.State)

    @staticmethod
    def _take(state: Any, rows: Int[Array, " K"]) -> Any:
        """The state with only these rows of the word vectors; anything else unchanged."""
        if not Learner._is_state(state):
            return state
        vectors = state[VECTORS]
        taken = vectors[...].at[rows].get(mode="clip")
        return nnx.State({**state, VECTORS: vectors.replace(taken)})

    @staticmethod
    def _put(state: Any, changed: Any, rows: Int[Array, " K"]) -> Any:
        """`changed` with all word vectors of the state, of which these rows are replaced."""
        if not Learner._is_state(state):
            return changed
        vectors = state[VECTORS]
        updated = vectors[...].at[rows].set(changed[VECTORS][...], mode="drop")
        return nnx.State({**changed, VECTORS: vectors.replace(updated)})
