"""The fast form of the GRU that PyTorch differentiates. Its twin is jax_impl/scan.py.

It computes the same as `step` in gru.py. The terms that do not depend on the state are computed for
all time steps at once, before a Python loop computes the rest. Products may be rounded to bfloat16.
Shapes are named as in layers.py.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from common.cells import LayerCall
from common.params import ProductDtype
from torch_impl.bfloat16 import rounded, rounded_back
from torch_impl.layers import LayerOutput, Restart, Weights, by_direction, gather, project


def hoisted_step(
    a_zr: Float[Tensor, "B 2H"],
    a_n: Float[Tensor, "B H"],
    h: Float[Tensor, "B H"],
    U_zr: Float[Tensor, "H 2H"],
    U_n: Float[Tensor, "H H"],
    c_n: Float[Tensor, " H"],
    *,
    reset_after: bool,
    product_dtype: ProductDtype = "float32",
) -> Float[Tensor, "B H"]:
    """`step` without the terms that `hoist` computes for all time steps at once."""
    addmm = rounding if product_dtype == "bfloat16" else torch.addmm
    z, r = torch.sigmoid(addmm(a_zr, h, U_zr)).chunk(2, dim=-1)
    if reset_after:
        n = torch.tanh(a_n + r * addmm(c_n, h, U_n))
    else:
        n = torch.tanh(addmm(a_n, r * h, U_n))
    return torch.lerp(h, n, z)  # h + z * (n - h)


def rounding(
    a: Float[Tensor, "*N"], h: Float[Tensor, "B H"], U: Float[Tensor, "H N"]
) -> Float[Tensor, "B N"]:
    """a + h U with h rounded to bfloat16; U is rounded already."""
    return a + rounded_back(rounded(h) @ U)


def hoist(
    weights: Weights, *, reset_after: bool
) -> tuple[Float[Tensor, " 3H"], Float[Tensor, "H 2H"], Float[Tensor, "H H"], Float[Tensor, " H"]]:
    """Returns (bias, U_zr', U_n', c_n). bias is the sum of the input biases and those hidden biases
    that are only added."""
    _, weight_hh, bias_ih, bias_hh = weights
    size = weight_hh.shape[-1]
    U_zr, U_n = weight_hh.split([2 * size, size])
    c_n = bias_hh[2 * size :]
    hidden = torch.cat([bias_hh[: 2 * size], torch.zeros_like(c_n)]) if reset_after else bias_hh
    return bias_ih + hidden, U_zr.T, U_n.T, c_n


def scan_direction(
    call: LayerCall,
    mask: Bool[Tensor, "T B 1"],
    weights: Weights,
    h: Float[Tensor, "B H"],
    restart: Restart | None,
    *,
    reverse: bool,
) -> tuple[Float[Tensor, "B H"], Float[Tensor, "T B H"]]:
    """`hoisted_step` in a loop over time."""
    size = h.shape[-1]
    bias, U_zr, U_n, c_n = hoist(weights, reset_after=call.reset_after)
    if call.product_dtype == "bfloat16":
        U_zr, U_n = rounded(U_zr), rounded(U_n)
        a = bias + rounded_back(
            project(rounded(call.x), rounded(weights[0]), torch.zeros_like(bias))
        )
    else:
        a = project(call.x, weights[0], bias)
    rows = a.split([2 * size, size], dim=-1)
    inputs = [gather(each, call.tokens, mask) for each in rows]
    a_zr, a_n, live = (each.unbind() for each in (*inputs, mask))
    begin = () if restart is None else restart[0].unbind()
    states = [h] * len(live)
    options: Any = {"reset_after": call.reset_after, "product_dtype": call.product_dtype}
    for t in reversed(range(len(live))) if reverse else range(len(live)):
        if restart is not None:
            h = torch.where(begin[t], restart[1], h)
        after = hoisted_step(a_zr[t], a_n[t], h, U_zr, U_n, c_n, **options)
        h = states[t] = torch.where(live[t], after, h)
    return h, torch.stack(states) if states else h.new_zeros(0, *h.shape)


def scan(call: LayerCall) -> LayerOutput:
    """The recurrence: all directions of a layer by `scan_direction`."""
    return by_direction(scan_direction, call)
