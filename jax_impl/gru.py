"""The GRU in JAX/Flax. Its twin is torch_impl/gru.py: the same names in the same order.

    z = sigmoid(x W_z' + b_z + h U_z' + c_z)             update gate: the share of the candidate
    r = sigmoid(x W_r' + b_r + h U_r' + c_r)             reset gate
    n = tanh(x W_n' + b_n + (r * h) U_n' + c_n)          candidate, reset_after=False (Cho 2014)
    n = tanh(x W_n' + b_n + r * (h U_n' + c_n))          candidate, reset_after=True (cuDNN)
    h <- h + z * (n - h)

`step` computes these equations. layers.py applies a step to all time steps, directions and layers,
whatever the cell. scan.py is the fast form that the framework differentiates, fused.py calls the
CPU kernel, cuda.py the GPU's. Shapes are named as in layers.py; W, U, b, c (weight_ih, weight_hh,
bias_ih, bias_hh) hold the blocks of the three gates in the order z, r, n.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from common.arguments import product_dtype
from common.cells import Cell, LayerCall, Recurrence
from common.params import CELLS
from jax_impl import cuda, fused
from jax_impl.layers import loop, run
from jax_impl.scan import scan


def step(
    a: Float[Array, "B 3H"],
    h: Float[Array, "B H"],
    weight_hh: Float[Array, "3H H"],
    bias_hh: Float[Array, " 3H"],
    *,
    reset_after: bool,
) -> tuple[Float[Array, "B H"], dict[str, Float[Array, "B H"]]]:
    """One time step, from a = x W' + b: the next state, and the gates z, r and the candidate n."""
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


RECURRENCES = {
    "loop": Recurrence(loop(step)),
    "scan": Recurrence(scan, lambda device, dtype, size: True),
    "cuda": Recurrence(partial(fused.recurrence, gpu=True), cuda.available, proven=cuda.proven),
    "fused": Recurrence(fused.recurrence, fused.available, True),
}
CELL = Cell(CELLS["gru"], step, RECURRENCES)


def gru(
    parameters: Mapping[str, Array],
    x: Float[Array, "T B D"] | Float[Array, "K D"],
    lengths: Int[Array, " B"],
    h0: Float[Array, "L*R B H"] | None = None,
    *,
    tokens: Int[Array, "T B"] | None = None,
    resets: Bool[Array, "T B"] | None = None,
    h_reset: Float[Array, "L*R B H"] | None = None,
    reset_after: bool = False,
    implementation: str = "auto",
    return_sequences: bool = True,
    bfloat16: bool = False,
) -> tuple[Float[Array, "T B R*H"], Float[Array, "L*R B H"]]:
    """A GRU as a pure function of its canonical parameters (see common/params.py).

    x contains the inputs [T, B, D] or, with tokens [T, B], the distinct inputs [K, D] that tokens
    index. Inputs that occur only at padding (t >= lengths) have no influence, even if they are NaN.
    The initial state of a direction is h0[layer * R + direction], by default zero.

    resets [T, B] are true where a new sequence begins within a row: no state passes between that
    step and the one before it, in either direction. The sequence starts from h_reset, by default
    h0, by default zero. At padding, resets have no influence.

    With bfloat16, the factors of all matrix products, forward and backward, are rounded to bfloat16
    (to nearest, ties to even). The products are exact; sums and everything else are float32.

    Returns (outputs, h_last): the last layer's states, zero at padding, and the state of every
    layer and direction after its last time step (the first one, for the backward direction).
    Without return_sequences, outputs have no time steps.

    Raises ValueError for shapes that do not match, for lengths outside 0..T and tokens outside
    0..K-1, and TypeError for a wrong dtype. x, h0 and the parameters have the same dtype. float32
    and float64 are computed in that dtype. Every implementation computes bfloat16 and float16 in
    float32 and rounds the results once. Lengths and tokens have any integer dtype. While their
    values are unknown, as under jax.jit, no error is raised; instead, the states of a row with a
    length or token out of range are NaN.
    """
    flags = reset_after, return_sequences, product_dtype(bfloat16)
    call = LayerCall(x, tokens, (), lengths, h0, resets, h_reset, *flags)
    return run(CELL, parameters, call, implementation=implementation)
