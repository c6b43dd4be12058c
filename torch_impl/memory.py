"""What fused.py and cuda.py hand to a kernel, which believes what it is told about memory: so each
array is looked at here, whoever calls. Those of inference.py and of JAX are looked at in C++, by
common/kernels/tensors.cpp and xla.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.arguments import check_shape

CPU = torch.device("cpu")


def read_sizes(x: Tensor, tokens: Tensor | None, batch: int) -> tuple[int, int]:
    """T and K. Raises TypeError for no tensors, ValueError for wrong dimensions."""
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
    """Where in memory an array lies; None, which a kernel takes for absent, if it is empty.

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


def within_memory(place: int | None, offset: int) -> int | None:
    """An address so many bytes behind another, if there is one."""
    return None if place is None else place + offset
