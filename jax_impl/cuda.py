"""The GRU on an NVIDIA GPU (common/kernels/cuda). Its twin is torch_impl/cuda.py.

The kernel computes the recurrence; XLA computes the products before and after it, over all steps at
once. The factors of the kernel's products are rounded to TF32, as in XLA's own products, unless
jax_default_matmul_precision is "highest" or another name of full float32. `forward` and `backward`
serve fused.py, which contains the rules of differentiation.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from common import kernels
from common.cells import LayerCall, dtype_name
from common.kernels import cuda
from jax_impl.bfloat16 import rounded
from jax_impl.ffi import forward_shapes, like, or_empty
from jax_impl.layers import without_padding

BUILT = hasattr(kernels.library(), "gru_cuda_xla_forward")  # with JAX's FFI headers


PARTS = 4  # of the long sums

if BUILT:
    for side in ("forward", "backward"):
        for ending, platform in (("", "CUDA"), ("_host", "cpu")):
            handler = getattr(kernels.library(), f"gru_cuda_xla_{side}{ending}")
            capsule = jax.ffi.pycapsule(handler)
            jax.ffi.register_ffi_target(f"gru_cuda_{side}", capsule, platform=platform)


def available(device: str = "cuda", dtype: Any = "float32", size: int | None = None) -> bool:
    """Whether the first device has a kernel for this kind of device, dtype and number of units.

    The kernel is neither compiled nor run.
    """
    is_served = BUILT and cuda.served(device, dtype)
    return is_served and exists(cuda.units(size), dtype_name(dtype))


def proven(dtype: Any, size: int | None) -> bool:
    """Whether a trial has shown that the first device's kernel is correct; see trial.py."""
    return passes(cuda.units(size), dtype_name(dtype))


def exists(size: int | None, product_dtype: str) -> bool:
    """Whether the first device has a kernel for this number of units."""
    if not cuda.driver() or not devices():
        return False
    instance = size is None or cuda.instance(size, factors_of(product_dtype), False, False, arch())
    return bool(instance)


def passes(size: int | None, product_dtype: str) -> bool:
    """Whether the first device's kernel for this number of units passes its trial."""
    if size is None:
        return True
    if not cuda.installed():
        return False
    from common.kernels.cuda import trial  # imports what a layer on a CPU does not need

    kernel = (size, factors_of(product_dtype), arch())
    return trial.trusted("jax_impl", *kernel, devices()[0].device_kind)


def prepare(device: int, factors: str) -> None:
    """Set the kind of factors in this process, which runs a trial. The device is number 0."""
    precision = "highest" if factors == "Float32" else "default"
    jax.config.update("jax_default_matmul_precision", precision)


def factors_of(product_dtype: str) -> str:
    """The kernel's name of the type of a product's factors."""
    if product_dtype == "bfloat16":
        return "Bf16"
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    exact = precision in ("float32", "highest", "F32_F32_F32")
    return "Float32" if exact or str(precision).endswith(("_X3", "_X6", "_X9")) else "Tf32"


def devices() -> list[jax.Device]:
    """The GPUs of this process."""
    try:
        return jax.local_devices(backend="cpu" if cuda.rehearsed else "cuda")
    except RuntimeError:  # JAX has none
        return []


def arch() -> cuda.Arch:
    """The compute capability of the first device."""
    if cuda.rehearsed:
        return cuda.rehearsed
    major, minor = devices()[0].compute_capability.split(".")
    return int(major), int(minor)


def array(values: np.ndarray) -> Array:
    """A NumPy array as an array on the first device."""
    return jax.device_put(values, devices()[0])


def forward(call: LayerCall, save: bool) -> Sequence[Array]:
    """The result of fused.forward for the same arguments."""
    factor = rounded if call.product_dtype == "bfloat16" else lambda array: array
    rows = factor(jax.lax.collapse(call.x, 0, -1))
    projections = jnp.stack([rows @ factor(W).T + b[None] for W, _, b, _ in call.weights])
    arrays = (
        projections,
        jnp.stack([c for *_, c in call.weights]),
        call.h0,
        or_empty(call.h_reset, call.h0.dtype),
        or_empty(call.tokens, jnp.int32),
        call.lengths,
        or_empty(call.resets, bool),
    )
    return run(call, arrays, forward_shapes(call, save), backward=False)


def backward(
    call: LayerCall,
    d_outputs: Array,
    d_h_last: Array,
    saved: Array,
    of_x: bool,
) -> Sequence[Array]:
    """The result of fused.backward for the same arguments."""
    x, tokens, resets, steps = call.x, call.tokens, call.resets, call.steps
    R, batch, size = d_h_last.shape
    distinct = x.shape[0]
    factor = rounded if call.product_dtype == "bfloat16" else lambda array: array
    record = 5 if call.reset_after else 4  # saved numbers per unit
    shape = like(d_h_last)
    shapes = [
        shape((R, steps, batch, 3 * size)),
        shape((R, steps, batch if call.reset_after else 0, size)),
        shape(d_h_last.shape),
        shape((0,) if resets is None else d_h_last.shape),
    ]
    arrays = (d_outputs, d_h_last, saved, call.lengths, or_empty(resets, bool))
    d_a, d_q, d_h0, d_h_reset = run(call, arrays, shapes, backward=True)
    d_a = d_a.reshape(R, steps * batch, 3 * size)
    kept = saved.reshape(R, steps * batch, record * size)
    before = kept[..., 3 * size : 4 * size]
    d_zr, d_n = jnp.split(d_a, [2 * size], axis=-1)
    if call.reset_after:
        d_n, gated = d_q.reshape(d_n.shape), before
    else:
        gated = kept[..., size : 2 * size] * before
    d_weight_hh = jnp.concatenate(
        [over_steps(factor(d_zr), factor(before)), over_steps(factor(d_n), factor(gated))], axis=1
    )
    d_bias_ih = d_a.sum(axis=1)
    d_bias_hh = jnp.concatenate([d_bias_ih[:, : 2 * size], d_n.sum(axis=1)], axis=1)
    d_rows = d_a  # the gradients of the projections, summed for each distinct input
    if tokens is not None:
        d_rows = jnp.zeros((R, distinct, 3 * size), d_a.dtype)
        d_rows = d_rows.at[:, tokens.reshape(-1)].add(d_a, mode="drop")
    d_rows = factor(d_rows)
    rows = factor(jax.lax.collapse(without_padding(x, tokens, call.lengths), 0, -1))
    d_x = jnp.zeros(0, d_a.dtype)
    if of_x:
        d_x = sum(d @ factor(W) for d, (W, *_) in zip(d_rows, call.weights, strict=True))
        d_x = d_x.reshape(x.shape)
    d_weight_ih = over_steps(d_rows, jnp.broadcast_to(rows, (R, *rows.shape)))
    d_weights = (d_weight_ih, d_weight_hh, d_bias_ih, d_bias_hh)
    by_direction = [each[i] for i in range(R) for each in d_weights]
    return [d_x, *by_direction, d_h0, d_h_reset]


def over_steps(d: Array, factors: Array) -> Array:
    """d' factors for each direction. The sum over steps and rows is in parts, which rounds less."""
    parts = zip(*(jnp.array_split(each, PARTS, axis=1) for each in (d, factors)), strict=True)
    return sum((a.mT @ b for a, b in parts), start=jnp.zeros((), d.dtype))


def run(
    call: LayerCall,
    arrays: Sequence[Array],
    shapes: Sequence[jax.ShapeDtypeStruct],
    *,
    backward: bool,
) -> Sequence[Array]:
    """Launch the kernel.

    arrays: the arguments of driver.cpp's handlers except weight_hh. shapes: those of the results.
    """
    from common.kernels.cuda import nvrtc  # imports what a layer on a CPU does not need

    weight_hh = [U for _, U, *_ in call.weights]
    batch, size = call.lengths.shape[0], weight_hh[0].shape[1]
    distinct = 0 if backward else arrays[0].shape[1]
    cuda.check_size(call.steps, batch, size, distinct, len(weight_hh))
    kernel = cuda.instance(size, factors_of(call.product_dtype), call.reset_after, backward, arch())
    if kernel is None:
        raise ValueError(f"the GRU on this GPU has no kernel for {size} hidden units")
    beyond = kernel.size - size
    weights = jnp.stack([each.reshape(3, size, size) for each in weight_hh])
    weights = jnp.pad(weights, ((0, 0), (0, 0), (0, beyond), (0, beyond)))
    at = 0 if backward else 1
    name = f"gru_cuda_{'backward' if backward else 'forward'}"
    return jax.ffi.ffi_call(name, shapes, vmap_method="sequential")(
        *arrays[:at],
        weights,
        *arrays[at:],
        key=nvrtc.ready(kernel, arch()),
        size=np.int64(kernel.size),
        steps=np.int64(call.steps),
        reverse=np.arange(len(weight_hh)),
        reset_after=np.bool_(call.reset_after),
    )
