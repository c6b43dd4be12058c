"""The GRU on a kernel: the CPU's (common/kernels/gru.h), or, by cuda.py, a GPU's. Its twin is
jax_impl/fused.py.

Forward and backward are written by hand in C++. To autograd and torch.func they are two functions,
`Forward` and `Backward`: the gradient is the kernel's, and its own derivatives are those of `scan`
in gru.py, which computes in forward mode, too. To torch.compile, torch.export and whatever else
looks at operations without computing them, they are operators that PyTorch knows by name,
gru::forward and gru::backward: once differentiable.
One call computes all directions of a layer, with torch.get_num_threads() threads, but never more
than the cores this process may use. What a function needs for one direction, it takes as a list
with one entry a direction; those are forward, or forward and backward.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from common import kernels
from common.arguments import check_shape
from common.cells import dtype_name
from common.kernels import cuda as gpu
from common.params import GRU_PARAMETERS
from torch_impl import cuda
from torch_impl.layers import Found, Weights, forward_mode, plain, transformed
from torch_impl.memory import address, read_sizes, within_memory

# Asked once: torch.compile does not trace how.
BUILT = kernels.available()
DTYPES = (*kernels.DTYPES, "bfloat16") if kernels.bfloat16() else kernels.DTYPES
# Whether PyTorch's own threads spin for long while they wait for work: then the kernel takes those,
# since threads of its own would have to share the cores with them.
SPINNING = not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}


def available(device: str = "cpu", dtype: Any = "float32", size: int | None = None) -> bool:
    """Whether the kernel has been built, for this kind of device and dtype, whatever the size.

    bfloat16 is that of the products: the processor has to have an instruction for it.
    """
    return BUILT and not gpu.rehearsed and device == "cpu" and dtype_name(dtype) in DTYPES


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
    bfloat16: bool = False,
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
        return by_scan(tokens, lengths, resets, reset_after, return_sequences, bfloat16)(*arrays)
    # Whether torch.func will want a derivative cannot be seen from here.
    save = torch.is_grad_enabled() and (transformed() or any(each.requires_grad for each in arrays))
    tokens = None if tokens is None else tokens.to(torch.int32).contiguous()
    # Backward must have the lengths of forward, which saves nothing beyond them, even if the caller
    # writes to the tensor meanwhile.
    lengths = lengths.to(torch.int32, copy=save).contiguous()
    in_memory = plain(tokens, lengths, resets, *arrays)
    how = (tokens, lengths, resets, reset_after, return_sequences, bfloat16, save)
    if (in_memory and not save) or torch.compiler.is_compiling():
        function = forward if in_memory else forward_operator
        outputs, h_last, _ = compute(function, *how, *arrays)
    else:
        outputs, h_last, _ = (Eager if in_memory else Forward).apply(*how, *arrays)
    return outputs, h_last


def operands(
    *arrays: Tensor,
) -> tuple[list[list[Tensor]], Tensor, Tensor, Tensor | None]:
    """What the kernel reads: the weights by name, each a list, x, h0 and h_reset."""
    x, weights, h0, h_reset = parts(arrays)
    by_name = [list(map(dense, each)) for each in zip(*weights, strict=True)]
    return by_name, dense(x), dense(h0), None if h_reset is None else dense(h_reset)


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


def exactly(device: str) -> AbstractContextManager:
    """Within, torch.autocast is off, whatever is on around backward."""
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def on_gpu(array: Any) -> bool:
    """Whether the GPU's kernel is the one for this, an array if all is well."""
    return bool(gpu.rehearsed) or getattr(array, "is_cuda", False)


def forward(
    weight_ih: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    bias_ih: Sequence[Tensor],
    bias_hh: Sequence[Tensor],
    x: Tensor,
    h0: Tensor,
    h_reset: Tensor | None,
    tokens: Tensor | None,
    lengths: Tensor,
    resets: Tensor | None,
    reverse: Sequence[bool],
    reset_after: bool,
    return_sequences: bool,
    save: bool,
    bfloat16: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(outputs, h_last, saved); saved, if asked for, is what backward needs."""
    if forward_mode():  # an operator would silently leave the derivative out
        raise RuntimeError(f"gru::forward, the operator, has no derivative forward: {INSTEAD}")
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    places = (tokens, lengths, resets, reverse)
    given = (*weights, x, h0, h_reset, *places, reset_after, return_sequences, save)
    biases = {"bias_ih": bias_ih, "bias_hh": bias_hh}
    check_directions(reverse, weight_ih=weight_ih, weight_hh=weight_hh, **biases, h0=h0)
    if on_gpu(x):
        return cuda.forward(*given, bfloat16)
    call, directions = describe(
        *(weight_ih, weight_hh, x, tokens, lengths, resets, h0, reverse, reset_after, bfloat16),
        openmp=kernels.ALWAYS if save else kernels.WHILE_SPINNING,
    )
    outputs, h_last, saved = forward_shapes(*given)
    of_h0 = address("h0", h0, h0.shape, h0.dtype)
    of_h_reset = None if h_reset is None else address("h_reset", h_reset, h0.shape, h0.dtype)
    of_outputs, of_h_last, of_saved = (
        array.data_ptr() or None for array in (outputs, h_last, saved)
    )
    row = call.hidden * h0.element_size()
    for i, direction in enumerate(directions):
        for name, each in biases.items():
            bias = address(f"{name}[{i}]", each[i], (3 * call.hidden,), h0.dtype)
            setattr(direction, name, bias)
        direction.h0 = within_memory(of_h0, i * call.batch * row)
        direction.h_reset = within_memory(of_h_reset, i * call.batch * row)
        direction.outputs = within_memory(of_outputs, i * row)
        direction.h_last = within_memory(of_h_last, i * call.batch * row)
        direction.saved = within_memory(of_saved, i * saved.stride(0) * saved.element_size())
    kernels.forward(call, directions)
    return outputs, h_last, saved


def forward_shapes(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What forward returns, not filled in, for the same arguments."""
    _, _, _, _, x, h0, _, tokens, _, _, _, reset_after, return_sequences, save, *_ = given
    directions, batch, size = h0.shape
    steps = (x if tokens is None else tokens).shape[0]
    return (
        h0.new_empty(steps if return_sequences else 0, batch, directions * size),
        torch.empty_like(h0),
        h0.new_empty(
            directions, kernels.saved_size(steps, batch, size, reset_after) if save else 0
        ),
    )


def backward(
    weight_ih: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    x: Tensor,
    d_outputs: Tensor | None,
    d_h_last: Tensor,
    saved: Tensor,
    tokens: Tensor | None,
    lengths: Tensor,
    resets: Tensor | None,
    reverse: Sequence[bool],
    reset_after: bool,
    of_x: bool,
    bfloat16: bool = False,
) -> list[Tensor]:
    """The gradients of weight_ih..., weight_hh..., bias_ih..., bias_hh..., x, h0 and, with resets,
    h_reset; without of_x, that of x is empty."""
    places = (tokens, lengths, resets, reverse)
    given = (weight_ih, weight_hh, x, d_outputs, d_h_last, saved, *places, reset_after, of_x)
    check_directions(reverse, weight_ih=weight_ih, weight_hh=weight_hh, d_h_last=d_h_last)
    if on_gpu(x):
        with exactly(d_h_last.device.type):
            return cuda.backward(*given, bfloat16)
    call, directions = describe(
        *(weight_ih, weight_hh, x, tokens, lengths, resets, d_h_last, reverse, reset_after),
        bfloat16,
        openmp=kernels.ALWAYS,
    )
    dtype, R = d_h_last.dtype, len(reverse)
    size = kernels.saved_size(call.steps, call.batch, call.hidden, reset_after)
    of_saved = address("saved", saved, (R, size), dtype)
    of_d_h_last = address("d_h_last", d_h_last, d_h_last.shape, dtype)
    of_d_outputs = None
    if d_outputs is not None:  # without return_sequences it has no time steps
        steps = 0 if d_outputs.shape[:1] == (0,) else call.steps
        shape = (steps, call.batch, R * call.hidden)
        of_d_outputs = address("d_outputs", d_outputs, shape, dtype)
    gradients = backward_shapes(*given)
    *of_weights, of_d_x, of_d_h0 = (each.data_ptr() or None for each in gradients[: 4 * R + 2])
    call.d_x = of_d_x
    row = call.hidden * d_h_last.element_size()
    for i, direction in enumerate(directions):
        direction.saved = within_memory(of_saved, i * saved.stride(0) * saved.element_size())
        direction.d_outputs = within_memory(of_d_outputs, i * row)
        direction.d_h_last = within_memory(of_d_h_last, i * call.batch * row)
        for name, place in zip(GRU_PARAMETERS, of_weights[i::R], strict=True):
            setattr(direction, f"d_{name}", place)
        direction.d_h0 = within_memory(of_d_h0, i * call.batch * row)
        if resets is not None:
            direction.d_h_reset = within_memory(
                gradients[-1].data_ptr() or None, i * call.batch * row
            )
    kernels.backward(call, directions)
    return gradients


def backward_shapes(*given: Any) -> list[Tensor]:
    """What backward returns, not filled in, for the same arguments."""
    weight_ih, weight_hh, x, _, d_h_last, saved, _, _, resets, _, _, of_x, *_ = given
    biases = [saved.new_empty(3 * d_h_last.shape[2]) for _ in range(2 * len(weight_ih))]
    return [
        *map(torch.empty_like, weight_ih),
        *map(torch.empty_like, weight_hh),
        *biases,
        torch.empty_like(x) if of_x else saved.new_empty(0),
        *(torch.empty_like(d_h_last) for _ in range(1 if resets is None else 2)),
    ]


forward_operator = torch.library.custom_op(
    "gru::forward", forward, mutates_args=(), device_types=("cpu", "cuda")
)
backward_operator = torch.library.custom_op(
    "gru::backward", backward, mutates_args=(), device_types=("cpu", "cuda")
)
forward_operator.register_fake(forward_shapes)
backward_operator.register_fake(backward_shapes)


def keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Saves for the operator's gradient, which needs no biases and outputs."""
    weight_ih, weight_hh, _, _, x, _, _, tokens, lengths, resets, *how = inputs
    reverse, reset_after, _, _, bfloat16 = how
    places = tokens, lengths.clone(), resets  # see recurrence
    ctx.save_for_backward(*weight_ih, *weight_hh, x, output[2], *places)
    ctx.set_materialize_grads(False)  # zeros as large as saved would cost as much as the forward
    ctx.how = (reverse, reset_after, bfloat16)


def differentiate(
    ctx: Any, d_outputs: Tensor | None, d_h_last: Tensor | None, _: Tensor | None
) -> tuple:
    """The gradients of the operator's arguments; None is a gradient of zero."""
    *weights, x, saved, tokens, lengths, resets = ctx.saved_tensors
    R = len(weights) // 2
    if d_h_last is None:
        d_h_last = saved.new_zeros(R, lengths.shape[0], weights[R].shape[-1])
    d_outputs = None if d_outputs is None else d_outputs.contiguous()
    reverse, reset_after, bfloat16 = ctx.how
    of_x = ctx.needs_input_grad[4]  # the arguments as they were given: weight_ih is one of them
    how = reverse, reset_after, of_x, bfloat16
    rest = (x, d_outputs, d_h_last.contiguous(), saved, tokens, lengths, resets, *how)
    gradients = backward_operator(weights[:R], weights[R:], *rest)
    lists = [gradients[i : i + R] for i in range(0, 4 * R, R)]
    d_x, d_h0, *d_h_reset = gradients[4 * R :]
    d_x = d_x if of_x else None
    given = len(ctx.needs_input_grad)  # without bfloat16, where it has its default
    return *lists, d_x, d_h0, d_h_reset[0] if d_h_reset else None, *[None] * (given - 7)


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
    bfloat16: bool,
    save: bool,
    *arrays: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer by `forward` or its operator, without a gradient but that of the operator."""
    weights, *others = operands(*arrays)
    how = (directions_of(weights[0]), reset_after, return_sequences, save, bfloat16)
    return function(*weights, *others, tokens, lengths, resets, *how)


class Forward(torch.autograd.Function):
    """`compute`, to be differentiated."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        in_memory = plain(*inputs[:3], *inputs[7:])
        return compute(forward if in_memory else forward_operator, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.how = inputs[3:6]
        ctx.save_for_backward(*inputs[:3], output[2], *inputs[7:])
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
            of_x = ctx.needs_input_grad[7]
            gradients = Backward.forward(*places, *ctx.how, of_x, *given)
        return *[None] * 7, *gradients

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
    """A layer's backward, to be differentiated again. Takes tokens to bfloat16, whether the
    gradient of x is wanted, saved, the gradients of outputs (or None) and h_last, and the arrays
    that Forward takes; returns the gradients of those arrays."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor | None, ...]:
        tokens, lengths, resets, reset_after, _, bfloat16, of_x, *gradients = inputs[:10]
        saved, d_outputs, d_h_last = gradients
        (weight_ih, weight_hh, *_), x, *_ = operands(*inputs[10:])
        function = backward if plain(saved, d_outputs, d_h_last, x) else backward_operator
        R = len(weight_ih)
        found = function(
            weight_ih,
            weight_hh,
            x,
            d_outputs,
            d_h_last,
            saved,
            tokens,
            lengths,
            resets,
            directions_of(weight_ih),
            reset_after,
            of_x,
            bfloat16,
        )
        d_weights = [each for i in range(R) for each in found[i : 4 * R : R]]
        return found[4 * R] if of_x else None, *d_weights, *found[4 * R + 1 :]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.how = inputs[3:6]
        ctx.save_for_backward(*inputs[:3], *inputs[8:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        tokens, lengths, resets, d_outputs, *arguments = ctx.saved_tensors
        function = partial(gradients_of, by_scan(tokens, lengths, resets, *ctx.how))
        if d_outputs is None:
            pull = torch.func.vjp(partial(function, None), *arguments)[1]
            return *[None] * 9, *pull(cotangents)
        pull = torch.func.vjp(function, d_outputs, *arguments)[1]
        return *[None] * 8, *pull(cotangents)

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
    bfloat16: bool = False,
) -> Callable[..., Found]:
    """The function of the arrays, in a row, that the kernel computes, written out by gru.py."""
    from torch_impl.gru import scan

    def run(*arrays: Tensor) -> Found:
        x, weights, h0, h_reset = parts(arrays)
        how = {"reset_after": reset_after, "return_sequences": return_sequences}
        with exactly(x.device.type):
            return scan(x, tokens, weights, lengths, h0, resets, h_reset, **how, bfloat16=bfloat16)

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
    weight_ih: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    x: Tensor,
    tokens: Tensor | None,
    lengths: Tensor,
    resets: Tensor | None,
    h0: Tensor,
    reverse: Sequence[bool],
    reset_after: bool,
    bfloat16: bool,
    openmp: int,
) -> tuple[kernels.Problem, Any]:
    """The kernel's picture of a call: sizes, and one description a direction.

    h0, or its gradient, has the sizes that x and tokens do not have. openmp: when the kernel takes
    OpenMP's threads, where they spin at all.
    """
    dtype = h0.dtype
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f'the fused GRU computes in float32 or float64, not {dtype}: implementation="scan" does'
        )
    if bfloat16 and dtype != torch.float32:
        raise TypeError(f"bfloat16: of float32 arrays only, found {dtype}")
    check_shape("h0", h0, "R", "B", "H")
    R, batch, size = h0.shape
    steps, distinct = read_sizes(x, tokens, batch)
    of_tokens, inputs = None, x.shape[-1]
    if tokens is not None:
        # An empty array has no address, yet NULL would say that there are no tokens.
        of_tokens = address("tokens", tokens, tokens.shape, torch.int32) or 1
    call = kernels.Problem(
        steps=steps,
        batch=batch,
        inputs=inputs,
        hidden=size,
        distinct=distinct,
        x=address("x", x, x.shape, dtype),
        tokens=of_tokens,
        lengths=address("lengths", lengths, (batch,), torch.int32),
        resets=None if resets is None else address("resets", resets, (steps, batch), torch.bool),
        is_double=dtype == torch.float64,
        reset_after=reset_after,
        directions=R,
        threads=torch.get_num_threads(),
        openmp=openmp * SPINNING,
        bfloat16=bfloat16,
    )
    directions = (kernels.Direction * R)()
    for i, direction in enumerate(directions):
        direction.reverse = reverse[i]
        direction.ld_outputs = R * size
        direction.weight_ih = address(f"weight_ih[{i}]", weight_ih[i], (3 * size, inputs), dtype)
        direction.weight_hh = address(f"weight_hh[{i}]", weight_hh[i], (3 * size, size), dtype)
    return call, directions
