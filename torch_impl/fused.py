"""The recurrence on the CPU kernel (common/kernels/gru.h). Its twin is jax_impl/fused.py.

Forward and backward are written by hand in C++. To autograd and torch.func they are two functions,
`Forward` and `Backward`: the gradient is the kernel's, and its own derivatives are those of
`scan_all` in gru.py, which computes in forward mode, too. To torch.compile, torch.export and
whatever else looks at operations without computing them, they are operators that PyTorch knows by
name, gru::forward and gru::backward: once differentiable.
One call computes all directions of a layer, with torch.get_num_threads() threads, but never more
than the cores this process may use. What a function needs for one direction, it takes as a list
with one entry a direction.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from common import kernels
from common.arguments import check_shape


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

    Raises ValueError for shapes that do not fit, where a length is not in 0..T and where a token is
    not in 0..K-1, TypeError for a dtype that the kernel does not compute in.
    """
    inputs = (*projections, *weight_hh, *bias_hh, h0)
    if forward_mode():
        return by_scan(tokens, lengths, reverse, reset_after, every_step)(*inputs)
    tokens = None if tokens is None else tokens.to(torch.int32).contiguous()
    lengths = lengths.to(torch.int32).contiguous()
    arrays = [each.contiguous().resolve_neg() for each in inputs]
    in_memory = plain(tokens, lengths, *arrays)
    # Whether torch.func will want a derivative cannot be seen from here.
    save = torch.is_grad_enabled() and (transformed() or any(each.requires_grad for each in arrays))
    how: Any = (tokens, lengths, list(reverse), reset_after, every_step, save)
    if in_memory and not save:
        outputs, h_last, _ = forward(*parts(arrays), *how)
    elif torch.compiler.is_compiling():
        outputs, h_last, _ = forward_operator(*parts(arrays), *how)
    else:
        outputs, h_last, _ = (Eager if in_memory else Forward).apply(*how, *arrays)
    return outputs, h_last


def plain(*arrays: Tensor | None) -> bool:
    """Whether these are numbers in memory: not those that PyTorch compiles, fakes or transforms."""
    return not (
        torch.compiler.is_compiling()
        or transformed()
        or torch._C._len_torch_dispatch_stack()
        or any(
            type(each) not in (Tensor, nn.Parameter)
            or each.is_meta
            or not torch._C._has_storage(each)
            for each in arrays
            if each is not None
        )
    )


def transformed() -> bool:
    """Whether this runs under a transformation of torch.func: grad, vmap, jvp ..."""
    return torch._C._are_functorch_transforms_active()


def forward_mode() -> bool:
    """Whether derivatives are being computed in forward mode, by torch.func or torch.autograd."""
    return torch.autograd.forward_ad._current_level >= 0


def batched(*arrays: Tensor | None) -> bool:
    """Whether torch.autograd.grad computes with several gradients at once (is_grads_batched)."""
    known = torch._C._functorch.is_legacy_batchedtensor
    return any(known(each) for each in arrays if each is not None)


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
    if forward_mode():  # an operator would silently leave the derivative out
        raise RuntimeError(f"gru::forward, the operator, has no derivative forward: {INSTEAD}")
    check_directions(reverse, projections=projections, weight_hh=weight_hh, bias_hh=bias_hh, h0=h0)
    call, directions = describe(projections[0].shape[0], tokens, lengths, h0, reverse, reset_after)
    outputs, h_last, saved = forward_shapes(
        projections, weight_hh, bias_hh, h0, tokens, lengths, reverse, reset_after, every_step, save
    )
    of_h0 = address("h0", h0, h0.shape, h0.dtype)
    of_outputs, of_h_last, of_saved = (
        array.data_ptr() or None for array in (outputs, h_last, saved)
    )
    row = call.hidden * h0.element_size()
    for i, direction in enumerate(directions):
        direction.projections = of_projections(f"projections[{i}]", projections[i], call, h0.dtype)
        direction.weight_hh = of_weights(f"weight_hh[{i}]", weight_hh[i], call, h0.dtype)
        direction.bias_hh = address(f"bias_hh[{i}]", bias_hh[i], (3 * call.hidden,), h0.dtype)
        direction.h0 = within(of_h0, i * call.batch * row)
        direction.outputs = within(of_outputs, i * row)
        direction.h_last = within(of_h_last, i * call.batch * row)
        direction.saved = within(of_saved, i * saved.stride(0) * saved.element_size())
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
    steps = (projections[0] if tokens is None else tokens).shape[0]
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
    check_directions(reverse, weight_hh=weight_hh, d_h_last=d_h_last)
    call, directions = describe(rows, tokens, lengths, d_h_last, reverse, reset_after)
    dtype, R = d_h_last.dtype, len(reverse)
    of_saved = address("saved", saved, (R, saved_size(call)), dtype)
    of_d_h_last = address("d_h_last", d_h_last, d_h_last.shape, dtype)
    of_d_outputs = None
    if d_outputs is not None:  # without every_step it has no time steps
        steps = 0 if d_outputs.shape[:1] == (0,) else call.steps
        shape = (steps, call.batch, R * call.hidden)
        of_d_outputs = address("d_outputs", d_outputs, shape, dtype)
    for i, direction in enumerate(directions):
        direction.weight_hh = of_weights(f"weight_hh[{i}]", weight_hh[i], call, dtype)
    gradients = backward_shapes(
        weight_hh, d_outputs, d_h_last, saved, tokens, lengths, reverse, reset_after, rows
    )
    places = [gradient.data_ptr() or None for gradient in gradients]
    row = call.hidden * d_h_last.element_size()
    for i, direction in enumerate(directions):
        direction.saved = within(of_saved, i * saved.stride(0) * saved.element_size())
        direction.d_outputs = within(of_d_outputs, i * row)
        direction.d_h_last = within(of_d_h_last, i * call.batch * row)
        direction.d_projections, direction.d_weight_hh, direction.d_bias_hh = places[i : 3 * R : R]
        direction.d_h0 = within(places[3 * R], i * call.batch * row)
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
    """Saves for the operator's gradient, which needs no projections, biases and outputs."""
    projections, weight_hh, _, _, tokens, lengths, reverse, reset_after, *_ = inputs
    ctx.save_for_backward(*weight_hh, output[2], tokens, lengths)
    ctx.set_materialize_grads(False)  # zeros as large as saved would cost as much as the forward
    ctx.how = (reverse, reset_after, len(projections[0]))


def differentiate(
    ctx: Any, d_outputs: Tensor | None, d_h_last: Tensor | None, _: Tensor | None
) -> tuple:
    """The gradients of the operator's arguments; None is a gradient of zero."""
    *weight_hh, saved, tokens, lengths = ctx.saved_tensors
    if d_h_last is None:
        d_h_last = saved.new_zeros(len(weight_hh), len(lengths), weight_hh[0].shape[-1])
    d_outputs = None if d_outputs is None else d_outputs.contiguous()
    gradients = backward_operator(
        weight_hh, d_outputs, d_h_last.contiguous(), saved, tokens, lengths, *ctx.how
    )
    return *parts(gradients), *[None] * 6


def refuse(*_: Any) -> None:
    """Raise RuntimeError where the operator gru::backward is differentiated."""
    raise RuntimeError(f"gru::backward, the operator, has no derivative: {INSTEAD}")


INSTEAD = 'outside of torch.compile torch_impl.gru has, and so has implementation="scan"'


forward_operator.register_autograd(differentiate, setup_context=keep)
backward_operator.register_autograd(refuse)


class Forward(torch.autograd.Function):
    """The kernel's forward. Takes tokens and what follows it in gru::forward, then the arrays
    before it in a row; returns what gru::forward does."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        arrays: Any = (*parts(inputs[6:]), *inputs[:6])
        return (forward if plain(*inputs[:2], *inputs[6:]) else forward_operator)(*arrays)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        tokens, lengths, *ctx.how, _ = inputs[:6]
        ctx.save_for_backward(tokens, lengths, output[2], *inputs[6:])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)  # zeros as large as saved would cost as much as forward

    @staticmethod
    def backward(
        ctx: Any, d_outputs: Tensor | None, d_h_last: Tensor | None, _: Tensor | None
    ) -> tuple:
        tokens, lengths, saved, *arrays = ctx.saved_tensors
        d_outputs = None if d_outputs is None else d_outputs.contiguous().resolve_neg()
        d_h_last = torch.zeros_like(arrays[-1]) if d_h_last is None else d_h_last
        d_h_last = d_h_last.contiguous().resolve_neg()
        given = (tokens, lengths, *ctx.how, saved, d_outputs, d_h_last, *arrays)
        if forward_mode() or batched(d_outputs, d_h_last):
            function = by_scan(tokens, lengths, *ctx.how)
            gradients = gradients_of(function, d_outputs, d_h_last, *arrays)
        elif torch.is_grad_enabled() or transformed():
            gradients = Backward.apply(*given)
        else:
            gradients = Backward.forward(*given)
        return *[None] * 6, *gradients

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple[tuple, tuple]:
        return one_by_one(Forward.apply, info, in_dims, inputs)


class Eager(torch.autograd.Function):
    """Forward in the older form, which torch.func does not take: PyTorch looks at the signature of
    the newer one at every call, which takes as long as a tenth of a short review."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = forward(*parts(inputs[6:]), *inputs[:6])
        Forward.setup_context(ctx, inputs, output)
        return output

    backward = Forward.backward


class Backward(torch.autograd.Function):
    """The kernel's backward, to be differentiated again. Takes tokens to every_step, saved, the
    gradients of outputs (or None) and h_last, and the arrays that Forward takes; returns the
    gradients of those arrays."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        tokens, lengths, reverse, reset_after, _, saved, d_outputs, d_h_last, *arrays = inputs
        compute = backward if plain(saved, d_outputs, d_h_last, arrays[0]) else backward_operator
        weight_hh, rows = parts(arrays)[1], arrays[0].shape[0]
        found = compute(
            weight_hh, d_outputs, d_h_last, saved, tokens, lengths, reverse, reset_after, rows
        )
        return tuple(found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        tokens, lengths, *ctx.how, _, d_outputs, d_h_last = inputs[:8]
        ctx.save_for_backward(tokens, lengths, d_outputs, d_h_last, *inputs[8:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        tokens, lengths, d_outputs, *arguments = ctx.saved_tensors
        function = partial(gradients_of, by_scan(tokens, lengths, *ctx.how))
        if d_outputs is None:
            pull = torch.func.vjp(partial(function, None), *arguments)[1]
            return *[None] * 7, *pull(cotangents)
        pull = torch.func.vjp(function, d_outputs, *arguments)[1]
        return *[None] * 6, *pull(cotangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple[tuple, tuple]:
        return one_by_one(Backward.apply, info, in_dims, inputs)


def by_scan(
    tokens: Tensor | None,
    lengths: Tensor,
    reverse: Sequence[bool],
    reset_after: bool,
    every_step: bool,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of the arrays, in a row, that the kernel computes, written out by gru.py."""
    from torch_impl.gru import scan_all

    def run(*arrays: Tensor) -> tuple[Tensor, Tensor]:
        projections, weight_hh, bias_hh, h0 = parts(arrays)
        with torch.autocast("cpu", enabled=False):  # as the kernel, whatever is on around backward
            return scan_all(
                projections,
                tokens,
                weight_hh,
                bias_hh,
                lengths,
                h0,
                reverse=reverse,
                reset_after=reset_after,
                every_step=every_step,
            )

    return run


def gradients_of(
    function: Callable[..., tuple[Tensor, Tensor]],
    d_outputs: Tensor | None,
    d_h_last: Tensor,
    *arrays: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of a function of by_scan with respect to its arrays."""
    (outputs, _), pull = torch.func.vjp(function, *arrays)[:2]
    return pull((torch.zeros_like(outputs) if d_outputs is None else d_outputs, d_h_last))


def one_by_one(
    apply: Callable[..., tuple[Tensor, ...]], info: Any, in_dims: tuple, inputs: tuple
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """torch.func.vmap of one of the two: a call for each entry of the new axis."""

    def entry(i: int) -> tuple[Tensor, ...]:
        return apply(
            *(
                each.select(dim, i).contiguous() if isinstance(dim, int) else each
                for each, dim in zip(inputs, in_dims, strict=True)
            )
        )

    results = tuple(map(torch.stack, zip(*map(entry, range(info.batch_size)), strict=True)))
    return results, (0,) * len(results)


# What follows is all that hands memory to the kernel, which believes what it is told: so each array
# is looked at here, whoever calls.


def check_directions(reverse: Sequence[bool], **given: Sequence[Tensor] | Tensor) -> None:
    """Raise ValueError unless there are one or two directions, and as many entries in each."""
    if len(reverse) not in (1, 2):
        raise ValueError(f"reverse: expected one or two directions, found {len(reverse)}")
    for name, each in given.items():
        if len(each) != len(reverse):
            raise ValueError(
                f"{name}: expected as many as reverse has, {len(reverse)}, found {len(each)}"
            )


def describe(
    rows: int,
    tokens: Tensor | None,
    lengths: Tensor,
    h0: Tensor,
    reverse: Sequence[bool],
    reset_after: bool,
) -> tuple[kernels.Problem, Any]:
    """The kernel's picture of a call: sizes, and one description a direction.

    rows: of the projections, or of their gradient. h0, or its gradient, has the other sizes.
    """
    if h0.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"the fused GRU computes in float32 or float64, not {h0.dtype}: "
            'implementation="scan" does'
        )
    check_shape("h0", h0, "R", "B", "H")
    R, batch, size = h0.shape
    of_tokens, steps = None, rows
    if tokens is not None:
        check_shape("tokens", tokens, "T", batch)
        steps = tokens.shape[0]
        # An empty array has no address, yet NULL would say that there are no tokens.
        of_tokens = address("tokens", tokens, tokens.shape, torch.int32) or 1
    call = kernels.Problem(
        steps=steps,
        batch=batch,
        hidden=size,
        distinct=rows * (batch if tokens is None else 1),
        tokens=of_tokens,
        lengths=address("lengths", lengths, (batch,), torch.int32),
        is_double=h0.dtype == torch.float64,
        reset_after=reset_after,
        directions=R,
        threads=torch.get_num_threads(),
        openmp=True,
    )
    directions = (kernels.Direction * R)()
    for direction, backwards in zip(directions, reverse, strict=True):
        direction.reverse = backwards
        direction.ld_projections = 3 * size
        direction.ld_outputs = R * size
    return call, directions


def of_projections(
    name: str, array: Tensor, call: kernels.Problem, dtype: torch.dtype
) -> int | None:
    """The address of projections of a call: [T, B, 3H], or with tokens [K, 3H]."""
    rows = (call.steps, call.batch) if call.tokens is None else (call.distinct,)
    return address(name, array, (*rows, 3 * call.hidden), dtype)


def of_weights(name: str, array: Tensor, call: kernels.Problem, dtype: torch.dtype) -> int | None:
    """The address of the recurrent weights of a call."""
    return address(name, array, (3 * call.hidden, call.hidden), dtype)


def saved_size(call: kernels.Problem) -> int:
    """How many elements the forward of a call saves for each direction."""
    return kernels.saved_size(call.steps, call.batch, call.hidden, call.reset_after)


def address(name: str, array: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> int | None:
    """Where in memory an array lies; None, which the kernel takes for absent, if it is empty.

    Raises ValueError or TypeError for an array of another shape or dtype, or that is not dense,
    contiguous and on the CPU.
    """
    if not isinstance(array, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, found {type(array).__name__}")
    if array.shape != shape:
        check_shape(name, array, *shape)
    if array.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, found {array.dtype}")
    if not array.is_cpu or not array.is_contiguous() or array.is_neg():
        raise ValueError(f"{name}: expected a contiguous tensor on the CPU")
    if not array.numel():
        return None
    place = array.data_ptr()
    if not place:
        raise ValueError(f"{name}: expected a tensor with memory, found {type(array).__name__}")
    return place


def within(place: int | None, offset: int) -> int | None:
    """An address so many bytes behind another, if there is one."""
    return None if place is None else place + offset
