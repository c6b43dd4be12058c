"""Every GRU in JAX, ours, Flax's and Equinox's, for the parity checks and for speed alike.

A layer is a function like our `gru`: (weights, x, lengths, h0, tokens=, reset_after=,
return_sequences=) -> (outputs, h_last). The weights have the names of its layout.
"""

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
from comparison.implementations import EVERY, Case, Implementation, Result, in_layout, part

Layer = Callable[..., tuple[Any, Array]]
CELLS = jax_impl.classifier.CELLS
OURS = CELLS["gru"].implementations()
Weights = Mapping[str, Array]


# One layer and direction of other people's GRU: (its weights, reverse, x, h0, lengths) -> (last
# state, outputs).


def linen_rnn(
    weights: dict[str, Array], reverse: bool, x: Array, h0: Array, lengths: Array
) -> tuple[Array, Array]:
    """flax.linen.RNN of flax.linen.GRUCell."""
    cell = linen.GRUCell(h0.shape[-1])
    rnn = linen.RNN(cell, time_major=True, return_carry=True, reverse=reverse, keep_order=True)
    params = {"params": {"cell": traverse_util.unflatten_dict(weights, sep="/")}}
    found: Any = rnn.apply(params, x, initial_carry=h0, seq_lengths=lengths)
    return found


def nnx_rnn(
    weights: dict[str, Array], reverse: bool, x: Array, h0: Array, lengths: Array
) -> tuple[Array, Array]:
    """flax.nnx.RNN of flax.nnx.GRUCell, which has no hidden bias for n: that has to be zero."""
    cell = nnx.GRUCell(x.shape[-1], h0.shape[-1], rngs=nnx.Rngs(0))
    nnx.update(cell, traverse_util.unflatten_dict(weights, sep="/"))
    rnn = nnx.RNN(cell, time_major=True, return_carry=True, reverse=reverse, keep_order=True)
    return rnn(x, initial_carry=h0, seq_lengths=lengths)


def equinox_scan(
    weights: dict[str, Array], reverse: bool, x: Array, h0: Array, lengths: Array
) -> tuple[Array, Array]:
    """equinox.nn.GRUCell in lax.scan, as Equinox's users write it."""
    import equinox as eqx

    cell = eqx.nn.GRUCell(x.shape[-1], h0.shape[-1], key=jax.random.key(0))
    cell = eqx.tree_at(lambda cell: [getattr(cell, n) for n in weights], cell, [*weights.values()])

    def step(h: Array, x_t: tuple[Array, Array]) -> tuple[Array, Array]:
        t, x = x_t
        h = jnp.where((t < lengths)[:, None], jax.vmap(cell)(x, h), h)
        return h, h

    return jax.lax.scan(step, h0, (jnp.arange(len(x)), x), reverse=reverse)


def linen_simple(
    weights: dict[str, Array], reverse: bool, x: Array, h0: Array, lengths: Array
) -> tuple[Array, Array]:
    """flax.linen.RNN of flax.linen.SimpleCell, the tanh RNN; canonical weights."""
    W, U, b, c = (weights[name] for name in GRU_PARAMETERS)
    cell = linen.SimpleCell(h0.shape[-1])
    rnn = linen.RNN(cell, time_major=True, return_carry=True, reverse=reverse, keep_order=True)
    params = {"params": {"cell": {"i": {"kernel": W.T, "bias": b + c}, "h": {"kernel": U.T}}}}
    found: Any = rnn.apply(params, x, initial_carry=h0, seq_lengths=lengths)
    return found


def stacked(scope: str, rnn: Callable[..., tuple[Array, Array]]) -> Layer:
    """A layer of one of these, for each layer and direction; scope: how its weights' names start.

    Flax's RNN wants a step and a word in each row. A row without words is given one, and its
    results are replaced by what they have to be.
    """

    def layer(
        weights: Weights, x: Array, lengths: Array, h0: Array, *, tokens: Array | None, **_: Any
    ) -> tuple[Array, Array]:
        layers, directions = structure(name.replace("/", ".") for name in weights)
        x = x if tokens is None else x[tokens]
        steps = len(x)
        x = x if steps else jnp.zeros((1, *x.shape[1:]), x.dtype)
        words = jnp.arange(len(x))[:, None, None] < lengths[:, None]
        h_last: list[Array] = []
        for number in range(layers):
            outputs = []
            for direction in directions:
                prefix = scope.format(layer=number, direction=direction)
                cell = {n.removeprefix(prefix): v for n, v in part(weights, prefix).items()}
                first, reverse = h0[len(h_last)], direction == "backward"
                last, after = rnn(cell, reverse, x, first, jnp.maximum(lengths, 1))
                h_last.append(jnp.where(lengths[:, None] > 0, last, first))
                outputs.append(jnp.where(words, after, 0))
            x = jnp.concatenate(outputs, axis=-1)
        return x[:steps], jnp.stack(h_last)

    return layer


linen_gru, nnx_gru, equinox_gru = (
    stacked(FORMATS[layout].scope, rnn)
    for layout, rnn in (("linen", linen_rnn), ("nnx", nnx_rnn), ("equinox", equinox_scan))
)


# The parity checks.


def compute(case: Case, weights: dict[str, np.ndarray], layer: Layer) -> Result:
    """Results and gradients of a layer and the classifier's head on top of it, under jax.jit."""
    with jax.enable_x64(case.x.dtype == np.float64):
        leaves = {"x": case.x, **weights, **case.head}
        if case.h0 is not None:
            leaves["h0"] = case.h0
        batch = (case.lengths, case.tokens, case.labels, case.d_outputs, case.d_h_last)
        results, gradients = _compute(leaves, *batch, layer, case.directions, case.reset_after)
        results |= {f"d {name}": gradient for name, gradient in gradients.items()}
        return {name: np.asarray(value) for name, value in results.items()}


# Compiled once for cases of the same shapes.
@partial(jax.jit, static_argnames=("layer", "directions", "reset_after"))
def _compute(
    leaves: dict[str, Array],
    lengths: Array,
    tokens: Array | None,
    labels: Array,
    d_outputs: Array,
    d_h_last: Array,
    layer: Layer,
    directions: int,
    reset_after: bool,
) -> tuple[dict[str, Array], dict[str, Array]]:
    def objective(leaves: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        outputs, h_last = layer(
            *(leaves, leaves["x"], lengths, leaves.get("h0")),
            tokens=tokens,
            reset_after=reset_after,
        )
        logits = jax_impl.classifier.head(leaves, h_last[-directions:])
        loss = jax_impl.classifier.cross_entropy(logits, labels)
        value = loss + (outputs * d_outputs).sum() + (h_last * d_h_last).sum()
        return value, {"outputs": outputs, "h_last": h_last, "logits": logits, "loss": loss}

    gradients, results = jax.grad(objective, has_aux=True)(leaves)
    return results, gradients


def jax_cell(cell: str, implementation: str) -> Implementation:
    """jax_impl's cell of this name, in one of its implementations."""
    layer = partial(jax_impl.layers.run, CELLS[cell], implementation=implementation)
    name = f"jax {implementation if cell == 'gru' else cell}"
    return Implementation(
        name, lambda case: compute(case, case.weights, layer), dtypes=EVERY, cell=cell
    )


def jax_gru(implementation: str) -> Implementation:
    """jax_impl's GRU."""
    return jax_cell("gru", implementation)


def flax_simple_cell() -> Implementation:
    """flax.linen.SimpleCell, the tanh RNN."""
    layer = stacked("rnn.{layer}.{direction}.", linen_simple)

    def run(case: Case) -> Result:
        h0 = np.zeros_like(case.d_h_last) if case.h0 is None else case.h0
        return compute(replace(case, h0=h0), case.weights, layer)

    return Implementation("flax.linen.SimpleCell", run, cell="rnn")


def flax_cells() -> list[Implementation]:
    """flax.linen.GRUCell and flax.nnx.GRUCell, the latter without a hidden bias for n."""

    def without_bias(case: Case) -> bool:
        hidden = [np.split(p, 3)[2] for n, p in case.parameters.items() if n.endswith("bias_hh")]
        return case.reset_after and not np.any(hidden)

    linen = in_layout("linen", partial(compute, layer=linen_gru))
    nnx = in_layout("nnx", partial(compute, layer=nnx_gru))
    return [
        Implementation("flax.linen.GRUCell", linen, supports=lambda case: case.reset_after),
        Implementation("flax.nnx.GRUCell", nnx, supports=without_bias, lacks=("bias_hh",)),
    ]


# Speed.


def timed(
    layer: Layer, weights: Any, backward: bool, x: Any, rows: Any, lengths: Any, *others: Any
) -> Callable[[], object]:
    """One forward, or forward and backward, of a layer on x[rows], compiled.

    rows may be None, for x itself. others: h0 and tokens.
    """

    def last(weights: Any, x: Array, rows: Any, lengths: Array, h0: Any, tokens: Any) -> Array:
        x = x if rows is None else x[rows]
        return layer(weights, x, lengths, h0, tokens=tokens, return_sequences=False)[1]

    if backward:
        compiled = jax.jit(jax.grad(lambda *arguments: last(*arguments).sum()))
    else:
        compiled = jax.jit(last)
    arguments = jax.device_put((weights, x, rows, lengths, *others))
    return lambda: jax.block_until_ready(compiled(*arguments))
