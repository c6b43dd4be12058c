"""The GRU on the CPU kernel (common/kernels/gru.h) or, through cuda.py, on the GPU kernel. Its twin
is torch_impl/fused.py.

Forward and backward are written by hand in C++. They become XLA FFI calls, gru_forward and
gru_backward, in two functions whose derivatives this file defines, `layer` and `pull`: the kernel
computes the gradient, and `scan` (scan.py) computes derivatives of the gradient and in forward
mode. One call computes all directions of a layer with GRU_NUM_THREADS threads (an environment
variable, read when a function is traced; by default the number of cores), but with no more than the
cores that this process may use.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import DTypeLike

from common import kernels
from common.cells import LayerCall, dtype_name
from common.kernels import cuda as gpu
from common.params import ProductDtype
from jax_impl import cuda
from jax_impl.ffi import backward_shapes, forward_shapes, or_empty
from jax_impl.layers import LayerOutput, complete
from jax_impl.scan import scan

BUILT = hasattr(kernels.library(), "gru_xla_forward")  # with JAX's FFI headers
DTYPES = (*kernels.DTYPES, "bfloat16") if kernels.bfloat16() else kernels.DTYPES

# JAX differentiates functions of `arrays` (x, the weights of each direction, h0 and h_reset),
# `places` (tokens, lengths and resets) and `flags` (reset_after, return_sequences, product_dtype,
# cell, gpu).
Arrays = tuple[Array, tuple[tuple[Array, ...], ...], Array, Array | None]
Places = tuple[Array | None, Array, Array | None]
Flags = tuple[bool, bool, ProductDtype, str, bool]
SCANS: dict[str, Callable[[LayerCall], LayerOutput]] = {"gru": scan}
"""The recurrence of each cell for by_scan. That of the tanh RNN does not round to bfloat16."""


def available(device: str = "cpu", dtype: Any = "float32", size: int | None = None) -> bool:
    """Whether the kernel is built and supports this kind of device and dtype; it supports all
    sizes.

    bfloat16 is the dtype of the products, for which the processor needs an instruction.
    """
    return BUILT and not gpu.rehearsed and device == "cpu" and dtype_name(dtype) in DTYPES


def lowered(dtype: DTypeLike) -> bool:
    """Whether jax.default_matmul_precision("bfloat16") applies: to products of float32, if the
    processor has an instruction for products in bfloat16."""
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return dtype == jnp.float32 and precision == "bfloat16" and "bfloat16" in DTYPES


def recurrence(call: LayerCall, *, gpu: bool = False) -> LayerOutput:
    """Compute a layer: see Recurrence in common/cells.py. Without return_sequences, outputs are not
    written.

    A row with a length outside 0..T or a token outside 0..K-1 is NaN, and so are the gradients that
    depend on it.

    Raises ValueError for shapes that do not match, TypeError for a dtype that the kernel does not
    support.
    """
    x, tokens, weights, lengths, h0, resets, h_reset, *flags = call
    if call.product_dtype == "bfloat16" and h0.dtype != jnp.float32:
        raise TypeError(f"bfloat16: requires float32 arrays, found {h0.dtype}")
    if h0.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(
            f"the fused GRU computes in float32 or float64, not {h0.dtype}: "
            'implementation="scan" does'
        )
    if not gpu and lowered(h0.dtype):
        flags[2] = "bfloat16"
    arrays = (x, tuple(map(tuple, weights)), h0, h_reset)
    tokens = None if tokens is None else tokens.astype(jnp.int32)
    places = (tokens, lengths.astype(jnp.int32), resets)
    return layer(*vary_alike((arrays, places)), (*flags, gpu))


def call_of(arrays: Arrays, places: Places, flags: Flags) -> LayerCall:
    """The LayerCall of these."""
    (x, weights, h0, h_reset), (tokens, lengths, resets) = arrays, places
    return LayerCall(x, tokens, weights, lengths, h0, resets, h_reset, *flags[:4])


def vary_alike(tree: Any) -> Any:
    """Under jax.shard_map, mark all arrays as varying over the axes over which any of them
    varies."""
    axes = frozenset().union(*(jax.typeof(array).mat.varying for array in jax.tree.leaves(tree)))

    def vary(array: Array) -> Array:
        missing = tuple(axes - jax.typeof(array).mat.varying)
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(vary, tree)


def forward(call: LayerCall, save: bool) -> Sequence[Array]:
    """(outputs, h_last, saved) of a layer; saved, if requested, is an argument of `backward`."""
    function = jax.ffi.ffi_call("gru_forward", forward_shapes(call, save), vmap_method="sequential")
    weights = [each for of_name in zip(*call.weights, strict=True) for each in of_name]
    states = (call.h0, or_empty(call.h_reset, call.h0.dtype))
    return function(*weights, call.x, *states, *places_of(call), **attributes(call))


def backward(
    call: LayerCall,
    d_outputs: Array,
    d_h_last: Array,
    saved: Array,
    of_x: bool,
) -> Sequence[Array]:
    """The gradients of the arrays of a layer as a flat sequence (x, the weights of each direction,
    h0 and h_reset, empty without resets); without of_x, that of x is empty."""
    shapes = backward_shapes(call, d_h_last, of_x)
    function = jax.ffi.ffi_call("gru_backward", shapes, vmap_method="sequential")
    weights = [each for of_name in [*zip(*call.weights, strict=True)][:2] for each in of_name]
    arguments = (call.x, d_outputs, d_h_last, saved, *places_of(call))
    *by_name, d_x, d_h0, d_h_reset = function(*weights, *arguments, **attributes(call))
    R = len(call.weights)
    return d_x, *(each for i in range(R) for each in by_name[i::R]), d_h0, d_h_reset


def places_of(call: LayerCall) -> tuple[Array, Array, Array]:
    """tokens, lengths and resets in the form that the kernel expects."""
    return or_empty(call.tokens, jnp.int32), here(call.lengths), or_empty(call.resets, bool)


def compute(arrays: Arrays, places: Places, flags: Flags, save: bool) -> tuple[Array, Array, Array]:
    """A layer without derivatives; returns the result of `forward`."""
    function = cuda.forward if flags[4] else forward
    outputs, h_last, saved = function(call_of(arrays, places, flags), save)
    return outputs, h_last, saved


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def layer(arrays: Arrays, places: Places, flags: Flags) -> tuple[Array, Array]:
    """(outputs, h_last), for calls without derivatives."""
    outputs, h_last, _ = compute(arrays, places, flags, save=False)
    return outputs, h_last


@layer.defjvp
def _(
    flags: Flags, primals: tuple[Arrays, Places], tangents: tuple[Arrays, Places]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    (*results, _), (*along, _) = jax.jvp(partial(saving, flags=flags), mended(*primals), tangents)
    return tuple(results), tuple(along)


def mended(arrays: Arrays, places: Places) -> tuple[Arrays, Places]:
    """Lengths and tokens in range, and states with NaN in the rows where they were not. In a call
    without derivatives, the kernel does this itself."""
    (x, weights, h0, h_reset), (tokens, lengths, resets) = arrays, places
    call = LayerCall(x, tokens, (), lengths, h0, resets, h_reset)
    call = complete(call, h0.shape[0], h0.shape[2], checks=False)
    return (x, weights, call.h0, call.h_reset), (call.tokens, call.lengths, resets)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def saving(arrays: Arrays, places: Places, flags: Flags) -> tuple[Array, Array, Array]:
    """(outputs, h_last, saved), for calls with derivatives."""
    return compute(arrays, places, flags, save=True)


@saving.defjvp
def _(
    flags: Flags, primals: tuple[Arrays, Places], tangents: tuple[Arrays, Places]
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array]]:
    outputs, h_last, saved = saving(*primals, flags)
    known, tree = jax.tree.flatten((*primals, saved))
    d_outputs, d_h_last = push_p.bind(*known, *jax.tree.leaves(tangents[0]), tree=tree, flags=flags)
    return (outputs, h_last, saved), (d_outputs, d_h_last, jnp.zeros_like(saved))


@partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def pull(
    arrays: Arrays,
    places: Places,
    saved: Array,
    cotangents: tuple[Array, Array],
    flags: Flags,
    of_x: bool,
) -> Arrays:
    """The gradients of the arrays; that of x is zero unless of_x requests it."""
    call, function = call_of(arrays, places, flags), cuda.backward if flags[4] else backward
    d_x, *d_weights, d_h0, d_h_reset = function(call, *cotangents, saved, of_x)
    by_direction = tuple(tuple(d_weights[i : i + 4]) for i in range(0, len(d_weights), 4))
    d_x = d_x if of_x else jnp.zeros_like(call.x)
    return d_x, by_direction, d_h0, None if call.h_reset is None else d_h_reset


@pull.defjvp
def _(flags: Flags, of_x: bool, primals: tuple, tangents: tuple) -> tuple[Arrays, Arrays]:
    arrays, places, _, cotangents = primals

    def gradients(arrays: Arrays, cotangents: tuple[Array, Array]) -> Arrays:
        return jax.vjp(by_scan(places, flags), *arrays)[1](cotangents)

    _, along = jax.jvp(gradients, (arrays, cotangents), (tangents[0], tangents[3]))
    return pull(*primals, flags, of_x), along


def by_scan(places: Places, flags: Flags) -> Callable[..., LayerOutput]:
    """The function of the arrays that the kernel computes, from scan.py."""

    def run(*arrays: Any) -> LayerOutput:
        call = call_of(arrays, places, flags)
        return SCANS[call.cell](call)

    return run


# The derivative of (outputs, h_last) along tangents of the arrays: a linear function, whose
# transpose is the kernel's backward. Its operands are the leaves of (arrays, places, saved), a tree
# of that structure, and those of the tangents.
push_p = Primitive("gru_push")
push_p.multiple_results = True


def push(*leaves: Array, tree: Any, flags: Flags) -> list[Array]:
    """Its implementation, for forward mode, by scan."""
    arrays, places, _ = jax.tree.unflatten(tree, leaves[: tree.num_leaves])
    tangents = jax.tree.unflatten(jax.tree.structure(arrays), leaves[tree.num_leaves :])
    return list(jax.jvp(by_scan(places, flags), arrays, tangents)[1])


def push_shapes(*leaves: Any, tree: Any, flags: Flags) -> list[Any]:
    """The shapes of its results, those of outputs and h_last."""
    (x, _, h0, _), (tokens, *_), _ = jax.tree.unflatten(tree, leaves[: tree.num_leaves])
    R, B, H = h0.shape
    steps = (x if tokens is None else tokens).shape[0] if flags[1] else 0
    return [h0.update(shape=(steps, B, R * H), weak_type=False), h0.update(weak_type=False)]


def push_again(primals: Sequence[Array], tangents: Sequence[Any], **flags: Any) -> tuple:
    """Its derivative with respect to all arguments, by scan."""
    wanted = [i for i, primal in enumerate(primals) if jnp.issubdtype(primal.dtype, jnp.floating)]

    def function(*some: Array) -> list[Array]:
        leaves = list(primals)
        for i, each in zip(wanted, some, strict=True):
            leaves[i] = each
        return push(*leaves, **flags)

    return jax.jvp(
        function,
        [primals[i] for i in wanted],
        [ad.instantiate_zeros(tangents[i]) for i in wanted],
    )


def push_transposed(cotangents: Sequence[Any], *leaves: Any, tree: Any, flags: Flags) -> list:
    """The gradients of the tangents."""
    arrays, places, saved = jax.tree.unflatten(tree, leaves[: tree.num_leaves])
    cotangents = tuple(map(ad.instantiate_zeros, cotangents))
    linear = leaves[tree.num_leaves :]
    of_x = ad.is_undefined_primal(linear[0])  # word vectors are often frozen
    gradients = jax.tree.leaves(pull(arrays, places, saved, cotangents, flags, of_x))
    required = [
        gradient if ad.is_undefined_primal(each) else None
        for gradient, each in zip(gradients, linear, strict=True)
    ]
    return [*[None] * tree.num_leaves, *required]


def push_batched(leaves: Sequence[Array], dims: Sequence[Any], **flags: Any) -> tuple[list, list]:
    """jax.vmap: one call for each entry of the new axis."""
    mapped = {i: jnp.moveaxis(leaves[i], dim, 0) for i, dim in enumerate(dims) if dim is not None}

    def entry(some: dict[int, Array]) -> list[Array]:
        return push_p.bind(*(some.get(i, each) for i, each in enumerate(leaves)), **flags)

    results = jax.lax.map(entry, mapped)
    return results, [0] * len(results)


push_p.def_impl(push)
push_p.def_abstract_eval(push_shapes)
ad.primitive_jvps[push_p] = push_again
ad.primitive_transposes[push_p] = push_transposed
batching.primitive_batchers[push_p] = push_batched
mlir.register_lowering(push_p, mlir.lower_fun(push, multiple_results=True))


# The identity, which warns the user when jax.export compiles it.
here_p = Primitive("gru_here")
here_p.def_impl(lambda array: array)
here_p.def_abstract_eval(lambda array: array)
batching.primitive_batchers[here_p] = lambda arrays, dims: (here_p.bind(*arrays), dims[0])


def here_lowered(context: Any, array: Any) -> list:
    """Warn under jax.export, because JAX refuses to export calls of unknown kernels."""
    if context.module_context.lowering_parameters.for_export:
        warnings.warn(
            'jax.export: the fused GRU calls a kernel of this process; implementation="scan" calls '
            "none",
            stacklevel=2,
        )
    return [array]


mlir.register_lowering(here_p, here_lowered)
here = here_p.bind

if BUILT:
    for name in ("forward", "backward"):
        handler = getattr(kernels.library(), f"gru_xla_{name}")
        jax.ffi.register_ffi_target(f"gru_{name}", jax.ffi.pycapsule(handler), platform="cpu")


def attributes(call: LayerCall) -> dict[str, Any]:
    """The attributes of the FFI call."""
    return {
        "reverse": np.arange(len(call.weights)),
        "reset_after": np.bool_(call.reset_after),
        "bfloat16": np.bool_(call.product_dtype == "bfloat16"),
        "cell": np.int32(kernels.cell_index(call.cell)),
        "threads": np.int32(kernels.threads()),
    }
