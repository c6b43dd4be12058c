"""The GRU in PyTorch. Its twin is jax_impl/gru.py: the same names in the same order.

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

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from common.arguments import check_shape, check_sizes
from common.cells import Cell, Recurrence
from common.params import init_gru
from torch_impl import fused
from torch_impl.layers import (
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
    a: Float[Tensor, "B 3H"],
    h: Float[Tensor, "B H"],
    weight_hh: Float[Tensor, "3H H"],
    bias_hh: Float[Tensor, " 3H"],
    *,
    reset_after: bool,
) -> tuple[Float[Tensor, "B H"], dict[str, Float[Tensor, "B H"]]]:
    """One time step, from a = x W' + b: the next state, and the gates z, r and the candidate n."""
    a_z, a_r, a_n = a.chunk(3, dim=-1)
    U_z, U_r, U_n = weight_hh.chunk(3)
    c_z, c_r, c_n = bias_hh.chunk(3)
    z = torch.sigmoid(a_z + F.linear(h, U_z, c_z))
    r = torch.sigmoid(a_r + F.linear(h, U_r, c_r))
    if reset_after:
        n = torch.tanh(a_n + r * F.linear(h, U_n, c_n))
    else:
        n = torch.tanh(a_n + F.linear(r * h, U_n, c_n))
    return h + z * (n - h), {"z": z, "r": r, "n": n}


def scan_direction(
    x: Float[Tensor, "T B D"] | Float[Tensor, "K D"],
    tokens: Int[Tensor, "T B"] | None,
    mask: Bool[Tensor, "T B 1"],
    weights: Weights,
    h: Float[Tensor, "B H"],
    *,
    reverse: bool,
    reset_after: bool,
) -> tuple[Float[Tensor, "B H"], Float[Tensor, "T B H"]]:
    """`step` in a loop over time, without what can be done for all time steps at once."""
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    size = h.shape[-1]
    U_zr, U_n = (U.T for U in weight_hh.split([2 * size, size]))
    c_n = bias_hh[2 * size :]
    # Hidden biases that are added to the inputs' share are added to its bias.
    hidden = torch.cat([bias_hh[: 2 * size], torch.zeros_like(c_n)]) if reset_after else bias_hh
    rows = project(x, weight_ih, bias_ih + hidden).split([2 * size, size], dim=-1)
    inputs = [gather(each, tokens, mask) for each in rows]
    a_zr, a_n, live = (each.unbind() for each in (*inputs, mask))
    states = [h] * len(live)
    for t in reversed(range(len(live))) if reverse else range(len(live)):
        z, r = torch.sigmoid(torch.addmm(a_zr[t], h, U_zr)).chunk(2, dim=-1)
        if reset_after:
            n = torch.tanh(a_n[t] + r * torch.addmm(c_n, h, U_n))
        else:
            n = torch.tanh(torch.addmm(a_n[t], r * h, U_n))
        h = states[t] = torch.where(live[t], torch.lerp(h, n, z), h)  # lerp: h + z * (n - h)
    return h, torch.stack(states) if states else h.new_zeros(0, *h.shape)


scan = partial(by_direction, scan_direction)

RECURRENCES = {
    "loop": Recurrence(loop(step)),
    "scan": Recurrence(scan),
    "fused": Recurrence(fused.recurrence, fused.available, checks=True),
}
CELL = Cell("gru", step, RECURRENCES)


def gru(
    parameters: Mapping[str, Tensor],
    x: Float[Tensor, "T B D"] | Float[Tensor, "K D"],
    lengths: Int[Tensor, " B"],
    h0: Float[Tensor, "L*R B H"] | None = None,
    *,
    tokens: Int[Tensor, "T B"] | None = None,
    reset_after: bool = False,
    implementation: str = "auto",
    return_sequences: bool = True,
) -> tuple[Float[Tensor, "T B R*H"], Float[Tensor, "L*R B H"]]:
    """A GRU as a pure function of its canonical parameters (see common/params.py).

    x holds the inputs [T, B, D], or, with tokens [T, B], the distinct inputs [K, D] that tokens
    points at. What is read at padding alone (t >= lengths) has no influence, even where it is not a
    number. A direction's first state is h0[layer * R + direction], or zero.

    Returns (outputs, h_last): the last layer's states, zero at padding, and the state of every
    layer and direction after its last time step (its first, for the backward direction). Without
    return_sequences, outputs are left out: they have no time steps.

    Raises ValueError for a shape or a device that does not fit, for lengths that are not in 0..T
    and tokens that are not in 0..K-1, TypeError for a dtype. x, h0 and the parameters have the same
    dtype. float32 and float64 are computed in; of bfloat16 and float16, whatever the
    implementation, the numbers are computed with in float32 and the results rounded once. Under
    torch.autocast, float32 counts as autocast's dtype. Lengths and tokens may be of any integer
    dtype; their values are not looked at where they are not known: while torch.compile traces, and
    under torch.func.vmap. There, in scan and loop, a length beyond T counts as T, one below 0 as 0.
    """
    how = (reset_after, implementation, return_sequences)
    return run(CELL, parameters, x, lengths, h0, tokens, *how)


class GRU(nn.Module):
    """A drop-in for torch.nn.GRU(batch_first=True), with the equations above.

    Example:
        outputs, h_last = GRU(300, 128, bidirectional=True)(x, lengths)
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
    ) -> None:
        """Parameters are drawn with torch's generator, uniformly in ±1/sqrt(hidden_size).

        Raises ValueError for a size below 1 and for an unknown implementation.
        """
        super().__init__()
        check_sizes(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        CELL.resolve(implementation)
        self.input_size = input_size
        self.reset_after = reset_after
        self.implementation = implementation
        seed = int(torch.randint(2**31, ()))
        drawn = init_gru(input_size, hidden_size, num_layers, bidirectional, seed)
        self.names = register(self, drawn, torch.get_default_dtype())

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        lengths: Int[Tensor, " B"] | None = None,
        h0: Float[Tensor, "L*R B H"] | None = None,
    ) -> tuple[Float[Tensor, "B T R*H"], Float[Tensor, "L*R B H"]]:
        """As torch.nn.GRU(batch_first=True); lengths, in any order, counts each row's time steps.

        Returns (outputs, h_last): the last layer's states, zero at padding, and the
        state of every layer and direction after its last step. Raises as `gru` does.
        """
        check_shape("x", as_array("x", x), "B", "T", self.input_size)
        if lengths is None:
            lengths = torch.full(x.shape[:1], x.shape[1], dtype=torch.int32, device=x.device)
        outputs, h_last = gru(
            canonical(self, self.names),
            x.transpose(0, 1),
            lengths,
            h0,
            reset_after=self.reset_after,
            implementation=self.implementation,
        )
        return outputs.transpose(0, 1), h_last
