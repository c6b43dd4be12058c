"""The recurrence on the CPU kernel (kernels/gru.h). Its twin is torch_impl/fused.py.

Forward and backward are written by hand in C++. Here they become XLA FFI calls, gru_forward and
gru_backward, under jax.custom_vjp, so that jax.jit, jax.grad and jax.vmap take them.
One call computes all directions of a layer, with GRU_NUM_THREADS threads (an environment variable,
read when a function is traced; without it, all cores), but never more than the cores this process
may use. What a function needs for one direction, it takes as a sequence with one entry a direction.
"""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

import kernels


def available() -> bool:
    """Whether the kernel has been built, with JAX's FFI headers at hand."""
    return hasattr(kernels.library(), "gru_xla_forward")


def recur(
    projections: Float[Array, "T B 3H"] | Float[Array, "K 3H"],
    tokens: Int[Array, "T B"] | None,
    weight_hh: Float[Array, "3H H"],
    bias_hh: Float[Array, " 3H"],
    lengths: Int[Array, " B"],
    h0: Float[Array, "B H"],
    *,
    reverse: bool,
    reset_after: bool,
) -> tuple[Float[Array, "T B H"], Float[Array, "B H"]]:
    """One direction: (outputs, h_last), as scan() in gru.py."""
    outputs, h_last = recur_all(
        [projections],
        tokens,
        [weight_hh],
        [bias_hh],
        lengths,
        h0[None],
        reverse=[reverse],
        reset_after=reset_after,
    )
    return outputs, h_last[0]


def recur_all(
    projections: Sequence[Float[Array, "T B 3H"]] | Sequence[Float[Array, "K 3H"]],
    tokens: Int[Array, "T B"] | None,
    weight_hh: Sequence[Float[Array, "3H H"]],
    bias_hh: Sequence[Float[Array, " 3H"]],
    lengths: Int[Array, " B"],
    h0: Float[Array, "R B H"],
    *,
    reverse: Sequence[bool],
    reset_after: bool,
    every_step: bool = True,
) -> tuple[Float[Array, "T B R*H"], Float[Array, "R B H"]]:
    """All directions (one or two) of a layer at once: (outputs, h_last).

    Without every_step, outputs are not written, and come back empty.

    Raises jax.errors.JaxRuntimeError where a length is not in 0..T or a token not in 0..K-1.
    """
    if h0.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"the fused GRU computes in float32 or float64, not {h0.dtype}")
    return recurrence(
        tuple(projections),
        tuple(weight_hh),
        tuple(bias_hh),
        h0,
        None if tokens is None else tokens.astype(jnp.int32),
        lengths.astype(jnp.int32),
        tuple(reverse),
        reset_after,
        every_step,
    )


def forward(
    projections: Sequence[Array],
    weight_hh: Sequence[Array],
    bias_hh: Sequence[Array],
    h0: Array,
    tokens: Array | None,
    lengths: Array,
    reverse: Sequence[bool],
    reset_after: bool,
    every_step: bool,
    save: bool,
) -> Sequence[Array]:
    """(outputs, h_last, saved); saved, if asked for, is what backward needs."""
    shapes = forward_shapes(
        projections, weight_hh, bias_hh, h0, tokens, lengths, reverse, reset_after, every_step, save
    )
    call = jax.ffi.ffi_call("gru_forward", shapes, vmap_method="sequential")
    arguments = (*projections, *weight_hh, *bias_hh, h0, or_empty(tokens), lengths)
    return call(*arguments, **attributes(reverse, reset_after))


def forward_shapes(
    projections: Sequence[Array],
    weight_hh: Sequence[Array],
    bias_hh: Sequence[Array],
    h0: Array,
    tokens: Array | None,
    lengths: Array,
    reverse: Sequence[bool],
    reset_after: bool,
    every_step: bool,
    save: bool,
) -> list[jax.ShapeDtypeStruct]:
    """What forward returns, not filled in."""
    directions, batch, size = h0.shape
    steps = len(projections[0]) if tokens is None else len(tokens)
    saved = kernels.saved_size(steps, batch, size, reset_after) if save else 0
    return [
        jax.ShapeDtypeStruct((steps if every_step else 0, batch, directions * size), h0.dtype),
        jax.ShapeDtypeStruct(h0.shape, h0.dtype),
        jax.ShapeDtypeStruct((directions, saved), h0.dtype),
    ]


def backward(
    weight_hh: Sequence[Array],
    d_outputs: Array,
    d_h_last: Array,
    saved: Array,
    tokens: Array | None,
    lengths: Array,
    reverse: Sequence[bool],
    reset_after: bool,
    rows: int,
) -> Sequence[Array]:
    """The gradients of projections..., weight_hh..., bias_hh..., h0. rows: len(projections[0])."""
    shapes = backward_shapes(
        weight_hh, d_outputs, d_h_last, saved, tokens, lengths, reverse, reset_after, rows
    )
    call = jax.ffi.ffi_call("gru_backward", shapes, vmap_method="sequential")
    arguments = (*weight_hh, d_outputs, d_h_last, saved, or_empty(tokens), lengths)
    return call(*arguments, **attributes(reverse, reset_after))


def backward_shapes(
    weight_hh: Sequence[Array],
    d_outputs: Array,
    d_h_last: Array,
    saved: Array,
    tokens: Array | None,
    lengths: Array,
    reverse: Sequence[bool],
    reset_after: bool,
    rows: int,
) -> list[jax.ShapeDtypeStruct]:
    """What backward returns, not filled in."""
    batch, size = d_h_last.shape[1:]
    shape = (rows, batch, 3 * size) if tokens is None else (rows, 3 * size)
    return [
        *(jax.ShapeDtypeStruct(shape, saved.dtype) for _ in weight_hh),
        *(jax.ShapeDtypeStruct(each.shape, saved.dtype) for each in weight_hh),
        *(jax.ShapeDtypeStruct((3 * size,), saved.dtype) for _ in weight_hh),
        jax.ShapeDtypeStruct(d_h_last.shape, saved.dtype),
    ]


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def recurrence(
    projections: tuple[Array, ...],
    weight_hh: tuple[Array, ...],
    bias_hh: tuple[Array, ...],
    h0: Array,
    tokens: Array | None,
    lengths: Array,
    reverse: tuple[bool, ...],
    reset_after: bool,
    every_step: bool,
) -> tuple[Array, Array]:
    """(outputs, h_last), differentiable."""
    outputs, h_last, _ = forward(
        projections,
        weight_hh,
        bias_hh,
        h0,
        tokens,
        lengths,
        reverse,
        reset_after,
        every_step,
        save=False,
    )
    return outputs, h_last


def keep(
    projections: tuple[Array, ...],
    weight_hh: tuple[Array, ...],
    bias_hh: tuple[Array, ...],
    h0: Array,
    tokens: Array | None,
    lengths: Array,
    reverse: tuple[bool, ...],
    reset_after: bool,
    every_step: bool,
) -> tuple[tuple[Array, Array], tuple]:
    """Saves for the backward pass, which does not need the projections, biases and outputs."""
    outputs, h_last, saved = forward(
        projections,
        weight_hh,
        bias_hh,
        h0,
        tokens,
        lengths,
        reverse,
        reset_after,
        every_step,
        save=True,
    )
    shape = projections[0][..., :0]  # nothing but the number of rows
    return (outputs, h_last), (weight_hh, saved, tokens, lengths, shape)


def differentiate(
    reverse: tuple[bool, ...],
    reset_after: bool,
    every_step: bool,
    kept: tuple,
    cotangents: tuple[Array, Array],
) -> tuple:
    """The gradients of recurrence's arguments."""
    weight_hh, saved, tokens, lengths, shape = kept
    d_outputs, d_h_last = cotangents
    gradients = backward(
        weight_hh, d_outputs, d_h_last, saved, tokens, lengths, reverse, reset_after, len(shape)
    )
    R = len(weight_hh)
    d_projections, d_weight_hh, d_bias_hh = (
        tuple(gradients[i * R : (i + 1) * R]) for i in range(3)
    )
    return d_projections, d_weight_hh, d_bias_hh, gradients[-1], None, None


recurrence.defvjp(keep, differentiate)

if available():
    for name in ("forward", "backward"):
        handler = getattr(kernels.library(), f"gru_xla_{name}")
        jax.ffi.register_ffi_target(f"gru_{name}", jax.ffi.pycapsule(handler), platform="cpu")


def attributes(reverse: Sequence[bool], reset_after: bool) -> dict[str, Any]:
    """What a call is told besides its arrays."""
    threads = os.environ.get("GRU_NUM_THREADS")
    return {
        "reverse": np.array(reverse, np.int64),
        "reset_after": np.bool_(reset_after),
        "threads": np.int32(threads or os.cpu_count() or 1),
    }


def or_empty(array: Array | None) -> Array:
    """An empty vector, which the kernel takes for absent, in the place of None."""
    return jnp.zeros(0, jnp.int32) if array is None else array
