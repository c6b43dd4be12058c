"""The recurrent layer with everything in between, word by word. Its twin is torch_impl/trace.py.

For looking at a model, not for training it: the equations of jax_impl/gru.py (and rnn.py) one
word after the other, with gates and states returned and the gradients one asks about.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from common.params import GRU_PARAMETERS, cell_of, structure
from jax_impl.classifier import head
from jax_impl.gru import gru, project, within
from jax_impl.rnn import rnn


def gru_step(
    a: Float[Array, "B 3H"],
    h: Float[Array, "B H"],
    weight_hh: Float[Array, "3H H"],
    bias_hh: Float[Array, " 3H"],
    *,
    reset_after: bool,
) -> tuple[Float[Array, "B H"], dict[str, Float[Array, "B H"]]]:
    """One word: the new state, and the gates z, r and the candidate n on the way to it."""
    a_z, a_r, a_n = jnp.split(a, 3, axis=-1)
    U_z, U_r, U_n = jnp.split(weight_hh, 3)
    c_z, c_r, c_n = jnp.split(bias_hh, 3)
    z = jax.nn.sigmoid(a_z + h @ U_z.T + c_z)
    r = jax.nn.sigmoid(a_r + h @ U_r.T + c_r)
    if reset_after:
        n = jnp.tanh(a_n + r * (h @ U_n.T + c_n))
    else:
        n = jnp.tanh(a_n + (r * h) @ U_n.T + c_n)
    return h + z * (n - h), {"z": z, "r": r, "n": n}


def rnn_step(
    a: Float[Array, "B H"],
    h: Float[Array, "B H"],
    weight_hh: Float[Array, "H H"],
    bias_hh: Float[Array, " H"],
    *,
    reset_after: bool,
) -> tuple[Float[Array, "B H"], dict[str, Float[Array, "B H"]]]:
    """One word of the plain RNN, which has nothing in between."""
    return jnp.tanh(a + h @ weight_hh.T + bias_hh), {}


def trace(
    parameters: Mapping[str, Array],
    x: Float[Array, "T B D"],
    lengths: Int[Array, " B"],
    nudges: Float[Array, "R T B H"],
    *,
    reset_after: bool,
) -> dict[str, Float[Array, "R T B H"]]:
    """What the last layer does at every word, from the canonical parameters.

    Returns states, the state after each word, and of a GRU z, r and n. Behind the end of a review
    the states stay and the others mean nothing. nudges are added to the states as they are handed
    on to the next word: pass zeros, and the gradient with respect to them is that with respect to
    the states.
    """
    layers, directions = structure(parameters)
    cell = cell_of(parameters)
    step = gru_step if cell == "gru" else rnn_step
    last = f"{cell}.{layers - 1}."
    if layers > 1:
        below = {name: p for name, p in parameters.items() if not name.startswith(last)}
        if cell == "gru":
            x, _ = gru(below, x, lengths, reset_after=reset_after, implementation="scan")
        else:
            x, _ = rnn(below, x, lengths)
    word = within(lengths, len(x))[..., None]
    every: list[dict[str, Array]] = []
    for i, direction in enumerate(directions):
        weight_ih, weight_hh, bias_ih, bias_hh = (
            parameters[f"{last}{direction}.{name}"] for name in GRU_PARAMETERS
        )
        a = project(x, weight_ih, bias_ih)

        def scanned(
            h: Float[Array, "B H"],
            at: tuple[Float[Array, "B G*H"], Bool[Array, "B 1"], Float[Array, "B H"]],
            weight_hh: Float[Array, "G*H H"] = weight_hh,
            bias_hh: Float[Array, " G*H"] = bias_hh,
        ) -> tuple[Float[Array, "B H"], dict[str, Float[Array, "B H"]]]:
            a_t, word_t, nudge = at
            after, between = step(a_t, h, weight_hh, bias_hh, reset_after=reset_after)
            h = jnp.where(word_t, after, h) + nudge
            return h, {"states": h, **between}

        h0 = jnp.zeros_like(nudges[i, 0])
        reverse = direction == "backward"
        every.append(jax.lax.scan(scanned, h0, (a, word, nudges[i]), reverse=reverse)[1])
    return {name: jnp.stack([found[name] for found in every]) for name in every[0]}


@partial(jax.jit, static_argnames="reset_after")
def explain(
    parameters: Mapping[str, Array],
    vectors: Float[Array, "V D"],
    distinct: Int[Array, " K"],
    tokens: Int[Array, "T B"],
    lengths: Int[Array, " B"],
    labels: Int[Array, " B"],
    *,
    reset_after: bool,
) -> dict[str, Array]:
    """How a classifier comes to its answers on a batch, word by word; every layer counts.

    Returns the last layer's states, z, r and n as `trace` does, logits [B, C], and two gradients
    that ask about the class in labels (where that is NO_LABEL, they are zero):
        influence [T, B]       gradient x input: of that class's logit with respect to each word's
                               vector, times the vector
        d_states [R, T, B, H]  of each review's own cross-entropy with respect to the states
    Both are zero behind the end of a review.
    """
    x = parameters.get("vectors.weight", vectors)[distinct][tokens]
    _, directions = structure(parameters)
    size = parameters["head.weight"].shape[1] // len(directions)
    nudges = jnp.zeros((len(directions), *tokens.shape, size), x.dtype)

    def asked_about(
        x: Float[Array, "T B D"], nudges: Float[Array, "R T B H"]
    ) -> tuple[tuple[Float[Array, ""], Float[Array, ""]], dict[str, Array]]:
        found = trace(parameters, x, lengths, nudges, reset_after=reset_after)
        h_last = jnp.stack(
            [states[end] for states, end in zip(found["states"], (-1, 0), strict=False)]
        )
        logits = head(parameters, h_last)
        asked = labels[:, None] == jnp.arange(logits.shape[1])
        loss = -(asked * jax.nn.log_softmax(logits)).sum()
        return ((asked * logits).sum(), loss), {**found, "logits": logits}

    _, pull, found = jax.vjp(asked_about, x, nudges, has_aux=True)
    one, zero = jnp.ones((), x.dtype), jnp.zeros((), x.dtype)
    d_x, _ = pull((one, zero))
    _, d_states = pull((zero, one))
    word = within(lengths, len(tokens))
    return {
        **found,
        "influence": jnp.where(word, (d_x * x).sum(axis=-1), 0),
        "d_states": jnp.where(word[..., None], d_states, 0),
    }
