"""The recurrence on the CPU kernel (kernels/gru.h). Its twin is jax_impl/fused.py.

Forward and backward are written by hand in C++. Here they become operators that PyTorch knows by
name, gru::forward and gru::backward, so that autograd, torch.compile and torch.export take them;
outside of the latter two, `Eager` calls the same functions without the operators' overhead.
One call computes all directions of a layer, with torch.get_num_threads() threads, but never more
than the cores this process may use. What a function needs for one direction, it takes as a list
with one entry a direction.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

import kernels


def available() -> bool:
    """Whether the kernel has been built."""
    return kernels.available()


def recur(
    projections: Float[Tensor, "T B 3H"] | Float[Tensor, "K 3H"],
    tokens: Int[Tensor, "T B"] | None,
    weight_hh: Float[Tensor, "3H H"],
    bias_hh: Float[Tensor, " 3H"],
    lengths: Int[Tensor, " B"],
    h0: Float[Tensor, "B H"],
    *,
    reverse: bool,
    reset_after: bool,
) -> tuple[Float[Tensor, "T B H"], Float[Tensor, "B H"]]:
    """One direction: (outputs, h_last), as scan() in gru.py."""
    outputs, h_last = recur_all(
        [projections],
        tokens,
        [weight_hh],
        [bias_hh],
        lengths,
        h0[None],
        reverse=[reverse],
        reset_after=reset_after,
    )
    return outputs, h_last[0]


def recur_all(
    projections: Sequence[Float[Tensor, "T B 3H"]] | Sequence[Float[Tensor, "K 3H"]],
    tokens: Int[Tensor, "T B"] | None,
    weight_hh: Sequence[Float[Tensor, "3H H"]],
    bias_hh: Sequence[Float[Tensor, " 3H"]],
    lengths: Int[Tensor, " B"],
    h0: Float[Tensor, "R B H"],
    *,
    reverse: Sequence[bool],
    reset_after: bool,
    every_step: bool = True,
) -> tuple[Float[Tensor, "T B R*H"], Float[Tensor, "R B H"]]:
    """All directions (one or two) of a layer at once: (outputs, h_last).

    Without every_step, outputs are not written, and come back empty.

    Raises ValueError where a length is not in 0..T, IndexError where a token is not in 0..K-1.
    """
    inputs = (*projections, *weight_hh, *bias_hh, h0)
    how = (
        None if tokens is None else tokens.to(torch.int32).contiguous(),
        lengths.to(torch.int32).contiguous(),
        list(reverse),
        reset_after,
        every_step,
        torch.is_grad_enabled() and any(each.requires_grad for each in inputs),
    )
    arrays = [each.contiguous() for each in inputs]
    if torch.compiler.is_compiling():
        outputs, h_last, _ = forward_operator(*parts(arrays), *how)
    else:
        outputs, h_last, _ = Eager.apply(*how, *arrays)
    return outputs, h_last


def parts(arrays: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """projections, weight_hh and bias_hh, each a list, and h0, from all of them in a row."""
    *lists, h0 = arrays
    R = len(lists) // 3
    return list(lists[:R]), list(lists[R : 2 * R]), list(lists[2 * R :]), h0


def forward(
    projections: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    bias_hh: Sequence[Tensor],
    h0: Tensor,
    tokens: Tensor | None,
    lengths: Tensor,
    reverse: Sequence[bool],
    reset_after: bool,
    every_step: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(outputs, h_last, saved); saved, if asked for, is what backward needs."""
    outputs, h_last, saved = forward_shapes(
        projections, weight_hh, bias_hh, h0, tokens, lengths, reverse, reset_after, every_step, save
    )
    size = h0.shape[-1]
    call, directions = describe(projections[0], tokens, lengths, h0, reverse, reset_after)
    for i, direction in enumerate(directions):
        direction.projections = address(projections[i])
        direction.weight_hh = address(weight_hh[i])
        direction.bias_hh = address(bias_hh[i])
        direction.h0 = address(h0, i * h0.stride(0))
        direction.outputs = address(outputs, i * size)
        direction.h_last = address(h_last, i * h_last.stride(0))
        direction.saved = address(saved, i * saved.stride(0))
    kernels.forward(call, directions)
    return outputs, h_last, saved


def forward_shapes(
    projections: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    bias_hh: Sequence[Tensor],
    h0: Tensor,
    tokens: Tensor | None,
    lengths: Tensor,
    reverse: Sequence[bool],
    reset_after: bool,
    every_step: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What forward returns, not filled in."""
    directions, batch, size = h0.shape
    steps = len(projections[0]) if tokens is None else len(tokens)
    return (
        h0.new_empty(steps if every_step else 0, batch, directions * size),
        torch.empty_like(h0),
        h0.new_empty(
            directions, kernels.saved_size(steps, batch, size, reset_after) if save else 0
        ),
    )


def backward(
    weight_hh: Sequence[Tensor],
    d_outputs: Tensor | None,
    d_h_last: Tensor,
    saved: Tensor,
    tokens: Tensor | None,
    lengths: Tensor,
    reverse: Sequence[bool],
    reset_after: bool,
    rows: int,
) -> list[Tensor]:
    """The gradients of projections..., weight_hh..., bias_hh..., h0. rows: len(projections[0])."""
    gradients = backward_shapes(
        weight_hh, d_outputs, d_h_last, saved, tokens, lengths, reverse, reset_after, rows
    )
    R, size = len(reverse), d_h_last.shape[-1]
    call, directions = describe(gradients[0], tokens, lengths, d_h_last, reverse, reset_after)
    for i, direction in enumerate(directions):
        direction.weight_hh = address(weight_hh[i])
        direction.saved = address(saved, i * saved.stride(0))
        direction.d_outputs = None if d_outputs is None else address(d_outputs, i * size)
        direction.d_h_last = address(d_h_last, i * d_h_last.stride(0))
        direction.d_projections = address(gradients[i])
        direction.d_weight_hh = address(gradients[R + i])
        direction.d_bias_hh = address(gradients[2 * R + i])
        direction.d_h0 = address(gradients[3 * R], i * d_h_last.stride(0))
    kernels.backward(call, directions)
    return gradients


def backward_shapes(
    weight_hh: Sequence[Tensor],
    d_outputs: Tensor | None,
    d_h_last: Tensor,
    saved: Tensor,
    tokens: Tensor | None,
    lengths: Tensor,
    reverse: Sequence[bool],
    reset_after: bool,
    rows: int,
) -> list[Tensor]:
    """What backward returns, not filled in."""
    batch, size = d_h_last.shape[1:]
    shape = (rows, batch, 3 * size) if tokens is None else (rows, 3 * size)
    return [
        *(saved.new_empty(shape) for _ in weight_hh),
        *(torch.empty_like(each) for each in weight_hh),
        *(saved.new_empty(3 * size) for _ in weight_hh),
        torch.empty_like(d_h_last),
    ]


forward_operator = torch.library.custom_op(
    "gru::forward", forward, mutates_args=(), device_types="cpu"
)
backward_operator = torch.library.custom_op(
    "gru::backward", backward, mutates_args=(), device_types="cpu"
)
forward_operator.register_fake(forward_shapes)
backward_operator.register_fake(backward_shapes)


def keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Saves for the backward pass, which does not need the projections, biases and outputs."""
    projections, weight_hh, _, _, tokens, lengths, reverse, reset_after, *_ = inputs
    ctx.save_for_backward(*weight_hh, output[2], tokens, lengths)
    ctx.set_materialize_grads(False)  # zeros as large as saved would cost as much as the forward
    ctx.how = (reverse, reset_after, len(projections[0]))


def differentiate(
    ctx: Any,
    d_outputs: Tensor | None,
    d_h_last: Tensor | None,
    _: Tensor | None,
    compute: Callable[..., list[Tensor]] = backward_operator,
) -> tuple:
    """The gradients of forward's arguments; None is a gradient of zero."""
    *weight_hh, saved, tokens, lengths = ctx.saved_tensors
    if d_h_last is None:
        d_h_last = saved.new_zeros(len(weight_hh), len(lengths), weight_hh[0].shape[-1])
    gradients = compute(
        weight_hh,
        None if d_outputs is None else d_outputs.contiguous(),
        d_h_last.contiguous(),
        saved,
        tokens,
        lengths,
        *ctx.how,
    )
    return *parts(gradients), *[None] * 6


forward_operator.register_autograd(differentiate, setup_context=keep)


class Eager(torch.autograd.Function):
    """gru::forward without the way through torch.library, on which a review alone spends an eighth
    of its training step."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """inputs: tokens and what follows it in gru::forward, then the arrays before it, flat."""
        inputs = *parts(inputs[6:]), *inputs[:6]
        output = forward(*inputs)
        keep(ctx, inputs, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, d_outputs: Tensor | None, d_h_last: Tensor | None, _: Tensor | None
    ) -> tuple:
        *lists, d_h0 = differentiate(ctx, d_outputs, d_h_last, _, backward)[:4]
        return *[None] * 6, *chain(*lists), d_h0


def describe(
    projections: Tensor,
    tokens: Tensor | None,
    lengths: Tensor,
    h0: Tensor,
    reverse: Sequence[bool],
    reset_after: bool,
) -> tuple[kernels.Problem, Any]:
    """The kernel's picture of a call: sizes, and one description a direction. The arguments, or
    their gradients, are looked at for their shapes."""
    if h0.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"the fused GRU computes in float32 or float64, not {h0.dtype}")
    batch, size = h0.shape[1:]
    call = kernels.Problem(
        steps=len(projections) if tokens is None else len(tokens),
        batch=batch,
        hidden=size,
        distinct=len(projections) * (batch if tokens is None else 1),
        # An empty array has no address, yet NULL would say that there are no tokens.
        tokens=None if tokens is None else tokens.data_ptr() or 1,
        lengths=lengths.data_ptr(),
        is_double=h0.dtype == torch.float64,
        reset_after=reset_after,
        directions=len(reverse),
        threads=torch.get_num_threads(),
        openmp=True,
    )
    directions = (kernels.Direction * len(reverse))()
    for direction, backwards in zip(directions, reverse, strict=True):
        direction.reverse = backwards
        direction.ld_projections = 3 * size
        direction.ld_outputs = len(reverse) * size
    return call, directions


def address(array: Tensor, offset: int = 0) -> int | None:
    """Where in memory element `offset` is; None, which the kernel takes for absent, if empty."""
    return array.data_ptr() + offset * array.element_size() if array.numel() else None
