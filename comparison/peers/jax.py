"""The GRUs in JAX: jax_impl's and Flax's, and functions for those of other libraries."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx, traverse_util
from jax import Array

import jax_impl.classifier
import jax_impl.gru
import jax_impl.layers
from common.convert import FORMATS
from common.params import GRU_PARAMETERS, structure
from comparison.contenders import BFLOAT16_TOLERANCE, Contenders, in_bfloat16, training_of
from comparison.implementations import (
    Case,
    Implementation,
    Inference,
    Layer,
    Result,
    below,
    converted,
    objective,
    peer,
    twin_cell,
    twin_cells,
)
from jax_impl.learner import Learner

CELLS = jax_impl.classifier.CELLS
OURS = CELLS["gru"].implementations()
Weights = Mapping[str, Array]
FLAX_RNN: Any = {"time_major": True, "return_carry": True, "keep_order": True}

# One layer and direction of another library's GRU: (weights, reverse, x, h0, lengths) -> (last
# state, outputs). If lengths is None, there is no padding.


def linen_rnn(
    cell: Any, weights: Weights, reverse: bool, x: Array, h0: Array, lengths: Array | None
) -> tuple[Array, Array]:
    """flax.linen.RNN with a cell of flax.linen."""
    params = {"params": {"cell": traverse_util.unflatten_dict(weights, sep="/")}}
    rnn: Any = linen.RNN(cell(h0.shape[-1]), reverse=reverse, **FLAX_RNN)
    return rnn.apply(params, x, initial_carry=h0, seq_lengths=lengths)


def linen_simple(weights: Weights, *others: Any) -> tuple[Array, Array]:
    """flax.linen.RNN with SimpleCell, the tanh RNN; canonical weights."""
    W, U, b, c = (weights[name] for name in GRU_PARAMETERS)
    return linen_rnn(linen.SimpleCell, {"i/kernel": W.T, "i/bias": b + c, "h/kernel": U.T}, *others)


def nnx_rnn(
    weights: Weights, reverse: bool, x: Array, h0: Array, lengths: Array | None
) -> tuple[Array, Array]:
    """flax.nnx.RNN with GRUCell, which has no hidden bias for n."""
    cell = nnx.GRUCell(x.shape[-1], h0.shape[-1], rngs=nnx.Rngs(0))
    nnx.update(cell, traverse_util.unflatten_dict(weights, sep="/"))
    rnn: Any = nnx.RNN(cell, reverse=reverse, **FLAX_RNN)
    return rnn(x, initial_carry=h0, seq_lengths=lengths)


def stacked(scope: str, rnn: Callable[..., tuple[Array, Array]]) -> Layer:
    """All layers and directions, each computed by `rnn`; scope: the prefix of its weights' names.

    Flax's RNN needs at least one time step and one word per row. Therefore empty rows are padded to
    one word, and their results are replaced by zeros and the first states.
    """

    def layer(
        weights: Weights,
        x: Array,
        lengths: Array | None,
        h0: Array,
        *,
        tokens: Array | None,
        **_: Any,
    ) -> tuple[Array, Array]:
        layers, directions = structure([name.replace("/", ".") for name in weights])
        x = x if tokens is None else x[tokens]
        steps = len(x)
        x = x if steps else jnp.zeros((1, *x.shape[1:]), x.dtype)
        at_least_one, words, stepped = None, jnp.array(True), jnp.array(True)
        if lengths is not None:
            at_least_one, words = jnp.maximum(lengths, 1), lengths[:, None] > 0
            stepped = jnp.arange(len(x))[:, None, None] < lengths[:, None]
        h_last: list[Array] = []
        for number in range(layers):
            outputs = []
            for direction in directions:
                prefix = scope.format(layer=number, direction=direction)
                first, reverse = h0[len(h_last)], direction == "backward"
                last, after = rnn(below(weights, prefix), reverse, x, first, at_least_one)
                h_last.append(jnp.where(words, last, first))
                outputs.append(jnp.where(stepped, after, 0))
            x = jnp.concatenate(outputs, axis=-1)
        return x[:steps], jnp.stack(h_last)

    return layer


linen_gru = stacked(FORMATS["linen"].scope, partial(linen_rnn, linen.GRUCell))
nnx_gru = stacked(FORMATS["nnx"].scope, nnx_rnn)


def timed(
    layer: Layer, weights: Any, backward: bool, x: Any, rows: Any, lengths: Any, *others: Any
) -> Callable[[], object]:
    """A compiled forward pass, or forward and backward, of a layer on x[rows] or, if rows is None,
    on x.

    others: h0 and tokens.
    """

    def last(weights: Any, x: Array, rows: Any, lengths: Array, h0: Any, tokens: Any) -> Array:
        x = x if rows is None else x[rows]
        h_last = layer(weights, x, lengths, h0, tokens=tokens, return_sequences=False)[1]
        return h_last.sum() if backward else h_last

    compiled = jax.jit(jax.grad(last) if backward else last)
    arguments = jax.device_put((weights, x, rows, lengths, *others))
    return lambda: jax.block_until_ready(compiled(*arguments))


def inference(
    layer: Layer, layout: str, weights: Mapping[str, np.ndarray], x: np.ndarray
) -> Callable[[], object]:
    """The last state of x [T, B, D], compiled; only jax_impl's function requires lengths."""
    T, B, _ = x.shape
    lengths = np.full(B, T, np.int32) if layout == "canonical" else None
    h0 = np.zeros((1, B, weights["gru.0.forward.weight_hh"].shape[1]), x.dtype)
    return timed(layer, converted(layout, weights), False, x, None, lengths, h0, None)


def time_layers(layers: dict[str, tuple[Layer, str]]) -> Contenders:
    """Contenders of layers in JAX, from each layer and the layout of its weights."""
    in_inference = {
        name: partial(inference, layer, layout)
        for name, (layer, layout) in layers.items()
        if layout != "canonical"
    }
    return Contenders(training_of(Learner, layers, timed), in_inference)


def contenders(variant: str, device: str) -> Contenders:
    """jax_impl's implementations for the device, and Flax's."""
    layers: dict[str, tuple[Layer, str]] = {
        f"jax {name}": (partial(jax_impl.gru.gru, implementation=name), "canonical")
        for name in CELLS["gru"].implementations(device)
    }
    layers |= {"flax.linen RNN": (linen_gru, "linen"), "flax.nnx RNN": (nnx_gru, "nnx")}
    contenders = time_layers(layers)
    own = partial(jax_impl.gru.gru, reset_after=True)
    lower = partial(inference, partial(own, bfloat16=True), "canonical")
    twins: dict[str, Inference] = {
        "jax_impl.gru": partial(inference, own, "canonical"),
        "jax_impl.gru bfloat16": in_bfloat16(lower),
    }
    tolerances = {"jax_impl.gru bfloat16": BFLOAT16_TOLERANCE}
    in_inference = {**contenders.inference, **twins}
    return replace(contenders, inference=in_inference, tolerances=tolerances)


# The parity checks.


# Cases of the same shapes share the compiled function.
_objective = partial(objective, classifier=jax_impl.classifier)
_gradients = jax.jit(jax.grad(_objective, has_aux=True), static_argnums=(2, 3))


def compute(case: Case, layer: Layer) -> Result:
    """Results and gradients of a layer and the classifier's head on top of it, under jax.jit."""
    with jax.enable_x64(case.x.dtype == np.float64):
        gradients, results = _gradients(case.leaves, case.others, layer, case.reset_after)
        results |= {f"d {name}": gradient for name, gradient in gradients.items()}
        return {name: np.asarray(value) for name, value in results.items()}


jax_cell = partial(twin_cell, jax_impl, compute)


def flax_cells() -> list[Implementation]:
    """flax.linen.GRUCell and, for cases without a hidden bias for n, flax.nnx.GRUCell."""

    def without_bias(case: Case) -> bool:
        hidden = [np.split(p, 3)[2] for n, p in case.parameters.items() if n.endswith("bias_hh")]
        return case.reset_after and not np.any(hidden)

    return [
        peer("flax.linen.GRUCell", "linen", partial(compute, layer=linen_gru)),
        peer(
            "flax.nnx.GRUCell", "nnx", partial(compute, layer=nnx_gru), without_bias, ("bias_hh",)
        ),
    ]


def flax_simple_cell() -> Implementation:
    """flax.linen.SimpleCell, the tanh RNN."""
    layer = stacked("rnn.{layer}.{direction}.", linen_simple)
    return Implementation(
        "flax.linen.SimpleCell", lambda case: compute(case.with_h0(), layer), cell="rnn", peer=True
    )


def implementations() -> list[Implementation]:
    """jax_impl's GRU in each of its implementations, its other cells, and Flax's GRUs."""
    return [*twin_cells(CELLS, jax_cell), *flax_cells()]
