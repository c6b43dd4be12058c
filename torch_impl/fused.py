"""The GRU on the CPU kernel (common/kernels/gru.h). Its twin is jax_impl/fused.py.

Forward and backward are written by hand in C++. To autograd and torch.func they are two functions,
`Forward` and `Backward`: the gradient is the kernel's, and its own derivatives are those of `scan`
in gru.py, which computes in forward mode, too. To torch.compile, torch.export and whatever else
looks at operations without computing them, they are operators that PyTorch knows by name,
gru::forward and gru::backward: once differentiable.
One call computes all directions of a layer, with torch.get_num_threads() threads, but never more
than the cores this process may use. What a function needs for one direction, it takes as a list
with one entry a direction; those are forward, or forward and backward.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from common import kernels
from common.arguments import check_shape, dtype_name
from torch_impl.layers import (
    Found,
    Weights,
    forward_mode,
    parts_of,
    plain,
    project,
    transformed,
)

BUILT = kernels.available()  # asked once: torch.compile does not trace how


def available(device: str = "cpu", dtype: Any = "float32") -> bool:
    """Whether the kernel has been built, for this kind of device and dtype."""
    return BUILT and device == "cpu" and dtype_name(dtype) in kernels.DTYPES


def recurrence(
    x: Float[Tensor, "T B D"] | Float[Tensor, "K D"],
    tokens: Int[Tensor, "T B"] | None,
    weights: Sequence[Weights],
    lengths: Int[Tensor, " B"],
    h0: Float[Tensor, "R B H"],
    resets: Bool[Tensor, "T B"] | None = None,
    h_reset: Float[Tensor, "R B H"] | None = None,
    *,
    reset_after: bool,
    return_sequences: bool,
) -> Found:
    """A layer: see Recurrence in common/cells.py. Outputs that are not wanted are not written.

    Raises ValueError for shapes that do not fit, where a length is not in 0..T and where a token is
    not in 0..K-1, TypeError for a dtype that the kernel does not compute in.
    """
    arrays = (x, *(array for each in weights for array in each), h0)
    if resets is not None and h_reset is not None:
        arrays += (h_reset,)
        resets = resets.contiguous()
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "torch.jit.trace cannot record the fused GRU: torch.export can, and trace "
            'implementation="scan", for as many time steps as there are'
        )
    if forward_mode() or (torch.compiler.is_compiling() and transformed()):
        return by_scan(tokens, lengths, resets, reset_after, return_sequences)(*arrays)
    tokens = None if tokens is None else tokens.to(torch.int32).contiguous()
    lengths = lengths.to(torch.int32).contiguous()
    in_memory = plain(tokens, lengths, resets, *arrays)
    # Whether torch.func will want a derivative cannot be seen from here.
    save = torch.is_grad_enabled() and (transformed() or any(each.requires_grad for each in arrays))
    how = (tokens, lengths, resets, reset_after, return_sequences, save)
    if (in_memory and not save) or torch.compiler.is_compiling():
        function = forward if in_memory else forward_operator
        outputs, h_last, _ = compute(function, *how, *arrays)
    else:
        outputs, h_last, _ = (Eager if in_memory else Forward).apply(*how, *arrays)
    return outputs, h_last


def operands(
    *arrays: Tensor,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor | None]:
    """What the kernel reads: projections, weight_hh and bias_hh, each a list, h0 and h_reset."""
    x, weights, h0, h_reset = parts(arrays)
    return (
        [dense(project(x, weight_ih, bias_ih)) for weight_ih, _, bias_ih, _ in weights],
        [dense(weight_hh) for _, weight_hh, _, _ in weights],
        [dense(bias_hh) for _, _, _, bias_hh in weights],
        dense(h0),
        None if h_reset is None else dense(h_reset),
    )


def product_gradients(
    x: Float[Tensor, "*N D"], d_a: Float[Tensor, "*N 3H"]
) -> tuple[Float[Tensor, "3H D"], Float[Tensor, " 3H"]]:
    """The gradients of W and b in `project`, given that of its result; W's in as many parts."""
    number = parts_of(x)
    x, d_a = x.flatten(0, -2), d_a.flatten(0, -2)
    d_bias = d_a.sum(dim=0)
    if number == 1:
        return d_a.T @ x, d_bias
    first, *others = zip(d_a.chunk(number), x.chunk(number), strict=True)
    d_weight = first[0].T @ first[1]
    for d_part, part in others:  # in place: to get memory takes as long as the product
        d_weight.addmm_(d_part.T, part)
    return d_weight, d_bias


def parts(arrays: Sequence[Tensor]) -> tuple[Tensor, list[Weights], Tensor, Tensor | None]:
    """x, the weights of each direction, h0 and h_reset (or None), from all of them in a row."""
    x, *others = arrays
    end = len(others) // 4 * 4
    h0, *h_reset = others[end:]
    weights: list[Weights] = [others[i : i + 4] for i in range(0, end, 4)]
    return x, weights, h0, h_reset[0] if h_reset else None


def batched(*arrays: Tensor | None) -> bool:
    """Whether torch.autograd.grad computes with several gradients at once (is_grads_batched)."""
    known = torch._C._functorch.is_legacy_batchedtensor
    return any(known(each) for each in arrays if each is not None)


def dense(array: Tensor) -> Tensor:
    """The array as the kernel reads it."""
    return array.contiguous().resolve_neg()


def exactly() -> AbstractContextManager:
    """Within, torch.autocast is off, whatever is on around backward."""
    on = torch.is_autocast_enabled("cpu")
    return torch.autocast("cpu", enabled=False) if on else nullcontext()


def forward(
    projections: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    bias_hh: Sequence[Tensor],
    h0: Tensor,
    h_reset: Tensor | None,
    tokens: Tensor | None,
    lengths: Tensor,
    resets: Tensor | None,
    reverse: Sequence[bool],
    reset_after: bool,
    return_sequences: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(outputs, h_last, saved); saved, if asked for, is what backward needs."""
    if forward_mode():  # an operator would silently leave the derivative out
        raise RuntimeError(f"gru::forward, the operator, has no derivative forward: {INSTEAD}")
    check_directions(reverse, projections=projections, weight_hh=weight_hh, bias_hh=bias_hh, h0=h0)
    rows = projections[0].shape[0]
    call, directions = describe(rows, tokens, lengths, resets, h0, reverse, reset_after)
    outputs, h_last, saved = forward_shapes(
        projections,
        weight_hh,
        bias_hh,
        h0,
        h_reset,
        tokens,
        lengths,
        resets,
        reverse,
        reset_after,
        return_sequences,
        save,
    )
    of_h0 = address("h0", h0, h0.shape, h0.dtype)
    of_h_reset = None if h_reset is None else address("h_reset", h_reset, h0.shape, h0.dtype)
    of_outputs, of_h_last, of_saved = (
        array.data_ptr() or None for array in (outputs, h_last, saved)
    )
    row = call.hidden * h0.element_size()
    for i, direction in enumerate(directions):
        direction.projections = of_projections(f"projections[{i}]", projections[i], call, h0.dtype)
        direction.weight_hh = of_weights(f"weight_hh[{i}]", weight_hh[i], call, h0.dtype)
        direction.bias_hh = address(f"bias_hh[{i}]", bias_hh[i], (3 * call.hidden,), h0.dtype)
        direction.h0 = within_memory(of_h0, i * call.batch * row)
        direction.h_reset = within_memory(of_h_reset, i * call.batch * row)
        direction.outputs = within_memory(of_outputs, i * row)
        direction.h_last = within_memory(of_h_last, i * call.batch * row)
        direction.saved = within_memory(of_saved, i * saved.stride(0) * saved.element_size())
    kernels.forward(call, directions)
    return outputs, h_last, saved


def forward_shapes(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What forward returns, not filled in, for the same arguments."""
    projections, _, _, h0, _, tokens, _, _, _, reset_after, return_sequences, save = given
    directions, batch, size = h0.shape
    steps = (projections[0] if tokens is None else tokens).shape[0]
    return (
        h0.new_empty(steps if return_sequences else 0, batch, directions * size),
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
    resets: Tensor | None,
    reverse: Sequence[bool],
    reset_after: bool,
    rows: int,
) -> list[Tensor]:
    """The gradients of projections..., weight_hh..., bias_hh..., h0 and, with resets, h_reset.

    rows: len(projections[0]).
    """
    check_directions(reverse, weight_hh=weight_hh, d_h_last=d_h_last)
    call, directions = describe(rows, tokens, lengths, resets, d_h_last, reverse, reset_after)
    dtype, R = d_h_last.dtype, len(reverse)
    of_saved = address("saved", saved, (R, saved_size(call)), dtype)
    of_d_h_last = address("d_h_last", d_h_last, d_h_last.shape, dtype)
    of_d_outputs = None
    if d_outputs is not None:  # without return_sequences it has no time steps
        steps = 0 if d_outputs.shape[:1] == (0,) else call.steps
        shape = (steps, call.batch, R * call.hidden)
        of_d_outputs = address("d_outputs", d_outputs, shape, dtype)
    for i, direction in enumerate(directions):
        direction.weight_hh = of_weights(f"weight_hh[{i}]", weight_hh[i], call, dtype)
    gradients = backward_shapes(
        weight_hh, d_outputs, d_h_last, saved, tokens, lengths, resets, reverse, reset_after, rows
    )
    places = [gradient.data_ptr() or None for gradient in gradients]
    row = call.hidden * d_h_last.element_size()
    for i, direction in enumerate(directions):
        direction.saved = within_memory(of_saved, i * saved.stride(0) * saved.element_size())
        direction.d_outputs = within_memory(of_d_outputs, i * row)
        direction.d_h_last = within_memory(of_d_h_last, i * call.batch * row)
        direction.d_projections, direction.d_weight_hh, direction.d_bias_hh = places[i : 3 * R : R]
        direction.d_h0 = within_memory(places[3 * R], i * call.batch * row)
        if resets is not None:
            direction.d_h_reset = within_memory(places[-1], i * call.batch * row)
    kernels.backward(call, directions)
    return gradients


def backward_shapes(*given: Any) -> list[Tensor]:
    """What backward returns, not filled in, for the same arguments."""
    weight_hh, _, d_h_last, saved, tokens, _, resets, *_, rows = given
    batch, size = d_h_last.shape[1:]
    shape = (rows, batch, 3 * size) if tokens is None else (rows, 3 * size)
    return [
        *(saved.new_empty(shape) for _ in weight_hh),
        *(torch.empty_like(each) for each in weight_hh),
        *(saved.new_empty(3 * size) for _ in weight_hh),
        *(torch.empty_like(d_h_last) for _ in range(1 if resets is None else 2)),
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
    projections, weight_hh, *_, tokens, lengths, resets, reverse, reset_after, _, _ = inputs
    ctx.save_for_backward(*weight_hh, output[2], tokens, lengths, resets)
    ctx.set_materialize_grads(False)  # zeros as large as saved would cost as much as the forward
    ctx.how = (reverse, reset_after, projections[0].shape[0])  # len() would fix it for export


def differentiate(
    ctx: Any, d_outputs: Tensor | None, d_h_last: Tensor | None, _: Tensor | None
) -> tuple:
    """The gradients of the operator's arguments; None is a gradient of zero."""
    *weight_hh, saved, tokens, lengths, resets = ctx.saved_tensors
    if d_h_last is None:
        d_h_last = saved.new_zeros(len(weight_hh), lengths.shape[0], weight_hh[0].shape[-1])
    d_outputs = None if d_outputs is None else d_outputs.contiguous()
    gradients = backward_operator(
        weight_hh, d_outputs, d_h_last.contiguous(), saved, tokens, lengths, resets, *ctx.how
    )
    R = len(weight_hh)
    lists = [gradients[i : i + R] for i in (0, R, 2 * R)]
    return *lists, gradients[3 * R], None if resets is None else gradients[-1], *[None] * 7


def refuse(*_: Any) -> None:
    """Raise RuntimeError where the operator gru::backward is differentiated."""
    raise RuntimeError(f"gru::backward, the operator, has no derivative: {INSTEAD}")


INSTEAD = 'outside of torch.compile the layer has, and so has its implementation="scan"'


forward_operator.register_autograd(differentiate, setup_context=keep)
backward_operator.register_autograd(refuse)


def compute(
    function: Callable[..., tuple[Tensor, Tensor, Tensor]],
    tokens: Tensor | None,
    lengths: Tensor,
    resets: Tensor | None,
    reset_after: bool,
    return_sequences: bool,
    save: bool,
    *arrays: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer by `forward` or its operator, without a gradient but that of the operator."""
    projections, *others = operands(*arrays)
    how = (directions_of(projections), reset_after, return_sequences, save)
    return function(projections, *others, tokens, lengths, resets, *how)


class Forward(torch.autograd.Function):
    """`compute`, to be differentiated."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        in_memory = plain(*inputs[:3], *inputs[6:])
        return compute(forward if in_memory else forward_operator, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *places, reset_after, return_sequences, _ = inputs[:6]
        ctx.how = (reset_after, return_sequences)
        ctx.save_for_backward(*places, output[2], *inputs[6:])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)  # zeros as large as saved would cost as much as forward

    @staticmethod
    def backward(
        ctx: Any, d_outputs: Tensor | None, d_h_last: Tensor | None, _: Tensor | None
    ) -> tuple:
        # Read once: torch.utils.checkpoint, which computes them again, allows no more.
        tokens, lengths, resets, saved, *arrays = ctx.saved_tensors
        places = (tokens, lengths, resets)
        d_outputs = None if d_outputs is None else dense(d_outputs)
        d_h_last = torch.zeros_like(arrays[-1]) if d_h_last is None else dense(d_h_last)
        given = (saved, d_outputs, d_h_last, *arrays)
        if forward_mode() or batched(d_outputs, d_h_last):
            function = by_scan(*places, *ctx.how)
            gradients: tuple = gradients_of(function, d_outputs, d_h_last, *arrays)
        elif torch.is_grad_enabled() or transformed():
            gradients = Backward.apply(*places, *ctx.how, True, *given)
        else:
            of_x = ctx.needs_input_grad[6]
            gradients = Backward.forward(*places, *ctx.how, of_x, *given)
        return *[None] * 6, *gradients

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple[tuple, tuple]:
        return one_by_one(Forward.apply, info, in_dims, inputs)


class Eager(torch.autograd.Function):
    """Forward in the older form, which torch.func does not take: PyTorch looks at the signature of
    the newer one at every call, which takes as long as a tenth of a short call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = compute(forward, *inputs)
        Forward.setup_context(ctx, inputs, output)
        return output

    backward = Forward.backward


class Backward(torch.autograd.Function):
    """A layer's backward, to be differentiated again. Takes tokens to return_sequences, whether the
    gradient of x is wanted, saved, the gradients of outputs (or None) and h_last, and the arrays
    that Forward takes; returns the gradients of those arrays."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor | None, ...]:
        tokens, lengths, resets, reset_after, _, of_x, saved, d_outputs, d_h_last = inputs[:9]
        x, weights, *_ = parts(inputs[9:])
        function = backward if plain(saved, d_outputs, d_h_last, x) else backward_operator
        weight_hh, R, rows = [dense(each[1]) for each in weights], len(weights), x.shape[0]
        found = function(
            weight_hh,
            d_outputs,
            d_h_last,
            saved,
            tokens,
            lengths,
            resets,
            directions_of(weights),
            reset_after,
            rows,
        )
        d_weights: list[Tensor] = []
        with exactly():
            for i in range(R):
                d_weight_ih, d_bias_ih = product_gradients(x, found[i])
                d_weights += [d_weight_ih, found[R + i], d_bias_ih, found[2 * R + i]]
            of_each = [d_a @ each[0] for d_a, each in zip(found, weights, strict=False) if of_x]
        d_x = sum(of_each[1:], of_each[0]) if of_x else None
        return d_x, *d_weights, *found[3 * R :]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *places, reset_after, return_sequences, _, _, d_outputs, d_h_last = inputs[:9]
        ctx.how = (reset_after, return_sequences)
        ctx.save_for_backward(*places, d_outputs, d_h_last, *inputs[9:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        tokens, lengths, resets, d_outputs, *arguments = ctx.saved_tensors
        function = partial(gradients_of, by_scan(tokens, lengths, resets, *ctx.how))
        if d_outputs is None:
            pull = torch.func.vjp(partial(function, None), *arguments)[1]
            return *[None] * 8, *pull(cotangents)
        pull = torch.func.vjp(function, d_outputs, *arguments)[1]
        return *[None] * 7, *pull(cotangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple[tuple, tuple]:
        return one_by_one(Backward.apply, info, in_dims, inputs)


def directions_of(entries: Sequence[Any]) -> list[bool]:
    """Whether each direction is the backward one."""
    return [False, True][: len(entries)]


def by_scan(
    tokens: Tensor | None,
    lengths: Tensor,
    resets: Tensor | None,
    reset_after: bool,
    return_sequences: bool,
) -> Callable[..., Found]:
    """The function of the arrays, in a row, that the kernel computes, written out by gru.py."""
    from torch_impl.gru import scan

    def run(*arrays: Tensor) -> Found:
        x, weights, h0, h_reset = parts(arrays)
        how = {"reset_after": reset_after, "return_sequences": return_sequences}
        with exactly():
            return scan(x, tokens, weights, lengths, h0, resets, h_reset, **how)

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
    resets: Tensor | None,
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
        resets=None if resets is None else address("resets", resets, (steps, batch), torch.bool),
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


def within_memory(place: int | None, offset: int) -> int | None:
    """An address so many bytes behind another, if there is one."""
    return None if place is None else place + offset
