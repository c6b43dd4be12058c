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
UNREADABLE = -1  # where no array lies
NO_GRADIENTS = (0,) * 9  # the last fields of a direction
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
    if torch.is_grad_enabled() and wanted(
        (x, h0, lengths, tokens, resets, h_reset, *chain.from_iterable(chain(*layers)))
    ):
        return None
    recurrent, read = layers[0][0][1], x if tokens is None else tokens
    if type(x) not in TYPES or type(recurrent) not in TYPES or type(read) not in TYPES:
        return None
    dtype = x.dtype
    if (
        dtype not in (DTYPES[:1] if bfloat16 else DTYPES)
        or (read.dim(), x.dim()) not in DIMENSIONS
        or recurrent.dim() != 2
        or x.layout is not STRIDED
    ):
        return None
    x = x.contiguous()  # of rows first, it is not
    (steps, batch, *_), (*_, size), R, H = read.shape, x.shape, len(layers[0]), recurrent.shape[1]
    of_states = len(layers) * R, batch, H
    of_x, of_tokens, of_lengths, of_resets, of_h0, of_h_reset = places = (
        place(x, x.shape, dtype),
        place(tokens, (steps, batch), torch.int32),
        place(lengths, (batch,), torch.int32),
        place(resets, (steps, batch), torch.bool),
        place(h0, of_states, dtype),
        place(h_reset, of_states, dtype),
    )
    if UNREADABLE in places or (resets is None and h_reset is not None):
        return None
    if h_reset is None and resets is not None:
        of_h_reset = of_h0
    h_last = x.new_empty(of_states)
    of_h_last, row = h_last.data_ptr(), H * x.element_size()
    distinct = steps * batch if tokens is None else x.shape[0]
    for number, sides in enumerate(layers, 1):
        sequences = return_sequences or number < len(layers)
        outputs = x.new_empty(steps if sequences else 0, batch, R * H)
        of_outputs = outputs.data_ptr()
        directions = b""
        for i, (weight_ih, weight_hh, bias_ih, bias_hh) in enumerate(sides):
            weights = (
                place(weight_ih, (3 * H, size), dtype),
                place(weight_hh, (3 * H, H), dtype),
                place(bias_ih, (3 * H,), dtype),
                place(bias_hh, (3 * H,), dtype),
            )
            if UNREADABLE in weights or 0 in weights:
                return None
            directions += kernels.DIRECTION.pack(
                i,
                R * H,
                *weights,
                of_h0,
                of_h_reset,
                of_outputs and of_outputs + i * row,
                of_h_last,
                *NO_GRADIENTS,
            )
            of_h_last += batch * row
            of_h0 = of_h0 and of_h0 + batch * row
            of_h_reset = of_h_reset and of_h_reset + batch * row
        problem = kernels.PROBLEM.pack(
            steps,
            batch,
            size,
            H,
            distinct,
            of_x,
            of_tokens,
            of_lengths,
            of_resets,
            dtype == torch.float64,
            reset_after,
            nn_order,
            R,
            torch.get_num_threads(),
            False,  # no OpenMP: beside busy programs a short text would wait for its threads
            bfloat16,
            0,
        )
        kernels.forward(problem, directions)
        x, of_x, of_tokens, size, distinct = outputs, of_outputs, 0, R * H, steps * batch
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


def wanted(arrays: Sequence[Any]) -> bool:
    """Whether a gradient is, of one of them."""
    return any(getattr(each, "requires_grad", False) for each in arrays)


def place(array: Any, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Where an array lies in memory, UNREADABLE where the kernel cannot read it, 0 for None."""
    if array is None:
        return 0
    if (
        type(array) in TYPES
        and array.shape == shape
        and array.dtype is dtype
        and array.is_cpu
        and array.layout is STRIDED
        and array.is_contiguous()
        and not array.is_neg()
    ):
        return array.data_ptr() or UNREADABLE
    return UNREADABLE
