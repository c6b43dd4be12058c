"""Arrays as the kernels' XLA FFI calls describe them: see fused.py and cuda.py."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import DTypeLike


def like(array: Array) -> Callable[..., jax.ShapeDtypeStruct]:
    """What makes descriptions of arrays that are like this one but for their shape."""
    kind = jax.typeof(array)
    return partial(
        jax.ShapeDtypeStruct,
        dtype=kind.dtype,
        sharding=jax.sharding.NamedSharding(kind.sharding.mesh, jax.sharding.PartitionSpec()),
        manual_axis_type=kind.mat,
    )


def or_empty(array: Array | None, dtype: DTypeLike) -> Array:
    """An empty vector, which the kernel takes for absent, in the place of None."""
    return jnp.zeros(0, dtype) if array is None else array
