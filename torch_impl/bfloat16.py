"""Products in bfloat16, as `scan` computes them. Its twin is jax_impl/bfloat16.py.

A product's factors are `rounded`, and so is the gradient of its result, which is a factor of the
products in the backward pass. All factors are bfloat16; all sums are float32.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from torch_impl.private import is_forward_mode


class Rounded(torch.autograd.Function):
    """The functions `rounded` and `rounded_back`, forward and backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, forward: bool, back: bool) -> Tensor:
        return x.bfloat16().to(x.dtype) if forward else x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.back = inputs[2]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        return rounded(gradient) if ctx.back else gradient, None, None


class RoundedAlong(Rounded):
    """The same with forward mode, which torch.compile does not support."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return rounded(tangent) if ctx.back else tangent.view_as(tangent)


def rounded(x: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """x rounded to bfloat16; the gradient is unchanged."""
    return (RoundedAlong if is_forward_mode() else Rounded).apply(x, True, False)


def rounded_back(x: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """x unchanged, a product of rounded factors; its gradient, a factor of others, is rounded."""
    return (RoundedAlong if is_forward_mode() else Rounded).apply(x, False, True)
