"""The plain tanh RNN in JAX, the GRU without its gates. Its twin is torch_impl/rnn.py.

    h <- tanh(x W' + b + h U' + c)

It is here to be measured against the GRU (docs/questions.md). Names and shapes are those of
jax_impl/gru.py, but for W, U, b, c, which hold one block of H rows in place of three gates.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from common.params import GRU_PARAMETERS, structure
from jax_impl.gru import gather, project, within, without_padding


def scan(
    projections: Float[Array, "T B H"] | Float[Array, "K H"],
    tokens: Int[Array, "T B"] | None,
    weight_hh: Float[Array, "H H"],
    bias_hh: Float[Array, " H"],
    lengths: Int[Array, " B"],
    h0: Float[Array, "B H"],
) -> tuple[Float[Array, "T B H"], Float[Array, "B H"]]:
    """The recurrence as a loop over time; behind the end of a review the state stays."""
    word = within(lengths, len(projections) if tokens is None else len(tokens))[..., None]
    a = projections if tokens is None else gather(projections, tokens, word)

    def step(
        h: Float[Array, "B H"], at: tuple[Float[Array, "B H"], Bool[Array, "B 1"]]
    ) -> tuple[Float[Array, "B H"], Float[Array, "B H"]]:
        a_t, word_t = at
        h = jnp.where(word_t, jnp.tanh(a_t + h @ weight_hh.T + bias_hh), h)
        return h, h

    h, outputs = jax.lax.scan(step, h0, (a, word))
    return jnp.where(word, outputs, 0), h


def rnn(
    parameters: Mapping[str, Array],
    x: Float[Array, "T B D"] | Float[Array, "K D"],
    lengths: Int[Array, " B"],
    *,
    tokens: Int[Array, "T B"] | None = None,
) -> tuple[Float[Array, "T B H"], Float[Array, "L B H"]]:
    """A forward RNN as a pure function of its canonical parameters (see common/params.py).

    Arguments and results are those of `gru`: (outputs, h_last). The first state is zero.
    """
    layers, _ = structure(parameters)
    x = without_padding(x, tokens, lengths)
    h_last = []
    for number in range(layers):
        weight_ih, weight_hh, bias_ih, bias_hh = (
            parameters[f"rnn.{number}.forward.{name}"] for name in GRU_PARAMETERS
        )
        h0 = jnp.zeros((len(lengths), len(weight_hh)), x.dtype)
        projections = project(x, weight_ih, bias_ih)
        x, last = scan(projections, tokens, weight_hh, bias_hh, lengths, h0)
        tokens = None
        h_last.append(last)
    return x, jnp.stack(h_last)
