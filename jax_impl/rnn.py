"""The plain tanh RNN in JAX/Flax, the GRU without its gates. Its twin is torch_impl/rnn.py.

    h <- tanh(x W' + b + h U' + c)

docs/questions.md compares it with the GRU. Shapes are named as in layers.py; G is 1.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from common.cells import Cell, Recurrence
from common.params import CELLS
from jax_impl import fused
from jax_impl.layers import loop


def step(
    a: Float[Array, "B H"],
    h: Float[Array, "B H"],
    weight_hh: Float[Array, "H H"],
    bias_hh: Float[Array, " H"],
    *,
    reset_after: bool,
) -> tuple[Float[Array, "B H"], dict[str, Float[Array, "B H"]]]:
    """One time step, from a = x W' + b: the next state, and no intermediate values."""
    return jnp.tanh(a + h @ weight_hh.T + bias_hh), {}


RECURRENCES = {
    "scan": Recurrence(loop(step)),
    "fused": Recurrence(fused.recurrence, fused.available, True),
}
fused.SCANS["rnn"] = RECURRENCES["scan"].compute
CELL = Cell(CELLS["rnn"], step, RECURRENCES)
