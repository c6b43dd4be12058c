"""The recurrent layer with everything in between, step by step. Its twin is torch_impl/trace.py.

For looking at a model, not for training it: a cell's step in a loop, with gates and states returned
and the gradients one asks about.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from common.cells import LayerCall
from common.params import ModelConfig, cell_of, structure
from jax_impl.classifier import CELLS, head, pool
from jax_impl.layers import project, run, unroll, within


def trace(
    parameters: Mapping[str, Array],
    x: Float[Array, "T B D"],
    lengths: Int[Array, " B"],
    nudges: Float[Array, "R T B H"],
    *,
    reset_after: bool,
) -> dict[str, Float[Array, "R T B H"]]:
    """What the last layer does at every time step, from the canonical parameters.

    Returns states, the state after each step, and what the step returns by name: of a GRU z, r and
    n. At padding the states stay and the others mean nothing. nudges are added to the states as
    they are handed on to the next step: pass zeros, and the gradient with respect to them is that
    with respect to the states.
    """
    cell = CELLS[cell_of(parameters)]
    layers, directions = structure(parameters)
    last = f"{cell.name}.{layers - 1}."
    if layers > 1:
        below = {name: p for name, p in parameters.items() if not name.startswith(last)}
        call = LayerCall(x, lengths=lengths, reset_after=reset_after)
        x, _ = run(cell, below, call, implementation=cell.traceable)
    mask = within(lengths, len(x))[..., None]
    found = []
    for i, direction in enumerate(directions):
        weight_ih, weight_hh, bias_ih, *hidden = cell.weights(parameters, layers - 1, direction)
        a, h0 = project(x, weight_ih, bias_ih), jnp.zeros_like(nudges[i, 0])
        how = {"reverse": direction == "backward", "reset_after": reset_after}
        found.append(
            unroll(cell.step, a, mask, h0, (weight_hh, *hidden), None, nudges[i], **how)[1]
        )
    return {name: jnp.stack([each[name] for each in found]) for name in found[0]}


@partial(jax.jit, static_argnames="config")
def explain(
    parameters: Mapping[str, Array],
    vectors: Float[Array, "V D"],
    distinct: Int[Array, " K"],
    tokens: Int[Array, "T B"],
    lengths: Int[Array, " B"],
    labels: Int[Array, " B"],
    *,
    ratios: Float[Array, "T B E"] | None,
    config: ModelConfig,
) -> dict[str, Array]:
    """How a classifier comes to its answers on a batch, step by step; every layer counts.

    Returns what `trace` does, logits [B, C], and two gradients that ask about the class in labels
    (where that is NO_LABEL, they are zero):
        influence [T, B]       gradient x input: of that class's logit with respect to each word's
                               vector (and ratios), times these
        d_states [R, T, B, H]  of each review's own cross-entropy with respect to the states
    Both are zero at padding.
    """
    x = parameters.get("vectors.weight", vectors)[distinct][tokens]
    x = x if ratios is None else jnp.concatenate([x, ratios], -1)
    _, directions = structure(parameters)
    cell = CELLS[cell_of(parameters)]
    size = parameters[f"{cell.name}.0.forward.weight_hh"].shape[1]
    shape = (len(directions), *tokens.shape, cell.spec.states * size)
    nudges = jnp.zeros(shape, x.dtype)

    def asked_about(
        x: Float[Array, "T B D"], nudges: Float[Array, "R T B H"]
    ) -> tuple[tuple[Float[Array, ""], Float[Array, ""]], dict[str, Array]]:
        found = trace(parameters, x, lengths, nudges, reset_after=config.reset_after)
        states = found["states"][..., :size]
        h_last = jnp.stack([each[end] for each, end in zip(states, (-1, 0), strict=False)])
        outputs = jnp.concatenate(list(states), -1)
        outputs = jnp.where(within(lengths, len(outputs))[..., None], outputs, 0)
        features = pool(outputs, h_last, lengths, config.pooling)
        logits = head(parameters, features, relu=config.relu)
        asked = labels[:, None] == jnp.arange(logits.shape[1])
        loss = -(asked * jax.nn.log_softmax(logits)).sum()
        return ((asked * logits).sum(), loss), {**found, "logits": logits}

    _, pull, found = jax.vjp(asked_about, x, nudges, has_aux=True)
    one, zero = jnp.ones((), x.dtype), jnp.zeros((), x.dtype)
    d_x, _ = pull((one, zero))
    _, d_states = pull((zero, one))
    mask = within(lengths, len(tokens))
    return {
        **found,
        "influence": jnp.where(mask, (d_x * x).sum(axis=-1), 0),
        "d_states": jnp.where(mask[..., None], d_states, 0),
    }
