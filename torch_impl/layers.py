"""Layers of any cell in PyTorch: arguments, padding, directions. Its twin is jax_impl/layers.py.

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

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from common.arguments import OPTIONAL, check_cell, check_mapping, check_range
from common.cells import Cell, LayerCall, Recurrence
from torch_impl.private import count_dispatch_modes, has_storage, is_forward_mode, is_transformed

HALF = (torch.bfloat16, torch.float16)
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)

Weights = Sequence[Tensor]
LayerOutput = tuple[Float[Tensor, "T B R*H"], Float[Tensor, "R B H"]]
Restart = tuple[Bool[Tensor, "T B 1"], Float[Tensor, "B H"]]
"""The time steps before which the state of a direction is reset, and the state it is reset to."""


def within(lengths: Int[Tensor, " B"], steps: int) -> Bool[Tensor, "T B"]:
    """The mask: true at the time steps of a row, false at its padding."""
    return torch.arange(steps, device=lengths.device)[:, None] < lengths


def project(
    x: Float[Tensor, "*N D"], weight_ih: Float[Tensor, "G*H D"], bias_ih: Float[Tensor, " G*H"]
) -> Float[Tensor, "*N G*H"]:
    """The input projections x W' + b.

    Many inputs are multiplied in parts. The gradient of W is then also summed in parts, which
    halves its rounding error.
    """
    if (parts := parts_of(x)) == 1:
        return F.linear(x, weight_ih, bias_ih)
    return torch.cat([F.linear(part, weight_ih, bias_ih) for part in x.chunk(parts)])


def parts_of(x: Float[Tensor, "*N D"]) -> int:
    """The number of parts in which `project` multiplies."""
    if torch.compiler.is_exporting():  # the exported program accepts any number of inputs
        return 1
    *inputs, _ = x.shape
    return max(min(math.prod(inputs) // 64, x.shape[0], 4), 1)


def gather(
    rows: Float[Tensor, "T B N"] | Float[Tensor, "K N"],
    tokens: Int[Tensor, "T B"] | None,
    mask: Bool[Tensor, "T B 1"],
) -> Float[Tensor, "T B N"]:
    """The rows of all time steps, which tokens, if given, index.

    With tokens, padding is zero, because the gradient of a NaN there would be 0 * NaN.
    """
    if tokens is None:
        return rows
    return F.embedding(torch.where(mask[..., 0], tokens, rows.shape[0]), F.pad(rows, (0, 0, 0, 1)))


def unroll(
    step: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    a: Float[Tensor, "T B G*H"],
    mask: Bool[Tensor, "T B 1"],
    h: Float[Tensor, "B H"],
    hidden: Weights,
    restart: Restart | None = None,
    perturbations: Float[Tensor, "T B H"] | None = None,
    *,
    reverse: bool,
    reset_after: bool,
) -> tuple[Float[Tensor, "B H"], dict[str, Float[Tensor, "T B H"]]]:
    """Call a cell's step at each time step; returns the last state and the intermediate values.

    The intermediate values are "states", the state after each step, and those that the step returns
    by name. At padding the state does not change. hidden contains the parameters that the step
    takes after the state: weight_hh, bias_hh and the cell's additional ones. The perturbations
    are added to the states before the next step.
    """
    # One unbind is faster than indexing, in whose backward each a[t] has a gradient as large as a.
    inputs, live = a.unbind(), mask.unbind()
    added = () if perturbations is None else perturbations.unbind()
    begin = () if restart is None else restart[0].unbind()
    values: list[dict[str, Tensor]] = [{}] * len(inputs)
    for t in reversed(range(len(inputs))) if reverse else range(len(inputs)):
        if restart is not None:
            h = torch.where(begin[t], restart[1], h)
        after, between = step(inputs[t], h, *hidden, reset_after=reset_after)
        h = torch.where(live[t], after, h)
        if perturbations is not None:
            h = h + added[t]
        values[t] = {"states": h, **between}
    if not values:
        return h, {"states": h.new_zeros(0, *h.shape)}
    return h, {name: torch.stack([each[name] for each in values]) for name in values[0]}


def by_direction(direction: Callable[..., tuple[Tensor, Tensor]], call: LayerCall) -> LayerOutput:
    """Compute a layer from a function that computes one direction of it.

    direction(call, mask, weights, h, restart, *, reverse) returns (last state, states).
    """
    # The gradient of the input weights multiplies padding by 0. The product is 0 only for finite
    # padding.
    x = call.x
    if torch.is_grad_enabled() and not (is_eager(x) and math.isfinite(x.detach().sum())):
        call = call._replace(x=without_padding(x, call.tokens, call.lengths))
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
    outputs = torch.where(mask, torch.cat([each[..., :size] for each in states], dim=-1), 0)
    return outputs if call.return_sequences else outputs[:0], torch.stack(h_last)


def beginnings(
    resets: Bool[Tensor, "T B"], mask: Bool[Tensor, "T B 1"], *, reverse: bool
) -> Bool[Tensor, "T B 1"]:
    """The steps before which a direction is reset; the backward one starts at a sequence's end."""
    begins = resets[..., None] & mask
    return torch.cat([begins[1:], torch.zeros_like(begins[:1])]) if reverse else begins


def loop(step: Callable[..., tuple[Tensor, dict[str, Tensor]]]) -> Callable[..., LayerOutput]:
    """The recurrence that calls a cell's step at each time step: the version to read."""

    def direction(
        call: LayerCall,
        mask: Bool[Tensor, "T B 1"],
        weights: Weights,
        h: Float[Tensor, "B H"],
        restart: Restart | None,
        *,
        reverse: bool,
    ) -> tuple[Float[Tensor, "B H"], Float[Tensor, "T B H"]]:
        weight_ih, weight_hh, bias_ih, *hidden = weights
        a = gather(project(call.x, weight_ih, bias_ih), call.tokens, mask)
        options = {"reverse": reverse, "reset_after": call.reset_after}
        h, values = unroll(step, a, mask, h, (weight_hh, *hidden), restart, None, **options)
        return h, values["states"]

    return partial(by_direction, direction)


def run(
    cell: Cell,
    parameters: Mapping[str, Tensor],
    call: LayerCall,
    between: Callable[[Tensor], Tensor] | None = None,
    *,
    implementation: str = "auto",
) -> tuple[Float[Tensor, "T B R*H"], Float[Tensor, "L*R B H"]]:
    """All layers of a cell, as a pure function of its canonical parameters: see `gru` in gru.py.

    between is applied to the outputs of each layer but the last.
    """
    fast = [*cell.recurrences.values()][-1].try_inference_kernel
    if fast is not None and between is None and implementation in ("auto", "fused"):
        result = fast(parameters, call)
        if result is not None:
            return result
    check_arrays(parameters, **call.arrays)
    device = call.x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        low, only = torch.get_autocast_dtype(device), (torch.float32, *HALF)
        own, call = in_dtype(low, cell, parameters, call, only)
        with torch.autocast(device, enabled=False):
            return run(cell, own, call, between, implementation=implementation)
    layers, directions, size = check_cell(cell, parameters, call)
    dtype = call.x.dtype
    if dtype in HALF:
        parameters, call = in_dtype(torch.float32, cell, parameters, call, HALF)
    kind = call.x.dtype if call.product_dtype == "float32" else call.product_dtype
    recurrence = cell.recurrences[cell.resolve(implementation, device, kind, size)]
    if call.product_dtype == "bfloat16" and call.x.dtype != torch.float32:
        raise TypeError(f"bfloat16: requires float32 arrays, found {call.x.dtype}")
    checks = recurrence.checks and not is_forward_mode()
    call = complete(call, layers * len(directions), cell.spec.states * size, checks)
    sides = [[(i, side) for side in directions] for i in range(layers)]
    x, states = layer_by_layer(cell, recurrence, parameters, call, sides, between)
    return (x.to(dtype), states.to(dtype)) if dtype in HALF else (x, states)


def complete(call: LayerCall, rows: int, size: int, checks: bool) -> LayerCall:
    """The call with its lengths and tokens in int32, and with all its states [rows, B, size].

    checks: whether the recurrence validates the range of lengths and tokens in int32.
    """
    x, tokens, lengths, h0 = call.x, call.tokens, call.lengths, call.h0
    if not checks or lengths.dtype != torch.int32:
        lengths = in_range("lengths", lengths, call.steps, "T, the number of time steps")
    if tokens is not None and (not checks or tokens.dtype != torch.int32):
        tokens = in_range("tokens", tokens, x.shape[0] - 1, "K - 1, x having K rows")
    if h0 is None:
        h0 = x.new_zeros(rows, lengths.shape[0], size)
    h_reset = h0 if call.resets is not None and call.h_reset is None else call.h_reset
    return LayerCall(x, tokens, (), lengths, h0, call.resets, h_reset, *call[7:])


def layer_by_layer(
    cell: Cell,
    recurrence: Recurrence,
    parameters: Mapping[str, Tensor],
    call: LayerCall,
    sides: Sequence[Sequence[tuple[int, str]]],
    between: Callable[[Tensor], Tensor] | None,
) -> tuple[Float[Tensor, "T B R*H"], Float[Tensor, "L*R B H"]]:
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
    return x, torch.cat(h_last) if len(h_last) > 1 else h_last[0]


def check_arrays(parameters: Mapping[str, Tensor], **others: Any) -> None:
    """Raise TypeError unless all are dense tensors, ValueError unless all are on one device.

    others: the arguments by name.
    """
    check_mapping(parameters)
    device = None
    for arrays in (others, parameters):
        for name, value in arrays.items():
            if value is None and name in OPTIONAL and arrays is others:
                continue
            if not isinstance(value, Tensor) or value.layout is not torch.strided:
                as_array(name, value)  # raises
            device = device or value.device
            if value.device != device:
                raise ValueError(f"{name}: expected it on {device}, found {value.device}")


def as_array(name: str, value: Any) -> Tensor:
    """The value, which has to be a dense tensor. Raises TypeError for anything else."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, found {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, found one of {value.layout}")
    return value


def in_dtype(
    dtype: torch.dtype,
    cell: Cell,
    parameters: Mapping[str, Tensor],
    call: LayerCall,
    only: tuple[torch.dtype, ...],
) -> tuple[dict[str, Tensor], LayerCall]:
    """The cell's parameters and the call in another dtype, if they are in one of `only`."""

    def convert(array: Tensor | None) -> Any:
        return array if array is None or array.dtype not in only else array.to(dtype)

    own = {n: convert(p) for n, p in parameters.items() if n.startswith(f"{cell.name}.")}
    x, h0, h_reset = map(convert, (call.x, call.h0, call.h_reset))
    return own, call._replace(x=x, h0=h0, h_reset=h_reset)


def in_range(name: str, array: Int[Tensor, "..."], limit: int, what: str) -> Int[Tensor, "..."]:
    """The array as int32. Raises ValueError for known values outside 0..limit."""
    if array.numel() and is_eager(array):
        lowest, highest = torch.aminmax(array if array.dtype in SIGNED else array.to(torch.int64))
        check_range(name, int(lowest), int(highest), limit, what)
    return array.to(torch.int32)


def without_padding(
    x: Float[Tensor, "T B D"] | Float[Tensor, "K D"],
    tokens: Int[Tensor, "T B"] | None,
    lengths: Int[Tensor, " B"],
) -> Float[Tensor, "T B D"] | Float[Tensor, "K D"]:
    """x with zeros where only padding reads it, so that these values do not reach the gradients."""
    if tokens is None:
        return torch.where(within(lengths, x.shape[0])[..., None], x, 0)
    mask, K = within(lengths, tokens.shape[0]), x.shape[0]
    read = torch.zeros(K + 1, dtype=torch.bool, device=x.device)
    places = torch.where(mask, tokens, K).flatten().long().clamp(0, K)
    read = read.scatter(0, places, True)
    return torch.where(read[:-1, None], x, 0)


def register(
    module: nn.Module, parameters: Mapping[str, np.ndarray], dtype: torch.dtype
) -> tuple[str, ...]:
    """Make the canonical parameters attributes of a module; returns their canonical names."""
    for name, value in parameters.items():
        parameter = nn.Parameter(torch.tensor(value, dtype=dtype))
        module.register_parameter(name.replace(".", "_"), parameter)  # no dots in attributes
    return tuple(parameters)


def canonical(module: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The parameters that `register` made, under their canonical names."""
    return {name: getattr(module, name.replace(".", "_")) for name in names}


def is_eager(*arrays: Tensor | None) -> bool:
    """Whether all arrays are ordinary tensors in memory, not compiled, fake or transformed."""
    return not (
        torch.compiler.is_compiling()
        or is_transformed()
        or count_dispatch_modes()
        or any(
            type(each) not in (Tensor, nn.Parameter) or each.is_meta or not has_storage(each)
            for each in arrays
            if each is not None
        )
    )
