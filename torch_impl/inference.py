"""The short path of the GRU on the CPU kernel, for calls without derivatives. JAX needs none.

For a short text, the kernel takes less time than validating ten tensors in Python. Here, the kernel
reads the tensors' properties itself (common/kernels/tensors.cpp) and only decides whether it can
read their memory as it is. If it cannot, or if PyTorch records, transforms or differentiates, `run`
in layers.py takes the general path, which validates, converts and raises errors.
"""

from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from common import kernels
from common.cells import LayerCall
from common.kernels import cuda
from common.params import GRU_PARAMETERS, PRODUCT_DTYPES, structure
from torch_impl.fused import SPINNING, available, lowered
from torch_impl.layers import LayerOutput
from torch_impl.private import count_dispatch_modes, is_forward_mode, is_tracing, is_transformed

PRODUCTS = PRODUCT_DTYPES if available(dtype="bfloat16") else ("float32",)
TYPES = {Tensor, nn.Parameter}
COMPUTE = kernels.of_tensors(Tensor)
UNREADABLE = -1  # the status if the kernel cannot read an array
STRIDED = torch.strided
# Bound to global names, because looking up rarely used attributes is slow.
is_neg, is_autocast_enabled = Tensor.is_neg, torch.is_autocast_enabled
DIMENSIONS = ((3, 3, 2), (2, 2, 2))  # of x or, if given, tokens; of x; of weight_hh


def of_parameters(parameters: Any, call: LayerCall) -> LayerOutput | None:
    """`try_inference_kernel` of the canonical parameters, as `run` takes them."""
    if torch.compiler.is_compiling() or type(parameters) is not dict or call.lengths is None:
        return None
    names = weights_of(tuple(parameters))
    if names is None:
        return None
    return try_inference_kernel([[parameters[name] for name in layer] for layer in names], call)


@cache
def weights_of(names: tuple[str, ...]) -> list[list[str]] | None:
    """The names of the weights of each layer, by direction; None if one is missing."""
    try:
        layers, directions = structure(names)
    except ValueError:
        return None
    weights = [
        [f"gru.{i}.{side}.{name}" for side in directions for name in GRU_PARAMETERS]
        for i in range(layers)
    ]
    return weights if set(names) >= set(chain(*weights)) else None


def try_inference_kernel(
    layers: Sequence[Sequence[Any]], call: LayerCall, nn_order: bool = False
) -> LayerOutput | None:
    """The result of `run`, or None if the call needs the general path.

    layers: the weights of each layer, direction after direction; with nn_order, their gates are in
    nn.GRU's order. Without lengths, every row has all steps.

    Raises ValueError for lengths and tokens that are out of range.
    """
    if torch.compiler.is_compiling() or COMPUTE is None or cuda.rehearsed or observed():
        return None
    x, tokens, _, lengths, h0, resets, h_reset, reset_after, return_sequences, products, _ = call
    if products not in PRODUCTS:
        return None
    if torch.is_grad_enabled() and wanted(
        (x, h0, lengths, tokens, resets, h_reset, *chain(*layers))
    ):
        return None
    if resets is None and h_reset is not None:
        return None
    others = lengths, resets, h0, h0 if h_reset is None else h_reset
    recurrent, read = layers[0][1], x if tokens is None else tokens
    tensors = [each for each in chain((x, tokens), others, *layers) if each is not None]
    if not TYPES.issuperset(map(type, tensors)) or any(map(is_neg, tensors)):
        return None
    if x is None or recurrent is None or x.layout is not STRIDED:
        return None
    if (read.dim(), x.dim(), recurrent.dim()) not in DIMENSIONS:
        return None
    x = x.contiguous()  # with batch_first, it is a transposed view
    bfloat16 = products == "bfloat16" or lowered(x.dtype)
    (steps, batch, *_), R, H = read.shape, len(layers[0]) // 4, recurrent.shape[1]
    h_last = x.new_empty(len(layers) * R, batch, H)
    threads = torch.get_num_threads()
    for number, each in enumerate(layers):
        sequences = return_sequences or number + 1 < len(layers)
        outputs = x.new_empty(steps if sequences else 0, batch, R * H)
        status = COMPUTE(
            [x, tokens, *others, outputs if sequences else None, h_last, *each],
            number,
            len(layers),
            R,
            reset_after,
            nn_order,
            threads,
            SPINNING,
            bfloat16,
        )
        if status == UNREADABLE:
            return None
        if status:
            raise kernels.ERRORS[status]
        x, tokens = outputs, None
    return outputs, h_last


def observed() -> bool:
    """Whether PyTorch records or transforms this call, or casts its arguments."""
    return (
        is_transformed()
        or is_forward_mode()
        or count_dispatch_modes() > 0
        or is_tracing()
        or is_autocast_enabled("cpu")
    )


def wanted(arrays: Sequence[Any]) -> bool:
    """Whether one of the arrays requires a gradient."""
    return any(getattr(each, "requires_grad", False) for each in arrays)
