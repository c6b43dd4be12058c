"""The fast form of the GRU that JAX differentiates. Its twin is torch_impl/scan.py.

It computes the same as `step` in gru.py. The terms that do not depend on the state are computed for
all time steps at once, before jax.lax.scan computes the rest. Products may be rounded to bfloat16.
Shapes are named as in layers.py.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from common.cells import LayerCall
from common.params import ProductDtype
from jax_impl.bfloat16 import rounded, rounded_back
from jax_impl.layers import LayerOutput, Restart, Weights, by_direction, gather, project


def hoisted_step(
    a_zr: Float[Array, "B 2H"],
    a_n: Float[Array, "B H"],
    h: Float[Array, "B H"],
    U_zr: Float[Array, "H 2H"],
    U_n: Float[Array, "H H"],
    c_n: Float[Array, " H"],
    *,
    reset_after: bool,
    product_dtype: ProductDtype = "float32",
) -> Float[Array, "B H"]:
    """`step` without the terms that `hoist` computes for all time steps at once."""
    # The product comes first, because XLA's code is a fifth slower for a single step otherwise.
    addmm = rounding if product_dtype == "bfloat16" else lambda a, h, U: h @ U + a
    z, r = jnp.split(jax.nn.sigmoid(addmm(a_zr, h, U_zr)), 2, axis=-1)
    a_n = a_n + r * addmm(c_n, h, U_n) if reset_after else addmm(a_n, r * h, U_n)
    return h + z * (jnp.tanh(a_n) - h)


def rounding(
    a: Float[Array, "*N"], h: Float[Array, "B H"], U: Float[Array, "H N"]
) -> Float[Array, "B N"]:
    """a + h U with h rounded to bfloat16; U is rounded already."""
    return a + rounded_back(rounded(h) @ U)


def hoist(
    weights: Weights, *, reset_after: bool
) -> tuple[Float[Array, " 3H"], Float[Array, "H 2H"], Float[Array, "H H"], Float[Array, " H"]]:
    """Returns (bias, U_zr', U_n', c_n). bias is the sum of the input biases and those hidden biases
    that are only added."""
    _, weight_hh, bias_ih, bias_hh = weights
    size = weight_hh.shape[-1]
    U_zr, U_n = jnp.split(weight_hh, [2 * size])
    # A mask, because XLA would call slicing and concatenation separately in a single step.
    hidden = jnp.where(jnp.arange(3 * size) < 2 * size, bias_hh, 0) if reset_after else bias_hh
    return bias_ih + hidden, U_zr.T, U_n.T, bias_hh[2 * size :]


def scan_direction(
    call: LayerCall,
    mask: Bool[Array, "T B 1"],
    weights: Weights,
    h: Float[Array, "B H"],
    restart: Restart | None,
    *,
    reverse: bool,
) -> tuple[Float[Array, "B H"], Float[Array, "T B H"]]:
    """`hoisted_step` in a loop over time."""
    size = h.shape[-1]
    bias, U_zr, U_n, c_n = hoist(weights, reset_after=call.reset_after)
    if call.product_dtype == "bfloat16":
        U_zr, U_n = rounded(U_zr), rounded(U_n)
        a = bias + rounded_back(project(rounded(call.x), rounded(weights[0]), jnp.zeros_like(bias)))
    else:
        a = project(call.x, weights[0], bias)
    rows = jnp.split(a, [2 * size], axis=-1)
    inputs = [gather(each, call.tokens, mask) for each in rows]
    options: Any = {"reset_after": call.reset_after, "product_dtype": call.product_dtype}

    # The backward pass recomputes cheap values, because storing them takes more time.
    @partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False)
    def one(
        h: Float[Array, "B H"], at: tuple[Array, Array, Array, Any]
    ) -> tuple[Float[Array, "B H"], Float[Array, "B H"]]:
        a_zr, a_n, live, begin = at
        if restart is not None:
            h = jnp.where(begin, restart[1], h)
        after = hoisted_step(a_zr, a_n, h, U_zr, U_n, c_n, **options)
        h = jnp.where(live, after, h)
        return h, h

    begin = None if restart is None else restart[0]
    return jax.lax.scan(one, h, (*inputs, mask, begin), reverse=reverse)


def scan(call: LayerCall) -> LayerOutput:
    """The recurrence: all directions of a layer by `scan_direction`."""
    return by_direction(scan_direction, call)
