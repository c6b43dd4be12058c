"""Products in bfloat16, as `scan` computes them. Its twin is torch_impl/bfloat16.py.

A product's factors are `rounded`, and so is the gradient of its result, which is a factor of the
products in the backward pass. All factors are bfloat16; all sums are float32.
"""

import jax
from jax import Array
from jaxtyping import Float


@jax.custom_jvp
def rounded(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """x rounded to bfloat16; the gradient is unchanged."""
    # XLA would remove a conversion to bfloat16 and back.
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


rounded.defjvps(lambda tangent, *_: tangent)


@jax.custom_jvp
def rounded_back(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """x unchanged, a product of rounded factors; its gradient, a factor of others, is rounded."""
    return x


# JAX treats this as linear; its transpose is the same function.
rounded_back.defjvps(lambda tangent, *_: jax.lax.reduce_precision(tangent, 8, 7))
