"""The GRU on the CPU kernel (common/kernels/gru.h) or, through cuda.py, on the GPU kernel. Its twin
is jax_impl/fused.py.

Forward and backward are written by hand in C++. For autograd and torch.func they are two functions,
`Forward` and `Backward`: the kernel computes the gradient, and `scan` (scan.py) computes
derivatives of the gradient and in forward mode. For torch.compile, torch.export and other tracers
they are the operators gru::forward and gru::backward, which can be differentiated once. One call
computes all directions of a layer with torch.get_num_threads() threads, but with no more than the
cores that this process may use.

autograd and operators cannot take a LayerCall. They take `arrays`, its floating-point tensors as a
flat sequence (x, the weights of each direction, h0 and, with resets, h_reset), and `flags`
(reset_after, return_sequences, the index of the product dtype, the number of the cell in gru.h,
which is by default the GRU's).
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common import kernels
from common.arguments import check_shape
from common.cells import LayerCall, dtype_name
from common.kernels import cuda as gpu
from common.params import CELLS, GRU_PARAMETERS, PRODUCT_DTYPES
from torch_impl import cuda
from torch_impl.layers import LayerOutput, is_eager
from torch_impl.memory import (
    address,
    allocate_backward,
    allocate_forward,
    offset,
    pointer,
    read_sizes,
)
from torch_impl.private import is_batched, is_forward_mode, is_tracing, is_transformed
from torch_impl.scan import scan

Flags = Sequence[int]
SCANS: dict[str, Callable[[LayerCall], LayerOutput]] = {"gru": scan}
"""The recurrence of each cell that by_scan calls. torch_impl/rnn.py adds the recurrence of the tanh
RNN, which does not round the factors of products to bfloat16."""
# Evaluated at import time, because torch.compile cannot trace it.
BUILT = kernels.available()
DTYPES = (*kernels.DTYPES, "bfloat16") if kernels.bfloat16() else kernels.DTYPES
# Whether PyTorch's own threads spin for long while they wait for work. The kernel then uses these
# threads, because its own would share the cores with them.
SPINNING = not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}


def available(device: str = "cpu", dtype: Any = "float32", size: int | None = None) -> bool:
    """Whether the kernel is built and supports this kind of device and dtype; it supports all
    sizes.

    bfloat16 is the dtype of the products, for which the processor needs an instruction.
    """
    return BUILT and not gpu.rehearsed and device == "cpu" and dtype_name(dtype) in DTYPES


def lowered(dtype: torch.dtype) -> bool:
    """Whether products are in bfloat16 because of torch.set_float32_matmul_precision("medium").

    The setting applies to float32, if the processor has an instruction for bfloat16 products.
    """
    is_medium = dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"
    return is_medium and "bfloat16" in DTYPES


def recurrence(call: LayerCall) -> LayerOutput:
    """Compute a layer: see Recurrence in common/cells.py. Without return_sequences, outputs are not
    written.

    Raises ValueError for shapes that do not match, lengths outside 0..T and tokens outside 0..K-1,
    and TypeError for a dtype that the kernel does not support.
    """
    x, tokens, weights, lengths, h0, resets, h_reset, *options, product_dtype, cell = call
    flags = [*options, PRODUCT_DTYPES.index(product_dtype), kernels.cell_index(cell)]
    arrays = (x, *(array for each in weights for array in each), h0)
    if resets is not None:
        arrays += (h_reset,)
        resets = resets.contiguous()
    if not torch.compiler.is_compiling() and is_tracing():
        raise RuntimeError(
            "torch.jit.trace cannot record the fused GRU; torch.export can, and torch.jit.trace "
            'can record implementation="scan", for a fixed number of time steps'
        )
    if is_forward_mode() or (torch.compiler.is_compiling() and is_transformed()):
        return by_scan(tokens, lengths, resets, flags)(*arrays)
    # Under a transformation of torch.func, a derivative may follow.
    save = torch.is_grad_enabled() and (
        is_transformed() or any(each.requires_grad for each in arrays)
    )
    tokens = None if tokens is None else tokens.to(torch.int32).contiguous()
    # Backward reads only the time steps that forward has saved, so the lengths are copied: the
    # caller may write to the tensor between forward and backward.
    lengths = lengths.to(torch.int32, copy=save).contiguous()
    is_eager_call = is_eager(tokens, lengths, resets, *arrays)
    places = (tokens, lengths, resets)
    if (is_eager_call and not save) or torch.compiler.is_compiling():
        function = forward_of_arrays if is_eager_call else forward_operator
        outputs, h_last, _ = function([*map(dense, arrays)], *places, flags, save)
    else:
        function_class = Eager if is_eager_call else Forward
        outputs, h_last, _ = function_class.apply(*places, flags, save, *arrays)
    return outputs, h_last


def call_of(
    arrays: Sequence[Tensor],
    tokens: Tensor | None,
    lengths: Tensor,
    resets: Tensor | None,
    flags: Flags,
) -> LayerCall:
    """The LayerCall of these arrays and flags. Raises ValueError if their number is wrong."""
    x, *others = arrays
    R, rest = divmod(len(others), 4)
    cell = flags[3] if len(flags) == 4 else 0
    known = len(flags) in (3, 4) and 0 <= cell < len(kernels.CELLS)
    if R not in (1, 2) or rest != (1 if resets is None else 2) or not known:
        raise ValueError(
            "arrays, flags: expected x, four parameters for each of one or two directions, h0 and, "
            "if resets are given, h_reset; three flags and, optionally, the number of a cell; "
            f"found {len(arrays)} arrays and flags {[*flags]}"
        )
    weights = [others[4 * i : 4 * i + 4] for i in range(R)]
    h_reset = None if resets is None else others[-1]
    options: Any = (*map(bool, flags[:2]), PRODUCT_DTYPES[bool(flags[2])], [*kernels.CELLS][cell])
    return LayerCall(x, tokens, weights, lengths, others[4 * R], resets, h_reset, *options)


def dense(array: Tensor) -> Tensor:
    """The array, contiguous and without lazy negation, which the kernel can read."""
    return array.contiguous().resolve_neg()


def without_autocast(device: str) -> AbstractContextManager:
    """A context in which torch.autocast is disabled; backward may run while it is enabled."""
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def on_gpu(array: Any) -> bool:
    """Whether the GPU kernel computes with this argument, which may be no tensor."""
    return bool(gpu.rehearsed) or getattr(array, "is_cuda", False)


def forward(call: LayerCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(outputs, h_last, saved) of a layer; saved, if requested, is an argument of `backward`."""
    if on_gpu(call.x):
        return cuda.forward(call, save)
    openmp = kernels.ALWAYS if save else kernels.WHILE_SPINNING
    problem, directions = describe(call, call.h0, openmp)
    outputs, h_last, saved = allocate_forward(call, save)
    h0, h_reset = call.h0, call.h_reset
    h0_address = address("h0", h0, h0.shape, h0.dtype)
    h_reset_address = None if h_reset is None else address("h_reset", h_reset, h0.shape, h0.dtype)
    row = problem.hidden * h0.element_size()
    rows = CELLS[call.cell].blocks * problem.hidden
    for i, (direction, weights) in enumerate(zip(directions, call.weights, strict=True)):
        for name, each in zip(GRU_PARAMETERS[2:], weights[2:], strict=True):
            bias = address(f"{name}[{i}]", each, (rows,), h0.dtype)
            setattr(direction, name, bias)
        state = i * problem.batch * row
        direction.h0 = offset(h0_address, state)
        direction.h_reset = offset(h_reset_address, state)
        direction.outputs = offset(pointer(outputs), i * row)
        direction.h_last = offset(pointer(h_last), state)
        direction.saved = offset(pointer(saved), i * saved.stride(0) * saved.element_size())
    kernels.forward(problem, directions)
    return outputs, h_last, saved


def backward(
    call: LayerCall,
    d_outputs: Tensor | None,
    d_h_last: Tensor,
    saved: Tensor,
    of_x: bool,
) -> list[Tensor]:
    """The gradients of the arrays of a layer; without of_x, that of x is empty."""
    if on_gpu(call.x):
        with without_autocast(d_h_last.device.type):
            return cuda.backward(call, d_outputs, d_h_last, saved, of_x)
    problem, directions = describe(call, d_h_last, kernels.ALWAYS)
    dtype, R = d_h_last.dtype, len(call.weights)
    sizes = (problem.steps, problem.batch, problem.hidden)
    size = kernels.saved_size(*sizes, call.reset_after, call.cell)
    saved_address = address("saved", saved, (R, size), dtype)
    d_h_last_address = address("d_h_last", d_h_last, d_h_last.shape, dtype)
    d_outputs_address = None
    if d_outputs is not None:  # without return_sequences it has no time steps
        steps = 0 if d_outputs.shape[:1] == (0,) else problem.steps
        shape = (steps, problem.batch, R * problem.hidden)
        d_outputs_address = address("d_outputs", d_outputs, shape, dtype)
    gradients = allocate_backward(call, d_h_last, of_x)
    d_x, *others = map(pointer, gradients)
    problem.d_x = d_x
    row = problem.hidden * d_h_last.element_size()
    for i, direction in enumerate(directions):
        state = i * problem.batch * row
        direction.saved = offset(saved_address, i * saved.stride(0) * saved.element_size())
        direction.d_outputs = offset(d_outputs_address, i * row)
        direction.d_h_last = offset(d_h_last_address, state)
        for name, place in zip(GRU_PARAMETERS, others[4 * i : 4 * i + 4], strict=True):
            setattr(direction, f"d_{name}", place)
        direction.d_h0 = offset(others[4 * R], state)
        if call.resets is not None:
            direction.d_h_reset = offset(others[4 * R + 1], state)
    kernels.backward(problem, directions)
    return gradients


def forward_of_arrays(
    arrays: Sequence[Tensor],
    tokens: Tensor | None,
    lengths: Tensor,
    resets: Tensor | None,
    flags: Sequence[int],
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` with the arguments of an operator."""
    if is_forward_mode():  # an operator would silently omit the derivative
        raise RuntimeError(
            f"the operator gru::forward has no forward-mode derivative: {ALTERNATIVES}"
        )
    return forward(call_of(arrays, tokens, lengths, resets, flags), save)


def backward_of_arrays(
    arrays: Sequence[Tensor],
    tokens: Tensor | None,
    lengths: Tensor,
    resets: Tensor | None,
    flags: Sequence[int],
    d_outputs: Tensor | None,
    d_h_last: Tensor,
    saved: Tensor,
    of_x: bool,
) -> list[Tensor]:
    """`backward` with the arguments of an operator."""
    return backward(
        call_of(arrays, tokens, lengths, resets, flags), d_outputs, d_h_last, saved, of_x
    )


forward_operator = torch.library.custom_op(
    "gru::forward", forward_of_arrays, mutates_args=(), device_types=("cpu", "cuda")
)
backward_operator = torch.library.custom_op(
    "gru::backward", backward_of_arrays, mutates_args=(), device_types=("cpu", "cuda")
)


@forward_operator.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *call_arguments, save = inputs
    return allocate_forward(call_of(*call_arguments), save)


@backward_operator.register_fake
def _(*inputs: Any) -> list[Tensor]:
    *call_arguments, _, d_h_last, _, of_x = inputs
    return allocate_backward(call_of(*call_arguments), d_h_last, of_x)


def save_for_gradient(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Save the tensors for the operator's gradient."""
    arrays, tokens, lengths, resets, ctx.flags, _ = inputs
    # A copy, because the caller may write to lengths: see recurrence.
    ctx.save_for_backward(*arrays, output[2], tokens, lengths.clone(), resets)
    ctx.set_materialize_grads(False)  # zeros as large as saved would cost as much as the forward


def differentiate(
    ctx: Any, d_outputs: Tensor | None, d_h_last: Tensor | None, _: Tensor | None
) -> tuple:
    """The gradients of the operator's arguments; None stands for a gradient of zero."""
    *arrays, saved, tokens, lengths, resets = ctx.saved_tensors
    places = (tokens, lengths, resets)
    h0 = call_of(arrays, *places, ctx.flags).h0
    d_outputs = None if d_outputs is None else d_outputs.contiguous()
    d_h_last = torch.zeros_like(h0) if d_h_last is None else d_h_last.contiguous()
    of_x = ctx.needs_input_grad[0][0]
    arguments = (d_outputs, d_h_last, saved, of_x)
    d_x, *others = backward_operator(arrays, *places, ctx.flags, *arguments)
    return [d_x if of_x else None, *others], *[None] * 5


def raise_no_derivative(*_: Any) -> None:
    """Raise RuntimeError, because the operator gru::backward cannot be differentiated."""
    raise RuntimeError(f"the operator gru::backward has no derivative: {ALTERNATIVES}")


ALTERNATIVES = 'the layer outside of torch.compile, and implementation="scan", have all derivatives'


forward_operator.register_autograd(differentiate, setup_context=save_for_gradient)
backward_operator.register_autograd(raise_no_derivative)


class Forward(torch.autograd.Function):
    """A differentiable layer. Takes tokens, lengths, resets, flags, save and the arrays."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        tokens, lengths, resets, flags, save, *arrays = inputs
        places = (tokens, lengths, resets)
        function = forward_of_arrays if is_eager(*places, *arrays) else forward_operator
        return function([*map(dense, arrays)], *places, flags, save)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.flags = inputs[3]
        ctx.save_for_backward(*inputs[:3], output[2], *inputs[5:])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)  # zeros as large as saved would cost as much as forward

    @staticmethod
    def backward(
        ctx: Any, d_outputs: Tensor | None, d_h_last: Tensor | None, _: Tensor | None
    ) -> tuple:
        # Read once: torch.utils.checkpoint, which recomputes these tensors, allows no second time.
        tokens, lengths, resets, saved, *arrays = ctx.saved_tensors
        places = (tokens, lengths, resets)
        d_outputs = None if d_outputs is None else dense(d_outputs)
        d_h_last = torch.zeros_like(arrays[-1]) if d_h_last is None else dense(d_h_last)
        arguments = (saved, d_outputs, d_h_last, *arrays)
        if is_forward_mode() or any(
            is_batched(each) for each in arguments[1:3] if each is not None
        ):
            function = by_scan(*places, ctx.flags)
            gradients: tuple = gradients_of(function, d_outputs, d_h_last, *arrays)
        elif torch.is_grad_enabled() or is_transformed():
            gradients = Backward.apply(*places, ctx.flags, True, *arguments)
        else:
            of_x = ctx.needs_input_grad[5]
            gradients = Backward.forward(*places, ctx.flags, of_x, *arguments)
        return *[None] * 5, *gradients

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple[tuple, tuple]:
        return vmap_by_loop(Forward.apply, info, in_dims, inputs)


class Eager(torch.autograd.Function):
    """`Forward` for eager mode, without setup_context. Only torch.func requires setup_context; a
    function that has one is slower, because PyTorch inspects the signature at every call, which
    takes a tenth of the time of a short call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        tokens, lengths, resets, flags, save, *arrays = inputs
        places = (tokens, lengths, resets)
        output = forward_of_arrays([*map(dense, arrays)], *places, flags, save)
        Forward.setup_context(ctx, inputs, output)
        return output

    backward = Forward.backward


class Backward(torch.autograd.Function):
    """The differentiable backward of a layer. Takes tokens, lengths, resets, flags, whether to
    compute the gradient of x, saved, the gradients of outputs (or None) and h_last, and the arrays;
    returns the gradients of the arrays."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor | None, ...]:
        tokens, lengths, resets, flags, of_x, saved, d_outputs, d_h_last, *arrays = inputs
        arrays = [*map(dense, arrays)]
        is_eager_call = is_eager(saved, d_outputs, d_h_last, arrays[0])
        function = backward_of_arrays if is_eager_call else backward_operator
        places, arguments = (tokens, lengths, resets), (d_outputs, d_h_last, saved, of_x)
        d_x, *others = function(arrays, *places, flags, *arguments)
        return d_x if of_x else None, *others

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.flags = inputs[3]
        ctx.save_for_backward(*inputs[:3], *inputs[6:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        tokens, lengths, resets, d_outputs, *arguments = ctx.saved_tensors
        function = partial(gradients_of, by_scan(tokens, lengths, resets, ctx.flags))
        if d_outputs is None:
            pull = torch.func.vjp(partial(function, None), *arguments)[1]
            return *[None] * 7, *pull(cotangents)
        pull = torch.func.vjp(function, d_outputs, *arguments)[1]
        return *[None] * 6, *pull(cotangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple[tuple, tuple]:
        return vmap_by_loop(Backward.apply, info, in_dims, inputs)


def by_scan(
    tokens: Tensor | None, lengths: Tensor, resets: Tensor | None, flags: Flags
) -> Callable[..., LayerOutput]:
    """A function of the arrays with the kernel's result, computed by operations of PyTorch."""

    def run(*arrays: Tensor) -> LayerOutput:
        with without_autocast(arrays[0].device.type):
            call = call_of(arrays, tokens, lengths, resets, flags)
            return SCANS[call.cell](call)

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


def vmap_by_loop(
    apply: Callable[..., tuple[Tensor, ...]], info: Any, in_dims: tuple, inputs: tuple
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """torch.func.vmap of Forward or Backward: one call for each entry of the new axis."""

    def entry(i: int) -> tuple[Tensor, ...]:
        return apply(
            *(
                each.select(dim, i).contiguous() if isinstance(dim, int) else each
                for each, dim in zip(inputs, in_dims, strict=True)
            )
        )

    results = tuple(map(torch.stack, zip(*map(entry, range(info.batch_size)), strict=True)))
    return results, (0,) * len(results)


def describe(call: LayerCall, h0: Tensor, openmp: int) -> tuple[kernels.Problem, Any]:
    """The kernel's description of a call: the sizes, and a description of each direction.

    h0: the initial states or, with the same sizes, the gradient of the last ones. openmp: when the
    kernel uses OpenMP's threads, provided that these spin.

    Raises ValueError for a wrong shape and TypeError for a wrong dtype.
    """
    x, tokens, lengths, resets, dtype = call.x, call.tokens, call.lengths, call.resets, h0.dtype
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f'the fused GRU computes in float32 or float64, not {dtype}: implementation="scan" does'
        )
    in_bfloat16 = call.product_dtype == "bfloat16"
    if in_bfloat16 and dtype != torch.float32:
        raise TypeError(f"bfloat16: requires float32 arrays, found {dtype}")
    check_shape("h0", h0, len(call.weights), "B", "H")
    R, batch, size = h0.shape
    steps, distinct = read_sizes(x, tokens, batch)
    tokens_address, inputs = None, x.shape[-1]
    if tokens is not None:
        # An empty array has no address, yet NULL would say that there are no tokens.
        tokens_address = address("tokens", tokens, tokens.shape, torch.int32) or 1
    problem = kernels.Problem(
        steps=steps,
        batch=batch,
        inputs=inputs,
        hidden=size,
        distinct=distinct,
        x=address("x", x, x.shape, dtype),
        tokens=tokens_address,
        lengths=address("lengths", lengths, (batch,), torch.int32),
        resets=None if resets is None else address("resets", resets, (steps, batch), torch.bool),
        is_double=dtype == torch.float64,
        reset_after=call.reset_after,
        directions=R,
        threads=torch.get_num_threads(),
        openmp=openmp * SPINNING,
        bfloat16=in_bfloat16 or lowered(dtype),
        cell=kernels.cell_index(call.cell),
    )
    rows = CELLS[call.cell].blocks * size
    directions = (kernels.Direction * R)()
    for i, (direction, weights) in enumerate(zip(directions, call.weights, strict=True)):
        direction.reverse = i == 1
        direction.ld_outputs = R * size
        for name, each, columns in zip(GRU_PARAMETERS, weights, (inputs, size), strict=False):
            place = address(f"{name}[{i}]", each, (rows, columns), dtype)
            setattr(direction, name, place)
    return problem, directions
