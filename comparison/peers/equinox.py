"""equinox.nn.GRUCell in lax.scan, as users of Equinox write it."""

from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from common.convert import FORMATS
from comparison.contenders import Contenders
from comparison.peers.jax import stacked, time_layers


def contenders(variant: str, device: str) -> Contenders:
    """Equinox's contender."""
    return time_layers({"Equinox scan": (stacked(FORMATS["equinox"].scope, rnn), "equinox")})


def rnn(
    weights: Mapping[str, Array], reverse: bool, x: Array, h0: Array, lengths: Array | None
) -> tuple[Array, Array]:
    """One layer and direction, with the arguments of comparison/peers/jax.py."""
    cell = eqx.nn.GRUCell(x.shape[-1], h0.shape[-1], key=jax.random.key(0))
    cell = eqx.tree_at(lambda cell: [getattr(cell, n) for n in weights], cell, [*weights.values()])

    def step(h: Array, x_t: tuple[Array, Array]) -> tuple[Array, Array]:
        t, x = x_t
        after = jax.vmap(cell)(x, h)
        h = after if lengths is None else jnp.where((t < lengths)[:, None], after, h)
        return h, h

    return jax.lax.scan(step, h0, (jnp.arange(len(x)), x), reverse=reverse)
