"""The GRU on the CPU kernel where nothing but its results is wanted; JAX needs no such thing.

A short text takes the kernel less time than PyTorch's Python takes to ask ten tensors about
themselves. So here they are asked once, only whether the kernel can read them as they are. Where
one cannot be read, or somebody records, transforms or differentiates, the long way is taken (see
run in layers.py): it finds out what is the matter, and says so or does what can be done.
"""

from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from common import kernels
from common.kernels import cuda
from common.params import GRU_PARAMETERS, structure
from torch_impl.fused import BUILT, available
from torch_impl.layers import Found, forward_mode, transformed

BFLOAT16 = available(dtype="bfloat16")
TYPES = {Tensor, nn.Parameter}
OPTIONAL = {*TYPES, type(None)}
STRIDED = torch.strided
DTYPES = (torch.float32, torch.float64)
DIMENSIONS = ((3, 3), (2, 2))  # of tokens, or else x, and of x


def of_parameters(parameters: Any, x: Any, lengths: Any, *given: Any, **how: Any) -> Found | None:
    """`at_once` of the canonical parameters, from x to h_reset, as `gru` takes them."""
    if torch.compiler.is_compiling() or type(parameters) is not dict or lengths is None:
        return None
    names = weights_of(tuple(parameters))
    if names is None:
        return None
    layers = [[[parameters[name] for name in side] for side in layer] for layer in names]
    return at_once(layers, x, lengths, *given, **how)


@cache
def weights_of(names: tuple[str, ...]) -> list[list[list[str]]] | None:
    """The names of the weights of each direction of each layer; None if one is missing."""
    try:
        layers, directions = structure(names)
    except ValueError:
        return None
    places = [[f"gru.{i}.{side}." for side in directions] for i in range(layers)]
    found = [[[place + name for name in GRU_PARAMETERS] for place in each] for each in places]
    complete = set(names) >= {name for layer in found for side in layer for name in side}
    return found if complete else None


def at_once(
    layers: Sequence[Sequence[Sequence[Any]]],
    x: Tensor,
    lengths: Tensor | None,
    h0: Tensor | None = None,
    tokens: Tensor | None = None,
    resets: Tensor | None = None,
    h_reset: Tensor | None = None,
    *,
    reset_after: bool,
    return_sequences: bool = True,
    nn_order: bool = False,
    bfloat16: bool = False,
) -> Found | None:
    """What `run` returns, or None where it has to take the long way.

    layers: the weights of each direction of each layer, tensors if all is well; with nn_order,
    their gates are in nn.GRU's order. Without lengths, every row has all steps.

    Raises ValueError for lengths and tokens that are out of range.
    """
    if torch.compiler.is_compiling() or not BUILT or cuda.rehearsed or observed():
        return None
    if bfloat16 is not False and not (bfloat16 is True and BFLOAT16):
        return None
    given = (x, *chain.from_iterable(chain(*layers)))
    optional = (h0, lengths, tokens, resets, h_reset)
    if not TYPES.issuperset(map(type, given)) or not OPTIONAL.issuperset(map(type, optional)):
        return None
    if torch.is_grad_enabled() and wanted((*given, *optional)):
        return None
    dtype, hidden, R = x.dtype, layers[0][0][1].shape, len(layers[0])
    read = x.shape if tokens is None else tokens.shape
    if (
        dtype not in (DTYPES[:1] if bfloat16 else DTYPES)
        or len(hidden) != 2
        or (len(read), x.dim()) not in DIMENSIONS
        or x.layout is not STRIDED
    ):
        return None
    (steps, batch), H, size = read[:2], hidden[1], x.shape[-1]
    x = x.contiguous()  # of rows first, it is not
    of_x, of_lengths, of_tokens, of_resets, of_h0, of_h_reset = places = [
        place(x, x.shape, dtype),
        lengths if lengths is None else place(lengths, (batch,), torch.int32),
        tokens if tokens is None else place(tokens, (steps, batch), torch.int32),
        resets if resets is None else place(resets, (steps, batch), torch.bool),
        h0 if h0 is None else place(h0, (len(layers) * R, batch, H), dtype),
        h_reset if h_reset is None else place(h_reset, (len(layers) * R, batch, H), dtype),
    ]
    of_weights = []
    for sides in layers:
        for weight_ih, weight_hh, bias_ih, bias_hh in sides:
            of_weights += [
                place(weight_ih, (3 * H, size), dtype),
                place(weight_hh, (3 * H, H), dtype),
                place(bias_ih, (3 * H,), dtype),
                place(bias_hh, (3 * H,), dtype),
            ]
        size = R * H
    if 0 in places or 0 in of_weights or (resets is None and h_reset is not None):
        return None
    if h_reset is None and resets is not None:
        of_h_reset = of_h0
    h_last = x.new_empty(len(layers) * R, batch, H)
    of_h_last, row = h_last.data_ptr(), H * x.element_size()
    for number in range(len(layers)):
        sequences = return_sequences or number < len(layers) - 1
        outputs = x.new_empty(steps if sequences else 0, batch, R * H)
        of_outputs = outputs.data_ptr()
        problem = kernels.Problem(
            steps,
            batch,
            x.shape[-1],
            H,
            steps * batch if of_tokens is None else x.shape[0],
            of_x,
            of_tokens,
            of_lengths,
            of_resets,
            dtype == torch.float64,
            reset_after,
            nn_order,
            R,
            torch.get_num_threads(),
            False,  # no OpenMP: threads that spin beside are rare here
            bfloat16,
        )
        directions = (kernels.Direction * R)()
        for i, direction in enumerate(directions):
            own = (number * R + i) * batch * row
            direction.reverse = i
            direction.ld_outputs = R * H
            (
                direction.weight_ih,
                direction.weight_hh,
                direction.bias_ih,
                direction.bias_hh,
            ) = of_weights[4 * (number * R + i) :][:4]
            if of_h0 is not None:
                direction.h0 = of_h0 + own
            if of_h_reset is not None:
                direction.h_reset = of_h_reset + own
            if sequences:
                direction.outputs = of_outputs + i * row
            direction.h_last = of_h_last + own
        kernels.forward(problem, directions)
        x, of_x, of_tokens = outputs, of_outputs, None
    return outputs, h_last


def observed() -> bool:
    """Whether more is to be done than to compute."""
    return (
        transformed()
        or forward_mode()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch.is_autocast_enabled("cpu")
    )


def wanted(arrays: Sequence[Tensor | None]) -> bool:
    """Whether a gradient is, of one of them."""
    return any(each is not None and each.requires_grad for each in arrays)


def place(array: Tensor, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Where an array lies in memory, or 0 if the kernel cannot read it as it is."""
    if (
        array.shape == shape
        and array.dtype is dtype
        and array.is_cpu
        and array.layout is STRIDED
        and array.is_contiguous()
        and not array.is_neg()
    ):
        return array.data_ptr()
    return 0
