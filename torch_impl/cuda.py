"""The GRU on an NVIDIA GPU (common/kernels/cuda). Its twin is jax_impl/cuda.py.

The kernel computes the recurrence; PyTorch computes the products before and after it, over all
steps at once. The factors of the kernel's products are rounded to TF32, as in nn.GRU, unless
torch.backends.cudnn.allow_tf32 is false or cudnn.rnn.fp32_precision is "ieee". `forward` and
`backward` serve fused.py, which contains the operators and the rules of differentiation.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.arguments import check_shape
from common.cells import LayerCall, dtype_name
from common.kernels import cuda
from torch_impl.bfloat16 import rounded
from torch_impl.layers import without_padding
from torch_impl.memory import address, allocate_forward, read_sizes

PARTS = 4  # of the long sums
OTHERS = {"tokens": torch.int32, "lengths": torch.int32, "resets": torch.bool}  # than float32


def available(device: str = "cuda", dtype: Any = "float32", size: int | None = None) -> bool:
    """Whether the current device has a kernel for this kind of device, dtype and number of units.

    The kernel is neither compiled nor run.
    """
    is_served = cuda.served(device, dtype)
    return is_served and exists(cuda.units(size), dtype_name(dtype))


def proven(dtype: Any, size: int | None) -> bool:
    """Whether a trial has shown that the current device's kernel is correct; see trial.py."""
    return passes(cuda.units(size), dtype_name(dtype))


def exists(size: int | None, product_dtype: str) -> bool:
    """Whether the current device has a kernel for this number of units."""
    if not cuda.driver() or not (cuda.rehearsed or torch.cuda.is_available()):
        return False
    instance = size is None or cuda.instance(size, factors_of(product_dtype), False, False, arch())
    return bool(instance)


def passes(size: int | None, product_dtype: str) -> bool:
    """Whether the current device's kernel for this number of units passes its trial."""
    if size is None:
        return True
    if not cuda.installed():
        return False
    from common.kernels.cuda import trial  # imports what a layer on a CPU does not need

    kernel = (size, factors_of(product_dtype), arch())
    device = ("emulated", 0)
    if not cuda.rehearsed:
        device = (torch.cuda.get_device_name(), torch.cuda.current_device())
    return trial.trusted("torch_impl", *kernel, *device)


def prepare(device: int, factors: str) -> None:
    """Set the device and the kind of factors in this process, which runs a trial."""
    torch.backends.cudnn.allow_tf32 = factors == "Tf32"
    if not cuda.rehearsed:
        torch.cuda.set_device(device)


# torch.compile cannot trace these functions. Without CUDA, they are not called.
if torch.backends.cuda.is_built():  # imports Dynamo, which takes a second
    exists, passes = map(torch.compiler.assume_constant_result, (exists, passes))


def factors_of(product_dtype: str) -> str:
    """The kernel's name of the type of a product's factors."""
    if product_dtype == "bfloat16":
        return "Bf16"
    # nn.GRU's own switch or, if it is "none", the general one: "tf32" or "ieee".
    for switch in (torch.backends.cudnn.rnn, torch.backends.cudnn, torch.backends):
        precision = getattr(switch, "fp32_precision", "none")
        if precision != "none":
            return "Tf32" if precision == "tf32" else "Float32"
    return "Float32"


def arch(device: torch.device | None = None) -> cuda.Arch:
    """The compute capability of a device, or the current one."""
    return cuda.rehearsed or torch.cuda.get_device_capability(device)


def array(values: np.ndarray) -> Tensor:
    """A NumPy array as a tensor on the current device."""
    return torch.tensor(values, device="cpu" if cuda.rehearsed else "cuda")


def forward(call: LayerCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The result of fused.forward for the same arguments."""
    x, h0 = call.x, call.h0
    check_shape("h0", h0, len(call.weights), "B", "H")
    R, batch, size = h0.shape
    steps, distinct = read_sizes(x, call.tokens, batch)
    factor = rounded if call.product_dtype == "bfloat16" else lambda array: array
    rows = factor(x.flatten(0, -2))
    projections = torch.stack([torch.addmm(b, rows, factor(W).T) for W, _, b, _ in call.weights])
    outputs, h_last, saved = allocate_forward(call, save)
    arrays = {
        "projections": (projections, (R, distinct, 3 * size)),
        "bias_hh": (torch.stack([c for *_, c in call.weights]), (R, 3 * size)),
        "h0": (h0, (R, batch, size)),
        "h_reset": (call.h_reset, (R, batch, size)),
        "tokens": (call.tokens, (steps, batch)),
        "outputs": (outputs, outputs.shape),
        "h_last": (h_last, h_last.shape),
        "saved": (saved, saved.shape),
    }
    run(call, arrays, (steps, batch, size, distinct, R), backward=False)
    return outputs, h_last, saved


def backward(
    call: LayerCall,
    d_outputs: Tensor | None,
    d_h_last: Tensor,
    saved: Tensor,
    of_x: bool,
) -> list[Tensor]:
    """The result of fused.backward for the same arguments."""
    x, tokens, resets = call.x, call.tokens, call.resets
    check_shape("d_h_last", d_h_last, len(call.weights), "B", "H")
    R, batch, size = d_h_last.shape
    steps, distinct = read_sizes(x, tokens, batch)
    factor = rounded if call.product_dtype == "bfloat16" else lambda array: array
    record = 5 if call.reset_after else 4  # saved numbers per unit
    d_a = saved.new_empty(R, steps * batch, 3 * size)
    d_q = saved.new_empty(R, steps * batch if call.reset_after else 0, size)
    d_h0, d_h_reset = torch.empty_like(d_h_last), torch.empty_like(d_h_last)
    if d_outputs is not None and d_outputs.shape[0] == 0:
        d_outputs = None
    arrays = {
        "d_outputs": (d_outputs, (steps, batch, R * size)),
        "d_h_last": (d_h_last, (R, batch, size)),
        "saved": (saved, (R, steps * batch * size * record)),
        "d_a": (d_a, d_a.shape),
        "d_q": (d_q, d_q.shape),
        "d_h0": (d_h0, d_h0.shape),
        "d_h_reset": (None if resets is None else d_h_reset, d_h0.shape),
    }
    run(call, arrays, (steps, batch, size, distinct, R), backward=True)
    kept = saved.view(R, steps * batch, record * size)
    before = kept[..., 3 * size : 4 * size]
    d_zr, d_n = d_a.split([2 * size, size], dim=-1)
    if call.reset_after:
        d_n, gated = d_q, before
    else:
        gated = kept[..., size : 2 * size] * before
    d_weight_hh = torch.cat(
        [over_steps(factor(d_zr), factor(before)), over_steps(factor(d_n), factor(gated))], dim=1
    )
    d_bias_ih = d_a.sum(dim=1)
    d_bias_hh = torch.cat([d_bias_ih[:, : 2 * size], d_n.sum(dim=1)], dim=1)
    d_rows = d_a  # the gradients of the projections, summed for each distinct input
    if tokens is not None:
        at = tokens.flatten().clamp(0, max(distinct - 1, 0))
        d_rows = d_a.new_zeros(R, distinct, 3 * size)
        d_rows = d_rows.index_add_(1, at, d_a) if distinct else d_rows
    d_rows, rows = factor(d_rows), factor(without_padding(x, tokens, call.lengths).flatten(0, -2))
    d_x = saved.new_empty(0)
    if of_x:
        d_x = sum(d @ factor(W) for d, (W, *_) in zip(d_rows, call.weights, strict=True))
        d_x = d_x.view(x.shape)
    d_weight_ih = over_steps(d_rows, rows.expand(R, *rows.shape))
    d_weights = (d_weight_ih, d_weight_hh, d_bias_ih, d_bias_hh)
    # Copies, because each result of an operator needs its own memory.
    by_direction = [each[i].clone() for i in range(R) for each in d_weights]
    return [d_x, *by_direction, d_h0, *([] if resets is None else [d_h_reset])]


def over_steps(d: Tensor, factors: Tensor) -> Tensor:
    """d' factors for each direction. The sum over steps and rows is in parts, which rounds less."""
    parts = zip(d.chunk(PARTS, dim=1), factors.chunk(PARTS, dim=1), strict=True)
    return sum((a.mT @ b for a, b in parts), start=d.new_zeros(()))


def run(
    call: LayerCall,
    arrays: dict[str, tuple[Tensor | None, tuple[int, ...]]],
    sizes: tuple[int, int, int, int, int],
    *,
    backward: bool,
) -> None:
    """Launch the kernel.

    arrays: the tensors by their names in call.h, each with its expected shape, except weight_hh,
    lengths and resets. sizes: T, B, H, K, R.
    """
    steps, batch, size, *_ = sizes
    from common.kernels.cuda import nvrtc  # imports what a layer on a CPU does not need

    weight_hh = [U for _, U, *_ in call.weights]
    device = weight_hh[0].device
    cuda.check_size(*sizes)
    kernel = cuda.instance(
        size, factors_of(call.product_dtype), call.reset_after, backward, arch(device)
    )
    if kernel is None:
        raise ValueError(f"the GRU on this GPU has no kernel for {size} hidden units")
    for i, each in enumerate(weight_hh):
        check_shape(f"weight_hh[{i}]", each, 3 * size, size)
    beyond = kernel.size - size
    weights = torch.stack([each.view(3, size, size) for each in weight_hh])
    weights = F.pad(weights, (0, beyond, 0, beyond)) if beyond else weights
    optional_arrays: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        **arrays,
        "weight_hh": (weights, weights.shape),
        "lengths": (call.lengths, (batch,)),
        "resets": (call.resets, (steps, batch)),
    }
    launched = cuda.Call(*[None] * 17, *sizes)
    copies = []
    for name, (array, shape) in optional_arrays.items():
        if array is not None:
            place = address(name, array, shape, OTHERS.get(name, torch.float32), device)
            if place and name in OTHERS:  # another stream may write to an index while it is used
                copies.append(array.clone())
                place = copies[-1].data_ptr()
            setattr(launched, name, place)
    launched.reverse[:] = [False, True]
    with current(device):
        stream = 1 if cuda.rehearsed else torch.cuda.current_stream(device).cuda_stream
        cuda.launch(nvrtc.ready(kernel, arch(device)), launched, stream)


def current(device: torch.device) -> AbstractContextManager:
    """A context in which the device is the current one."""
    return nullcontext() if cuda.rehearsed else torch.cuda.device(device)
