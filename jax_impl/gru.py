"""The GRU in JAX/Flax. Its twin is torch_impl/gru.py: the same names in the same order.

    z = sigmoid(x W_z' + b_z + h U_z' + c_z)             update gate: how much is let in
    r = sigmoid(x W_r' + b_r + h U_r' + c_r)             reset gate
    n = tanh(x W_n' + b_n + (r * h) U_n' + c_n)          candidate, reset_after=False (Cho 2014)
    n = tanh(x W_n' + b_n + r * (h U_n' + c_n))          candidate, reset_after=True (cuDNN)
    h <- h + z * (n - h)

`step` is these equations. Around it: layers.py, which knows no cell; `scan`, the fast form that the
framework differentiates; fused.py, the kernel. Shapes are named as in layers.py; W, U, b, c
(weight_ih, weight_hh, bias_ih, bias_hh) hold the three gates one after the other: z, r, n.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, DTypeLike, Float, Int

from common.arguments import check_shape, check_sizes
from common.cells import Cell, Recurrence
from common.params import init_gru
from jax_impl import fused
from jax_impl.layers import (
    Weights,
    as_array,
    by_direction,
    canonical,
    gather,
    loop,
    project,
    register,
    run,
)


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


def scan_direction(
    x: Float[Array, "T B D"] | Float[Array, "K D"],
    tokens: Int[Array, "T B"] | None,
    mask: Bool[Array, "T B 1"],
    weights: Weights,
    h: Float[Array, "B H"],
    *,
    reverse: bool,
    reset_after: bool,
) -> tuple[Float[Array, "B H"], Float[Array, "T B H"]]:
    """`step` in a loop over time, without what can be done for all time steps at once."""
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    size = h.shape[-1]
    U_zr, U_n = (U.T for U in jnp.split(weight_hh, [2 * size]))
    c_n = bias_hh[2 * size :]
    # Hidden biases that are added to the inputs' share are added to its bias.
    hidden = jnp.concatenate([bias_hh[: 2 * size], 0 * c_n]) if reset_after else bias_hh
    rows = jnp.split(project(x, weight_ih, bias_ih + hidden), [2 * size], axis=-1)
    inputs = [gather(each, tokens, mask) for each in rows]

    # What is cheap is computed once more in the backward pass: to keep it costs more time.
    @partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False)
    def one(
        h: Float[Array, "B H"], at: tuple[Float[Array, "B 2H"], Float[Array, "B H"], Array]
    ) -> tuple[Float[Array, "B H"], Float[Array, "B H"]]:
        a_zr, a_n, live = at
        z, r = jnp.split(jax.nn.sigmoid(a_zr + h @ U_zr), 2, axis=-1)
        a_n += r * (h @ U_n + c_n) if reset_after else (r * h) @ U_n
        n = jnp.tanh(a_n)
        h = jnp.where(live, h + z * (n - h), h)
        return h, h

    return jax.lax.scan(one, h, (*inputs, mask), reverse=reverse)


scan = partial(by_direction, scan_direction)

RECURRENCES = {
    "loop": Recurrence(loop(step)),
    "scan": Recurrence(scan),
    "fused": Recurrence(fused.recurrence, fused.available),
}
CELL = Cell("gru", step, RECURRENCES)


def gru(
    parameters: Mapping[str, Array],
    x: Float[Array, "T B D"] | Float[Array, "K D"],
    lengths: Int[Array, " B"],
    h0: Float[Array, "L*R B H"] | None = None,
    *,
    tokens: Int[Array, "T B"] | None = None,
    reset_after: bool = False,
    implementation: str = "auto",
    return_sequences: bool = True,
) -> tuple[Float[Array, "T B R*H"], Float[Array, "L*R B H"]]:
    """A GRU as a pure function of its canonical parameters (see common/params.py).

    x holds the inputs [T, B, D], or, with tokens [T, B], the distinct inputs [K, D] that tokens
    points at. What is read at padding alone (t >= lengths) has no influence, even where it is not a
    number. A direction's first state is h0[layer * R + direction], or zero.

    Returns (outputs, h_last): the last layer's states, zero at padding, and the state of every
    layer and direction after its last time step (its first, for the backward direction). Without
    return_sequences, outputs are left out: they have no time steps.

    Raises ValueError for a shape that does not fit, for lengths that are not in 0..T and tokens
    that are not in 0..K-1, TypeError for a dtype. x, h0 and the parameters have the same dtype.
    float32 and float64 are computed in; of bfloat16 and float16, whatever the implementation, the
    numbers are computed with in float32 and the results rounded once. Lengths and tokens may be of
    any integer dtype. Where their values are not known, as under jax.jit, nothing can be raised: a
    row of the batch with a length or a token out of range has NaN for its states.
    """
    how = (reset_after, implementation, return_sequences)
    return run(CELL, parameters, x, lengths, h0, tokens, *how)


class GRU(nnx.Module):
    """What torch.nn.GRU(batch_first=True) is in PyTorch, with the equations above.

    Example:
        outputs, h_last = GRU(300, 128, bidirectional=True, rngs=nnx.Rngs(0))(x, lengths)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        bidirectional: bool = False,
        reset_after: bool = False,
        implementation: str = "auto",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Parameters are drawn from rngs.params, uniformly in ±1/sqrt(hidden_size).

        Raises ValueError for a size below 1 and for an unknown implementation.
        """
        check_sizes(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        CELL.resolve(implementation)
        self.input_size = input_size
        self.reset_after = reset_after
        self.implementation = implementation
        seed = int(jax.random.randint(rngs.params(), (), 0, 2**31 - 1))
        drawn = init_gru(input_size, hidden_size, num_layers, bidirectional, seed)
        self.names = register(self, drawn, dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        lengths: Int[Array, " B"] | None = None,
        h0: Float[Array, "L*R B H"] | None = None,
    ) -> tuple[Float[Array, "B T R*H"], Float[Array, "L*R B H"]]:
        """As torch.nn.GRU(batch_first=True); lengths, in any order, counts each row's time steps.

        Returns (outputs, h_last): the last layer's states, zero at padding, and the
        state of every layer and direction after its last step. Raises as `gru` does.
        """
        x = as_array("x", x)
        check_shape("x", x, "B", "T", self.input_size)
        rows: Any = np.full(x.shape[0], x.shape[1]) if lengths is None else lengths
        outputs, h_last = gru(
            canonical(self, self.names),
            x.swapaxes(0, 1),
            rows,
            h0,
            reset_after=self.reset_after,
            implementation=self.implementation,
        )
        return outputs.swapaxes(0, 1), h_last
