"""The GRU on a kernel: the CPU's (common/kernels/gru.h), or, by cuda.py, a GPU's. Its twin is
torch_impl/fused.py.

Forward and backward are written by hand in C++. Here they become XLA FFI calls, gru_forward and
gru_backward, in two functions that JAX differentiates by rules of ours, `layer` and `pull`: the
gradient is the kernel's, and its own derivatives are those of `scan` in gru.py, which computes in
forward mode, too.
One call computes all directions of a layer, with GRU_NUM_THREADS threads (an environment variable,
read when a function is traced; without it, all cores), but never more than the cores this process
may use. What a function needs for one direction, it takes as a sequence with one entry a direction;
those are forward, or forward and backward.
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
from jaxtyping import Bool, Float, Int

from common import kernels
from common.cells import dtype_name
from common.kernels import cuda as gpu
from jax_impl import cuda
from jax_impl.ffi import like, or_empty
from jax_impl.layers import Found, Weights, in_range, spoil

BUILT = hasattr(kernels.library(), "gru_xla_forward")  # with JAX's FFI headers
DTYPES = (*kernels.DTYPES, "bfloat16") if kernels.bfloat16() else kernels.DTYPES


def available(device: str = "cpu", dtype: Any = "float32", size: int | None = None) -> bool:
    """Whether the kernel has been built, for this kind of device and dtype, whatever the size.

    bfloat16 is that of the products: the processor has to have an instruction for it.
    """
    return BUILT and not gpu.rehearsed and device == "cpu" and dtype_name(dtype) in DTYPES


def recurrence(
    x: Float[Array, "T B D"] | Float[Array, "K D"],
    tokens: Int[Array, "T B"] | None,
    weights: Sequence[Weights],
    lengths: Int[Array, " B"],
    h0: Float[Array, "R B H"],
    resets: Bool[Array, "T B"] | None = None,
    h_reset: Float[Array, "R B H"] | None = None,
    *,
    reset_after: bool,
    return_sequences: bool,
    bfloat16: bool = False,
    gpu: bool = False,
) -> Found:
    """A layer: see Recurrence in common/cells.py. Outputs that are not wanted are not written.

    A row where a length is not in 0..T or a token not in 0..K-1 is NaN, and so are gradients that
    it has part in.

    Raises ValueError for shapes that do not fit, TypeError for a dtype that the kernel does not
    compute in.
    """
    if bfloat16 and h0.dtype != jnp.float32:
        raise TypeError(f"bfloat16: of float32 arrays only, found {h0.dtype}")
    if h0.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(
            f"the fused GRU computes in float32 or float64, not {h0.dtype}: "
            'implementation="scan" does'
        )
    arrays = (x, tuple(map(tuple, weights)), h0, h_reset)
    tokens = None if tokens is None else tokens.astype(jnp.int32)
    places = (tokens, lengths.astype(jnp.int32), resets)
    how = (reset_after, return_sequences, bfloat16, gpu)
    return layer(*vary_alike((arrays, places)), how)


def operands(x: Array, weights: Sequence[Weights], *states: Array | None) -> tuple[Any, ...]:
    """What the kernel reads: the weights by name, each a list, x, h0 and h_reset."""
    return *map(list, zip(*weights, strict=True)), x, *states


def vary_alike(tree: Any) -> Any:
    """All arrays as different from device to device, under jax.shard_map, as any of them is."""
    axes = frozenset().union(*(jax.typeof(array).mat.varying for array in jax.tree.leaves(tree)))

    def vary(array: Array) -> Array:
        missing = tuple(axes - jax.typeof(array).mat.varying)
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(vary, tree)


def forward(
    weight_ih: Sequence[Array],
    weight_hh: Sequence[Array],
    bias_ih: Sequence[Array],
    bias_hh: Sequence[Array],
    x: Array,
    h0: Array,
    h_reset: Array | None,
    tokens: Array | None,
    lengths: Array,
    resets: Array | None,
    reverse: Sequence[bool],
    reset_after: bool,
    return_sequences: bool,
    save: bool,
    bfloat16: bool = False,
) -> Sequence[Array]:
    """(outputs, h_last, saved); saved, if asked for, is what backward needs."""
    weights = (*weight_ih, *weight_hh, *bias_ih, *bias_hh)
    given = (x, h0, h_reset, tokens, lengths, resets, reverse, reset_after, return_sequences, save)
    shapes = forward_shapes(weight_ih, weight_hh, bias_ih, bias_hh, *given)
    call = jax.ffi.ffi_call("gru_forward", shapes, vmap_method="sequential")
    states = (h0, or_empty(h_reset, h0.dtype))
    places = (or_empty(tokens, jnp.int32), here(lengths), or_empty(resets, bool))
    return call(*weights, x, *states, *places, **attributes(reverse, reset_after, bfloat16))


def forward_shapes(*given: Any) -> list[jax.ShapeDtypeStruct]:
    """What forward returns, not filled in, for the same arguments."""
    _, _, _, _, x, h0, _, tokens, _, _, _, reset_after, return_sequences, save, *_ = given
    directions, batch, size = h0.shape
    steps = (x if tokens is None else tokens).shape[0]
    saved = kernels.saved_size(steps, batch, size, reset_after) if save else 0
    shape = like(h0)
    return [
        shape((steps if return_sequences else 0, batch, directions * size)),
        shape(h0.shape),
        shape((directions, saved)),
    ]


def backward(
    weight_ih: Sequence[Array],
    weight_hh: Sequence[Array],
    x: Array,
    d_outputs: Array,
    d_h_last: Array,
    saved: Array,
    tokens: Array | None,
    lengths: Array,
    resets: Array | None,
    reverse: Sequence[bool],
    reset_after: bool,
    of_x: bool,
    bfloat16: bool = False,
) -> Sequence[Array]:
    """The gradients of weight_ih..., weight_hh..., bias_ih..., bias_hh..., x, h0 and h_reset, or an
    empty one; without of_x, that of x is empty."""
    given = (x, d_outputs, d_h_last, saved, tokens, lengths, resets, reverse, reset_after, of_x)
    shapes = backward_shapes(weight_ih, weight_hh, *given)
    call = jax.ffi.ffi_call("gru_backward", shapes, vmap_method="sequential")
    places = (or_empty(tokens, jnp.int32), here(lengths), or_empty(resets, bool))
    arguments = (*weight_ih, *weight_hh, x, d_outputs, d_h_last, saved, *places)
    return call(*arguments, **attributes(reverse, reset_after, bfloat16))


def backward_shapes(*given: Any) -> list[jax.ShapeDtypeStruct]:
    """What backward returns, not filled in, for the same arguments."""
    weight_ih, weight_hh, x, _, d_h_last, _, _, _, resets, _, _, of_x, *_ = given
    shape = like(d_h_last)
    return [
        *(shape(each.shape) for each in (*weight_ih, *weight_hh)),
        *(shape((3 * d_h_last.shape[2],)) for _ in (*weight_ih, *weight_hh)),
        shape(x.shape if of_x else (0,)),
        shape(d_h_last.shape),
        shape((0,) if resets is None else d_h_last.shape),
    ]


# What follows tells JAX how to differentiate. `arrays` are x, the weights of each direction, h0 and
# h_reset, `places` are tokens, lengths and resets, `how` is (reset_after, return_sequences,
# bfloat16, gpu).
Arrays = tuple[Array, tuple[tuple[Array, ...], ...], Array, Array | None]
Places = tuple[Array | None, Array, Array | None]
How = tuple[bool, bool, bool, bool]


def compute(arrays: Arrays, places: Places, how: How, save: bool) -> tuple[Array, Array, Array]:
    """A layer, without a gradient; returns what `forward` does."""
    reverse = directions_of(arrays[1])
    given: tuple = (*operands(*arrays), *places, reverse, *how[:2], save, how[2])
    outputs, h_last, saved = (cuda.forward if how[3] else forward)(*given)
    return outputs, h_last, saved


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def layer(arrays: Arrays, places: Places, how: How) -> tuple[Array, Array]:
    """(outputs, h_last), where no derivative is wanted."""
    outputs, h_last, _ = compute(arrays, places, how, save=False)
    return outputs, h_last


@layer.defjvp
def _(
    how: How, primals: tuple[Arrays, Places], tangents: tuple[Arrays, Places]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    (*results, _), (*along, _) = jax.jvp(partial(saving, how=how), mended(*primals), tangents)
    return tuple(results), tuple(along)


def mended(arrays: Arrays, places: Places) -> tuple[Arrays, Places]:
    """Lengths and tokens in range, states not a number in rows where they were not: the kernel sees
    to it itself where no derivative is wanted."""
    (x, weights, h0, h_reset), (tokens, lengths, resets) = arrays, places
    steps = (x if tokens is None else tokens).shape[0]
    lengths, wrong = in_range("lengths", lengths, steps, "T")
    h0, h_reset = spoil(wrong, h0, h_reset)
    if tokens is not None:
        tokens, wrong = in_range("tokens", tokens, x.shape[0] - 1, "K - 1")
        h0, h_reset = spoil(None if wrong is None else wrong.any(axis=0), h0, h_reset)
    return (x, weights, h0, h_reset), (tokens, lengths, resets)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def saving(arrays: Arrays, places: Places, how: How) -> tuple[Array, Array, Array]:
    """(outputs, h_last, saved), where one is."""
    return compute(arrays, places, how, save=True)


@saving.defjvp
def _(
    how: How, primals: tuple[Arrays, Places], tangents: tuple[Arrays, Places]
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array]]:
    outputs, h_last, saved = saving(*primals, how)
    known, tree = jax.tree.flatten((*primals, saved))
    d_outputs, d_h_last = push_p.bind(*known, *jax.tree.leaves(tangents[0]), tree=tree, how=how)
    return (outputs, h_last, saved), (d_outputs, d_h_last, jnp.zeros_like(saved))


@partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def pull(
    arrays: Arrays,
    places: Places,
    saved: Array,
    cotangents: tuple[Array, Array],
    how: How,
    of_x: bool,
) -> Arrays:
    """The gradients of arrays; that of x is zero unless of_x says that it is wanted."""
    (weight_ih, weight_hh, _, _, x, *_), R = operands(*arrays), len(arrays[1])
    given = (weight_ih, weight_hh, x, *cotangents, saved, *places, directions_of(weight_ih))
    found = (cuda.backward if how[3] else backward)(*given, how[0], of_x, how[2])
    d_weights = tuple(tuple(found[i : 4 * R : R]) for i in range(R))
    d_x = found[4 * R] if of_x else jnp.zeros_like(x)
    return d_x, d_weights, found[4 * R + 1], None if arrays[3] is None else found[4 * R + 2]


@pull.defjvp
def _(how: How, of_x: bool, primals: tuple, tangents: tuple) -> tuple[Arrays, Arrays]:
    arrays, places, _, cotangents = primals

    def gradients(arrays: Arrays, cotangents: tuple[Array, Array]) -> Arrays:
        return jax.vjp(by_scan(places, how), *arrays)[1](cotangents)

    _, along = jax.jvp(gradients, (arrays, cotangents), (tangents[0], tangents[3]))
    return pull(*primals, how, of_x), along


def directions_of(entries: Sequence[Any]) -> list[bool]:
    """Whether each direction is the backward one."""
    return [False, True][: len(entries)]


def by_scan(places: Places, how: How) -> Callable[..., Found]:
    """The function of the arrays that the kernel computes, written out by gru.py."""
    from jax_impl.gru import scan

    (tokens, lengths, resets), (reset_after, return_sequences, bfloat16, _) = places, how

    def run(x: Array, weights: Sequence[Weights], h0: Array, h_reset: Array | None) -> Found:
        how = {"reset_after": reset_after, "return_sequences": return_sequences}
        return scan(x, tokens, weights, lengths, h0, resets, h_reset, **how, bfloat16=bfloat16)

    return run


# The derivative of (outputs, h_last) along tangents of the arrays: a linear function, of which JAX
# is told the transpose, the kernel's backward. It takes the leaves of (arrays, places, saved), a
# tree of that structure, and those of the tangents.
push_p = Primitive("gru_push")
push_p.multiple_results = True


def push(*leaves: Array, tree: Any, how: How) -> list[Array]:
    """As it is computed in forward mode: by scan."""
    arrays, places, _ = jax.tree.unflatten(tree, leaves[: tree.num_leaves])
    tangents = jax.tree.unflatten(jax.tree.structure(arrays), leaves[tree.num_leaves :])
    return list(jax.jvp(by_scan(places, how), arrays, tangents)[1])


def push_shapes(*leaves: Any, tree: Any, how: How) -> list[Any]:
    """The shapes of its results, those of outputs and h_last."""
    (x, _, h0, _), (tokens, *_), _ = jax.tree.unflatten(tree, leaves[: tree.num_leaves])
    R, B, H = h0.shape
    steps = (x if tokens is None else tokens).shape[0] if how[1] else 0
    return [h0.update(shape=(steps, B, R * H), weak_type=False), h0.update(weak_type=False)]


def push_again(primals: Sequence[Array], tangents: Sequence[Any], **how: Any) -> tuple:
    """Its own derivative, by all arguments: that of scan."""
    wanted = [i for i, primal in enumerate(primals) if jnp.issubdtype(primal.dtype, jnp.floating)]

    def function(*some: Array) -> list[Array]:
        leaves = list(primals)
        for i, each in zip(wanted, some, strict=True):
            leaves[i] = each
        return push(*leaves, **how)

    return jax.jvp(
        function,
        [primals[i] for i in wanted],
        [ad.instantiate_zeros(tangents[i]) for i in wanted],
    )


def push_transposed(cotangents: Sequence[Any], *leaves: Any, tree: Any, how: How) -> list:
    """The gradients of the tangents."""
    arrays, places, saved = jax.tree.unflatten(tree, leaves[: tree.num_leaves])
    given = tuple(map(ad.instantiate_zeros, cotangents))
    linear = leaves[tree.num_leaves :]
    of_x = ad.is_undefined_primal(linear[0])  # the vectors of words are often frozen
    gradients = jax.tree.leaves(pull(arrays, places, saved, given, how, of_x))
    found = [
        gradient if ad.is_undefined_primal(each) else None
        for gradient, each in zip(gradients, linear, strict=True)
    ]
    return [*[None] * tree.num_leaves, *found]


def push_batched(leaves: Sequence[Array], dims: Sequence[Any], **how: Any) -> tuple[list, list]:
    """jax.vmap: a call for each entry of the new axis."""
    mapped = {i: jnp.moveaxis(leaves[i], dim, 0) for i, dim in enumerate(dims) if dim is not None}

    def entry(some: dict[int, Array]) -> list[Array]:
        return push_p.bind(*(some.get(i, each) for i, each in enumerate(leaves)), **how)

    results = jax.lax.map(entry, mapped)
    return results, [0] * len(results)


push_p.def_impl(push)
push_p.def_abstract_eval(push_shapes)
ad.primitive_jvps[push_p] = push_again
ad.primitive_transposes[push_p] = push_transposed
batching.primitive_batchers[push_p] = push_batched
mlir.register_lowering(push_p, mlir.lower_fun(push, multiple_results=True))


# An array as it is. Where jax.export compiles it, the user is told what to do instead.
here_p = Primitive("gru_here")
here_p.def_impl(lambda array: array)
here_p.def_abstract_eval(lambda array: array)
batching.primitive_batchers[here_p] = lambda arrays, dims: (here_p.bind(*arrays), dims[0])


def here_lowered(context: Any, array: Any) -> list:
    """Warns under jax.export: JAX refuses calls of a kernel that it does not know."""
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


def attributes(
    reverse: Sequence[bool], reset_after: bool, bfloat16: bool = False
) -> dict[str, Any]:
    """What a call is told besides its arrays."""
    return {
        "reverse": np.array(reverse, np.int64),
        "reset_after": np.bool_(reset_after),
        "bfloat16": np.bool_(bfloat16),
        "threads": np.int32(kernels.threads()),
    }
