"""Products in bfloat16, as `scan` computes them. Its twin is torch_impl/bfloat16.py.

A product's factors are `rounded`, and so is the gradient of the result, which is a factor of the
products in the backward pass: what is multiplied is bfloat16, what is added up is not.
"""

import jax
from jax import Array
from jaxtyping import Float


@jax.custom_jvp
def rounded(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """x rounded to bfloat16; its gradient is passed on as it is."""
    # XLA would leave out a conversion there and back.
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


rounded.defjvps(lambda tangent, *_: tangent)


@jax.custom_jvp
def rounded_back(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """x, a product of what is rounded, as it is; its gradient, a factor of others, is rounded."""
    return x


# The transpose of this, which is linear to JAX, is the same again.
rounded_back.defjvps(lambda tangent, *_: jax.lax.reduce_precision(tangent, 8, 7))
