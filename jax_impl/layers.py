"""Layers of any cell in JAX/Flax: arguments, padding, directions. Its twin is torch_impl/layers.py.

A cell (the GRU, the tanh RNN) is defined by its step, which computes the next state from the input
projection and the state. A recurrence computes all directions of a layer: the outputs and last
states from the layer's inputs. `loop` makes a recurrence of any cell's step.

Arrays are time-major. B is the batch, T time steps, K distinct inputs, D input size, H hidden size,
L layers, R directions (forward, or forward and backward), G the number of the cell's blocks of H
rows, one for each pre-activation, S the size of a state in units of H. The weights of a direction
are weight_ih, weight_hh, bias_ih, bias_hh and the cell's additional parameters.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, DTypeLike, Float, Int

from common.arguments import FLOATS, OPTIONAL, check_cell, check_mapping, check_range
from common.cells import Cell, LayerCall, Recurrence

HALF = (jnp.bfloat16, jnp.float16)

Weights = Sequence[Array]
LayerOutput = tuple[Float[Array, "T B R*H"], Float[Array, "R B H"]]
Restart = tuple[Bool[Array, "T B 1"], Float[Array, "B H"]]
"""The time steps before which the state of a direction is reset, and the state it is reset to."""


def within(lengths: Int[Array, " B"], steps: int) -> Bool[Array, "T B"]:
    """The mask: true at the time steps of a row, false at its padding."""
    return jnp.arange(steps)[:, None] < lengths


def project(
    x: Float[Array, "*N D"], weight_ih: Float[Array, "G*H D"], bias_ih: Float[Array, " G*H"]
) -> Float[Array, "*N G*H"]:
    """The input projections x W' + b.

    Many inputs are multiplied in parts. The gradient of W is then also summed in parts, which
    halves its rounding error.
    """
    parts = jnp.array_split(x, parts_of(x))
    return jnp.concatenate([part @ weight_ih.T + bias_ih for part in parts])


def parts_of(x: Float[Array, "*N D"]) -> int:
    """The number of parts in which `project` multiplies."""
    *inputs, _ = x.shape
    if any(map(jax.export.is_symbolic_dim, inputs)):  # for any number of inputs
        return 1
    return max(min(math.prod(inputs) // 64, x.shape[0], 4), 1)


def gather(
    rows: Float[Array, "T B N"] | Float[Array, "K N"],
    tokens: Int[Array, "T B"] | None,
    mask: Bool[Array, "T B 1"],
) -> Float[Array, "T B N"]:
    """The rows of all time steps, which tokens, if given, index.

    With tokens, padding is zero, because the gradient of a NaN there would be 0 * NaN.
    """
    if tokens is None:
        return rows
    return jnp.where(mask, rows[tokens], 0)


def unroll(
    step: Callable[..., tuple[Array, dict[str, Array]]],
    a: Float[Array, "T B G*H"],
    mask: Bool[Array, "T B 1"],
    h: Float[Array, "B H"],
    hidden: Weights,
    restart: Restart | None = None,
    perturbations: Float[Array, "T B H"] | None = None,
    *,
    reverse: bool,
    reset_after: bool,
) -> tuple[Float[Array, "B H"], dict[str, Float[Array, "T B H"]]]:
    """Call a cell's step at each time step; returns the last state and the intermediate values.

    The intermediate values are "states", the state after each step, and those that the step returns
    by name. At padding the state does not change. hidden contains the parameters that the step
    takes after the state: weight_hh, bias_hh and the cell's additional ones. The perturbations
    are added to the states before the next step.
    """

    def one(
        h: Float[Array, "B H"], at: tuple[Array, Array, Any, Array | None]
    ) -> tuple[Float[Array, "B H"], dict[str, Float[Array, "B H"]]]:
        a, mask, begin, perturbation = at
        if restart is not None:
            h = jnp.where(begin, restart[1], h)
        after, between = step(a, h, *hidden, reset_after=reset_after)
        h = jnp.where(mask, after, h)
        if perturbation is not None:
            h = h + perturbation
        return h, {"states": h, **between}

    begin = None if restart is None else restart[0]
    return jax.lax.scan(one, h, (a, mask, begin, perturbations), reverse=reverse)


def by_direction(direction: Callable[..., tuple[Array, Array]], call: LayerCall) -> LayerOutput:
    """Compute a layer from a function that computes one direction of it.

    direction(call, mask, weights, h, restart, *, reverse) returns (last state, states).
    """
    call = call._replace(x=without_padding(call.x, call.tokens, call.lengths))
    mask = within(call.lengths, call.steps)[..., None]
    restarts: list[Restart | None] = [None] * len(call.weights)
    if call.resets is not None and call.h_reset is not None:
        restarts = [
            (beginnings(call.resets, mask, reverse=i == 1), h) for i, h in enumerate(call.h_reset)
        ]
    results = [
        direction(call, mask, weights, call.h0[i], restart, reverse=i == 1)
        for i, (weights, restart) in enumerate(zip(call.weights, restarts, strict=True))
    ]
    h_last, states = zip(*results, strict=True)
    size = call.weights[0][1].shape[-1]
    outputs = jnp.where(mask, jnp.concatenate([each[..., :size] for each in states], axis=-1), 0)
    return outputs if call.return_sequences else outputs[:0], jnp.stack(h_last)


def beginnings(
    resets: Bool[Array, "T B"], mask: Bool[Array, "T B 1"], *, reverse: bool
) -> Bool[Array, "T B 1"]:
    """The steps before which a direction is reset; the backward one starts at a sequence's end."""
    begins = resets[..., None] & mask
    return jnp.concatenate([begins[1:], jnp.zeros_like(begins[:1])]) if reverse else begins


def loop(step: Callable[..., tuple[Array, dict[str, Array]]]) -> Callable[..., LayerOutput]:
    """The recurrence that calls a cell's step at each time step: the version to read."""

    def direction(
        call: LayerCall,
        mask: Bool[Array, "T B 1"],
        weights: Weights,
        h: Float[Array, "B H"],
        restart: Restart | None,
        *,
        reverse: bool,
    ) -> tuple[Float[Array, "B H"], Float[Array, "T B H"]]:
        weight_ih, weight_hh, bias_ih, *hidden = weights
        a = gather(project(call.x, weight_ih, bias_ih), call.tokens, mask)
        options = {"reverse": reverse, "reset_after": call.reset_after}
        h, values = unroll(step, a, mask, h, (weight_hh, *hidden), restart, None, **options)
        return h, values["states"]

    return partial(by_direction, direction)


def run(
    cell: Cell,
    parameters: Mapping[str, Array],
    call: LayerCall,
    between: Callable[[Array], Array] | None = None,
    *,
    implementation: str = "auto",
) -> tuple[Float[Array, "T B R*H"], Float[Array, "L*R B H"]]:
    """All layers of a cell, as a pure function of its canonical parameters: see `gru` in gru.py.

    between is applied to the outputs of each layer but the last.
    """
    parameters, arrays = check_arrays(cell, parameters, **call.arrays)
    call = call._replace(**arrays)
    layers, directions, size = check_cell(cell, parameters, call)
    dtype = call.x.dtype
    if dtype in HALF:
        parameters, call = in_dtype(jnp.float32, parameters, call)
    # Where a compiled function will run is not known here, so only "auto" depends on it.
    device = jax.default_backend() if implementation == "auto" else None
    kind = call.x.dtype if call.product_dtype == "float32" else call.product_dtype
    recurrence = cell.recurrences[cell.resolve(implementation, device, kind, size)]
    if call.product_dtype == "bfloat16" and call.x.dtype != jnp.float32:
        raise TypeError(f"bfloat16: requires float32 arrays, found {call.x.dtype}")
    call = complete(call, layers * len(directions), cell.spec.states * size, recurrence.checks)
    sides = [[(i, side) for side in directions] for i in range(layers)]
    x, states = layer_by_layer(cell, recurrence, parameters, call, sides, between)
    return x.astype(dtype), states.astype(dtype)


def complete(call: LayerCall, rows: int, size: int, checks: bool) -> LayerCall:
    """The call with its lengths and tokens in int32, and with all its states [rows, B, size].

    checks: whether the recurrence validates the range of lengths and tokens in int32.
    """
    x, tokens, h0 = call.x, call.tokens, call.h0
    if h0 is None:
        h0 = jnp.zeros((rows, call.lengths.shape[0], size), x.dtype)
    h_reset = h0 if call.resets is not None and call.h_reset is None else call.h_reset
    clip = partial(in_range, checks=checks)
    lengths, wrong = clip("lengths", call.lengths, call.steps, "T, the number of time steps")
    h0, h_reset = spoil(wrong, h0, h_reset)
    if tokens is not None:
        tokens, wrong = clip("tokens", tokens, x.shape[0] - 1, "K - 1, x having K rows")
        h0, h_reset = spoil(None if wrong is None else wrong.any(axis=0), h0, h_reset)
    return LayerCall(x, tokens, (), lengths, h0, call.resets, h_reset, *call[7:])


def layer_by_layer(
    cell: Cell,
    recurrence: Recurrence,
    parameters: Mapping[str, Array],
    call: LayerCall,
    sides: Sequence[Sequence[tuple[int, str]]],
    between: Callable[[Array], Array] | None,
) -> tuple[Float[Array, "T B R*H"], Float[Array, "L*R B H"]]:
    """`run` of a completed call. sides: for each layer, a (number, direction) per direction."""
    x, tokens, R, h_last = call.x, call.tokens, len(sides[0]), []
    for number, side_list in enumerate(sides):
        states = slice(number * R, (number + 1) * R)
        if number and between is not None:
            x = between(x)
        layer = LayerCall(
            x,
            tokens,
            [cell.weights(parameters, *side) for side in side_list],
            call.lengths,
            call.h0[states],
            call.resets,
            None if call.h_reset is None else call.h_reset[states],
            call.reset_after,
            call.return_sequences or number < len(sides) - 1,
            call.product_dtype,
            cell.name,
        )
        x, last = recurrence.compute(layer)
        tokens = None
        h_last.append(last)
    return x, jnp.concatenate(h_last)


def check_arrays(
    cell: Cell, parameters: Mapping[str, Array], **others: Any
) -> tuple[dict[str, Array], dict[str, Any]]:
    """The cell's parameters and the others as arrays. Raises TypeError for values that are none.

    others: the arguments by name. Lengths and tokens from NumPy or a list stay NumPy arrays, so
    that no bits are lost.
    """
    check_mapping(parameters)
    own = {n: as_array(n, p) for n, p in parameters.items() if n.startswith(f"{cell.name}.")}
    arrays = {}
    for name, value in others.items():
        absent = value is None and name in OPTIONAL
        convert = np.asarray if name in ("lengths", "tokens") else jnp.asarray
        arrays[name] = None if absent else as_array(name, value, convert)
    return own, arrays


def as_array(name: str, value: Any, convert: Callable[[np.ndarray], Any] = jnp.asarray) -> Any:
    """The value as an array: an Array unchanged, anything else as `convert` of a NumPy copy."""
    if isinstance(value, Array):
        return value
    array = np.array(value)  # a copy, because JAX reads in place, even after the call has returned
    if array.dtype.kind in "OSUV" and array.dtype.name not in FLOATS:
        raise TypeError(f"{name}: expected an array, found {type(value).__name__}")
    return convert(array)


def in_dtype(
    dtype: DTypeLike, parameters: Mapping[str, Array], call: LayerCall
) -> tuple[dict[str, Array], LayerCall]:
    """The parameters and the call in another dtype."""
    arrays = {"x": call.x, "h0": call.h0, "h_reset": call.h_reset}
    own, arrays = jax.tree.map(lambda array: array.astype(dtype), (dict(parameters), arrays))
    return own, call._replace(**arrays)


def in_range(
    name: str, array: Int[Array, "*N"], limit: int, what: str, checks: bool = False
) -> tuple[Int[Array, "*N"], Bool[Array, "*N"] | None]:
    """The array as int32 with its values in 0..limit, and a mask of those that were not.

    The mask is None if the values are known, in which case one out of range raises ValueError, or
    if the recurrence checks them.
    """
    if not isinstance(array, jax.core.Tracer):
        values = np.asarray(array)
        if values.size:
            check_range(name, int(values.min()), int(values.max()), limit, what)
        return jnp.asarray(array, jnp.int32), None
    if checks and array.dtype == jnp.int32:
        return array, None
    if array.dtype.itemsize < 4:  # which may be too small for the limit
        array = array.astype(jnp.int32)
    wrong = (array < 0) | (array > limit)  # clipped to the limit, so that all steps are NaN
    return jnp.where(wrong, limit, array).astype(jnp.int32), wrong


def spoil(rows: Bool[Array, " B"] | None, *states: Any) -> list[Any]:
    """The states [R, B, H] (or None) with NaN in these rows."""
    if rows is None:
        return list(states)
    return [s if s is None else s + jnp.where(rows[:, None], jnp.nan, 0) for s in states]


def without_padding(
    x: Float[Array, "T B D"] | Float[Array, "K D"],
    tokens: Int[Array, "T B"] | None,
    lengths: Int[Array, " B"],
) -> Float[Array, "T B D"] | Float[Array, "K D"]:
    """x with zeros where only padding reads it, so that these values do not reach the gradients."""
    if tokens is None:
        return jnp.where(within(lengths, x.shape[0])[..., None], x, 0)
    mask, K = within(lengths, tokens.shape[0]), x.shape[0]
    read = jnp.zeros(K + 1, bool).at[jnp.where(mask, tokens, K)].set(True)
    return jnp.where(read[:-1, None], x, 0)


def register(
    module: nnx.Module, parameters: Mapping[str, np.ndarray], dtype: DTypeLike
) -> tuple[str, ...]:
    """Make the canonical parameters attributes of a module; returns their canonical names."""
    for name, value in parameters.items():
        parameter = nnx.Param(jnp.array(value, dtype))
        setattr(module, name.replace(".", "_"), parameter)  # no dots in attributes
    return tuple(parameters)


def canonical(module: nnx.Module, names: tuple[str, ...]) -> dict[str, Array]:
    """The parameters that `register` made, under their canonical names."""
    return {name: getattr(module, name.replace(".", "_"))[...] for name in names}
