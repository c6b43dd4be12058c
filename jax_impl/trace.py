"""The recurrent layer with its intermediate values at each step. Its twin is torch_impl/trace.py.

It explains a model, and does not train it: it calls a cell's step in a loop and returns gates,
states and gradients.
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
    perturbations: Float[Array, "R T B H"],
    *,
    reset_after: bool,
) -> dict[str, Float[Array, "R T B H"]]:
    """The intermediate values of the last layer at every time step.

    Returns "states", the state after each step, and the values that the step returns by name, for a
    GRU z, r and n. At padding the states do not change and the other values are undefined. The
    perturbations are added to the states before the next step; the gradient with respect to
    perturbations of zero is the gradient with respect to the states.
    """
    cell = CELLS[cell_of(parameters)]
    layers, directions = structure(parameters)
    last = f"{cell.name}.{layers - 1}."
    if layers > 1:
        below = {name: p for name, p in parameters.items() if not name.startswith(last)}
        call = LayerCall(x, lengths=lengths, reset_after=reset_after)
        x, _ = run(cell, below, call, implementation=cell.traceable)
    mask = within(lengths, len(x))[..., None]
    values = []
    for i, direction in enumerate(directions):
        weight_ih, weight_hh, bias_ih, *hidden = cell.weights(parameters, layers - 1, direction)
        a, h0 = project(x, weight_ih, bias_ih), jnp.zeros_like(perturbations[i, 0])
        options = {"reverse": direction == "backward", "reset_after": reset_after}
        weights = weight_hh, *hidden
        _, traced = unroll(cell.step, a, mask, h0, weights, None, perturbations[i], **options)
        values.append(traced)
    return {name: jnp.stack([each[name] for each in values]) for name in values[0]}


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
    """The intermediate values of a classifier on a batch, through all layers.

    Returns the result of `trace`, logits [B, C], and two gradients for the class in labels, which
    are zero where the label is NO_LABEL and at padding:
        influence [T, B]       the gradient of that class's logit with respect to each word's vector
                               (and ratios), multiplied by them
        d_states [R, T, B, H]  the gradient of each review's cross-entropy with respect to the
                               states
    """
    x = parameters.get("vectors.weight", vectors)[distinct][tokens]
    x = x if ratios is None else jnp.concatenate([x, ratios], -1)
    _, directions = structure(parameters)
    cell = CELLS[cell_of(parameters)]
    size = parameters[f"{cell.name}.0.forward.weight_hh"].shape[1]
    shape = (len(directions), *tokens.shape, cell.spec.states * size)
    perturbations = jnp.zeros(shape, x.dtype)

    def logit_and_loss(
        x: Float[Array, "T B D"], perturbations: Float[Array, "R T B H"]
    ) -> tuple[tuple[Float[Array, ""], Float[Array, ""]], dict[str, Array]]:
        values = trace(parameters, x, lengths, perturbations, reset_after=config.reset_after)
        states = values["states"][..., :size]
        h_last = jnp.stack([each[end] for each, end in zip(states, (-1, 0), strict=False)])
        outputs = jnp.concatenate(list(states), -1)
        outputs = jnp.where(within(lengths, len(outputs))[..., None], outputs, 0)
        features = pool(outputs, h_last, lengths, config.pooling)
        logits = head(parameters, features, relu=config.relu)
        is_label = labels[:, None] == jnp.arange(logits.shape[1])
        loss = -(is_label * jax.nn.log_softmax(logits)).sum()
        return ((is_label * logits).sum(), loss), {**values, "logits": logits}

    _, pull, values = jax.vjp(logit_and_loss, x, perturbations, has_aux=True)
    one, zero = jnp.ones((), x.dtype), jnp.zeros((), x.dtype)
    d_x, _ = pull((one, zero))
    _, d_states = pull((zero, one))
    mask = within(lengths, len(tokens))
    return {
        **values,
        "influence": jnp.where(mask, (d_x * x).sum(axis=-1), 0),
        "d_states": jnp.where(mask[..., None], d_states, 0),
    }
