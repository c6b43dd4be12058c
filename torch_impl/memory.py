"""The addresses of tensors that fused.py and cuda.py pass to a kernel, and the tensors of results.

A kernel cannot validate addresses, so all of them are validated here. The tensors of inference.py
and the arrays of JAX are validated in C++, by common/kernels/tensors.cpp and xla.cpp.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common import kernels
from common.arguments import check_shape
from common.cells import LayerCall

CPU = torch.device("cpu")


def read_sizes(x: Tensor, tokens: Tensor | None, batch: int) -> tuple[int, int]:
    """T and K. Raises TypeError for other types than tensors, ValueError for wrong dimensions."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, found {type(x).__name__}")
    if tokens is None:
        check_shape("x", x, "T", batch, "D")
        return x.shape[0], x.shape[0] * batch
    check_shape("x", x, "K", "D")
    check_shape("tokens", tokens, "T", batch)
    return tokens.shape[0], x.shape[0]


def address(
    name: str,
    array: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device = CPU,
) -> int | None:
    """The address of an array, or None if empty; a kernel treats a null pointer as absent.

    Raises ValueError or TypeError for an array of another shape, dtype or device, or that is not
    dense and contiguous.
    """
    if not isinstance(array, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, found {type(array).__name__}")
    if array.shape != shape:
        check_shape(name, array, *shape)
    if array.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, found {array.dtype}")
    if array.device != device or not array.is_contiguous() or array.is_neg():
        raise ValueError(f"{name}: expected a contiguous tensor on {device}")
    if not array.numel():
        return None
    place = array.data_ptr()
    if not place:
        raise ValueError(f"{name}: expected a tensor with memory, found {type(array).__name__}")
    return place


def pointer(array: Tensor) -> int | None:
    """The address of a tensor that this project has allocated; None if it is empty."""
    return array.data_ptr() or None


def offset(place: int | None, size: int) -> int | None:
    """The address `size` bytes after another; None if that is None."""
    return None if place is None else place + size


def allocate_forward(call: LayerCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized tensors for the result of fused.forward for the same arguments."""
    R, batch, size = call.h0.shape
    saved = kernels.saved_size(call.steps, batch, size, call.reset_after, call.cell) if save else 0
    steps = call.steps if call.return_sequences else 0
    outputs = call.h0.new_empty(steps, batch, R * size)
    return outputs, torch.empty_like(call.h0), call.h0.new_empty(R, saved)


def allocate_backward(call: LayerCall, d_h_last: Tensor, of_x: bool) -> list[Tensor]:
    """Uninitialized tensors for the result of fused.backward for the same arguments."""
    gradients = [torch.empty_like(call.x) if of_x else d_h_last.new_empty(0)]
    for weight_ih, weight_hh, *_ in call.weights:
        gradients += [torch.empty_like(weight_ih), torch.empty_like(weight_hh)]
        gradients += [d_h_last.new_empty(len(weight_hh)) for _ in range(2)]
    states = 1 if call.resets is None else 2
    return [*gradients, *(torch.empty_like(d_h_last) for _ in range(states))]
