"""Arrays as fused.py and cuda.py describe them to XLA's FFI calls."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import DTypeLike

from common import kernels
from common.cells import LayerCall


def like(array: Array) -> Callable[..., jax.ShapeDtypeStruct]:
    """A function that describes arrays like this one with other shapes."""
    kind = jax.typeof(array)
    return partial(
        jax.ShapeDtypeStruct,
        dtype=kind.dtype,
        sharding=jax.sharding.NamedSharding(kind.sharding.mesh, jax.sharding.PartitionSpec()),
        manual_axis_type=kind.mat,
    )


def or_empty(array: Array | None, dtype: DTypeLike) -> Array:
    """The array, or for None an empty vector, which means absent to the kernel."""
    return jnp.zeros(0, dtype) if array is None else array


def forward_shapes(call: LayerCall, save: bool) -> list[jax.ShapeDtypeStruct]:
    """The descriptions of the results of fused.forward for the same arguments."""
    R, batch, size = call.h0.shape
    saved = kernels.saved_size(call.steps, batch, size, call.reset_after, call.cell) if save else 0
    steps = call.steps if call.return_sequences else 0
    shape = like(call.h0)
    return [shape((steps, batch, R * size)), shape(call.h0.shape), shape((R, saved))]


def backward_shapes(call: LayerCall, d_h_last: Array, of_x: bool) -> list[jax.ShapeDtypeStruct]:
    """The descriptions of the gradients that the kernel computes: of each parameter in all
    directions, of x, h0 and h_reset."""
    shape = like(d_h_last)
    return [
        *(shape(each.shape) for of_name in zip(*call.weights, strict=True) for each in of_name),
        shape(call.x.shape if of_x else (0,)),
        shape(d_h_last.shape),
        shape((0,) if call.resets is None else d_h_last.shape),
    ]
