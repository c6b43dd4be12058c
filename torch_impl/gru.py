"""The GRU in PyTorch. Its twin is jax_impl/gru.py: the same names in the same order.

    z = sigmoid(x W_z' + b_z + h U_z' + c_z)             update gate: how much is let in
    r = sigmoid(x W_r' + b_r + h U_r' + c_r)             reset gate
    n = tanh(x W_n' + b_n + (r * h) U_n' + c_n)          candidate, reset_after=False (Cho 2014)
    n = tanh(x W_n' + b_n + r * (h U_n' + c_n))          candidate, reset_after=True (cuDNN)
    h <- h + z * (n - h)

A layer is two stages: `project` takes the products with W for all time steps at once, `scan` (or
`fused`, the kernel) goes through time. Arrays are time-major. B reviews, T time steps, K distinct
inputs, D input size, H hidden size, L layers, R directions; W, U, b, c (weight_ih, weight_hh,
bias_ih, bias_hh) hold the three gates one after the other: z, r, n.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from common.arguments import (
    check_gru,
    check_mapping,
    check_range,
    check_shape,
    check_sizes,
)
from common.errors import InputError
from common.params import GRU_PARAMETERS, init_gru
from torch_impl import fused

IMPLEMENTATIONS = ("loop", "scan") + (("fused",) if fused.available() else ())
HALF = (torch.bfloat16, torch.float16)
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)


def resolve(implementation: str, device: str = "cpu") -> str:
    """The implementation that `implementation` ("auto" or a name) stands for on a kind of device.

    auto is fused where the kernel has been built and the device is the CPU, else scan.
    """
    here = [name for name in IMPLEMENTATIONS if name != "fused" or device == "cpu"]
    if implementation == "auto":
        return here[-1]
    if implementation not in here:
        raise InputError(
            f"--implementation {implementation}: on {device}, PyTorch has auto, {', '.join(here)}"
        )
    return implementation


def within(lengths: Int[Tensor, " B"], steps: int) -> Bool[Tensor, "T B"]:
    """Which time steps of which reviews are words, not padding."""
    return torch.arange(steps, device=lengths.device)[:, None] < lengths


def loop(
    x: Float[Tensor, "T B D"] | Float[Tensor, "K D"],
    tokens: Int[Tensor, "T B"] | None,
    weight_ih: Float[Tensor, "3H D"],
    weight_hh: Float[Tensor, "3H H"],
    bias_ih: Float[Tensor, " 3H"],
    bias_hh: Float[Tensor, " 3H"],
    lengths: Int[Tensor, " B"],
    h0: Float[Tensor, "B H"],
    *,
    reverse: bool,
    reset_after: bool,
) -> tuple[Float[Tensor, "T B H"], Float[Tensor, "B H"]]:
    """A layer as one writes it down: the equations, a word at a time. The teaching version."""
    W_z, W_r, W_n = weight_ih.chunk(3)
    U_z, U_r, U_n = weight_hh.chunk(3)
    b_z, b_r, b_n = bias_ih.chunk(3)
    c_z, c_r, c_n = bias_hh.chunk(3)
    steps = len(x) if tokens is None else len(tokens)
    h, outputs = h0, [torch.zeros_like(h0)] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        word = (t < lengths)[:, None]
        x_t = torch.where(word, x[t] if tokens is None else x[tokens[t]], 0)
        z = torch.sigmoid(F.linear(x_t, W_z, b_z) + F.linear(h, U_z, c_z))
        r = torch.sigmoid(F.linear(x_t, W_r, b_r) + F.linear(h, U_r, c_r))
        if reset_after:
            n = torch.tanh(F.linear(x_t, W_n, b_n) + r * F.linear(h, U_n, c_n))
        else:
            n = torch.tanh(F.linear(x_t, W_n, b_n) + F.linear(r * h, U_n, c_n))
        h = torch.where(word, h + z * (n - h), h)
        outputs[t] = torch.where(word, h, 0)
    return stack(outputs, h0), h


def project(
    x: Float[Tensor, "*N D"], weight_ih: Float[Tensor, "3H D"], bias_ih: Float[Tensor, " 3H"]
) -> Float[Tensor, "*N 3H"]:
    """The inputs' share of the pre-activations, x W' + b, for all inputs.

    Many inputs are multiplied in parts: so is the sum over them in the gradient of W, and its
    rounding error is half of what it is in one go.
    """
    parts = min(x.shape[0] // 64, 4)
    if parts < 2:
        return F.linear(x, weight_ih, bias_ih)
    return torch.cat([F.linear(part, weight_ih, bias_ih) for part in x.chunk(parts)])


def gather(
    rows: Float[Tensor, "K N"], tokens: Int[Tensor, "T B"], word: Bool[Tensor, "T B 1"]
) -> Float[Tensor, "T B N"]:
    """The rows that words point at; padding has zeros, since a NaN would come back as 0 * NaN."""
    return F.embedding(torch.where(word[..., 0], tokens, len(rows)), F.pad(rows, (0, 0, 0, 1)))


def scan(
    projections: Float[Tensor, "T B 3H"] | Float[Tensor, "K 3H"],
    tokens: Int[Tensor, "T B"] | None,
    weight_hh: Float[Tensor, "3H H"],
    bias_hh: Float[Tensor, " 3H"],
    lengths: Int[Tensor, " B"],
    h0: Float[Tensor, "B H"],
    *,
    reverse: bool,
    reset_after: bool,
) -> tuple[Float[Tensor, "T B H"], Float[Tensor, "B H"]]:
    """The recurrence as a loop over time, differentiated by the framework."""
    size = h0.shape[-1]
    U_zr, U_n = (U.T for U in weight_hh.split([2 * size, size]))
    c_zr, c_n = bias_hh.split([2 * size, size])
    # What does not depend on the state is added and taken apart for all time steps at once.
    a_zr, a_n = projections.split([2 * size, size], dim=-1)
    a_zr = a_zr + c_zr
    if not reset_after:
        a_n = a_n + c_n
    word = within(lengths, len(a_zr) if tokens is None else len(tokens))[..., None]
    if tokens is not None:
        a_zr, a_n = gather(a_zr, tokens, word), gather(a_n, tokens, word)
    inputs = [array.unbind() for array in (a_zr, a_n, word)]
    h, outputs = h0, [h0] * len(a_zr)

    def step(
        h: Float[Tensor, "B H"],
        a_zr: Float[Tensor, "B 2H"],
        a_n: Float[Tensor, "B H"],
        word: Bool[Tensor, "B 1"],
    ) -> Float[Tensor, "B H"]:
        z, r = torch.sigmoid(torch.addmm(a_zr, h, U_zr)).chunk(2, dim=-1)
        a_n = a_n + r * torch.addmm(c_n, h, U_n) if reset_after else torch.addmm(a_n, r * h, U_n)
        n = torch.tanh(a_n)
        return torch.where(word, torch.lerp(h, n, z), h)  # lerp: h + z * (n - h)

    for t in reversed(range(len(outputs))) if reverse else range(len(outputs)):
        h = outputs[t] = step(h, *(array[t] for array in inputs))
    return torch.where(word, stack(outputs, h0), 0), h


def stack(outputs: list[Float[Tensor, "B H"]], h0: Float[Tensor, "B H"]) -> Float[Tensor, "T B H"]:
    """The outputs of all time steps as one array, also when there are none."""
    return torch.stack(outputs) if outputs else h0.new_zeros(0, *h0.shape)


def scan_all(
    projections: Sequence[Float[Tensor, "T B 3H"]] | Sequence[Float[Tensor, "K 3H"]],
    tokens: Int[Tensor, "T B"] | None,
    weight_hh: Sequence[Float[Tensor, "3H H"]],
    bias_hh: Sequence[Float[Tensor, " 3H"]],
    lengths: Int[Tensor, " B"],
    h0: Float[Tensor, "R B H"],
    *,
    reverse: Sequence[bool],
    reset_after: bool,
    every_step: bool = True,
) -> tuple[Float[Tensor, "T B R*H"], Float[Tensor, "R B H"]]:
    """`scan` for all directions of a layer: (outputs, h_last), as fused.recur_all."""
    results = [
        scan(
            projections[i],
            tokens,
            weight_hh[i],
            bias_hh[i],
            lengths,
            h0[i],
            reverse=reverse[i],
            reset_after=reset_after,
        )
        for i in range(len(reverse))
    ]
    outputs, h_last = zip(*results, strict=True)
    joined = torch.cat(outputs, dim=-1)
    return joined if every_step else joined[:0], torch.stack(h_last)


def layer(
    x: Float[Tensor, "T B D"] | Float[Tensor, "K D"],
    tokens: Int[Tensor, "T B"] | None,
    weight_ih: Sequence[Float[Tensor, "3H D"]],
    weight_hh: Sequence[Float[Tensor, "3H H"]],
    bias_ih: Sequence[Float[Tensor, " 3H"]],
    bias_hh: Sequence[Float[Tensor, " 3H"]],
    lengths: Int[Tensor, " B"],
    h0: Float[Tensor, "R B H"],
    *,
    reset_after: bool,
    implementation: str,
    every_step: bool,
) -> tuple[Float[Tensor, "T B R*H"], Float[Tensor, "R B H"]]:
    """One layer; the parameters are lists with an entry a direction: forward, or both."""
    reverse = (False, True)[: h0.shape[0]]
    if implementation == "loop":
        results = [
            loop(
                x,
                tokens,
                weight_ih[i],
                weight_hh[i],
                bias_ih[i],
                bias_hh[i],
                lengths,
                h0[i],
                reverse=reverse[i],
                reset_after=reset_after,
            )
            for i in range(len(h0))
        ]
        outputs, h_last = zip(*results, strict=True)
        return torch.cat(outputs, dim=-1), torch.stack(h_last)
    recurrence = fused.recur_all if implementation == "fused" else scan_all
    return recurrence(
        [project(x, *each) for each in zip(weight_ih, bias_ih, strict=True)],
        tokens,
        weight_hh,
        bias_hh,
        lengths,
        h0,
        reverse=reverse,
        reset_after=reset_after,
        every_step=every_step,
    )


def gru(
    parameters: Mapping[str, Tensor],
    x: Float[Tensor, "T B D"] | Float[Tensor, "K D"],
    lengths: Int[Tensor, " B"],
    h0: Float[Tensor, "L*R B H"] | None = None,
    *,
    tokens: Int[Tensor, "T B"] | None = None,
    reset_after: bool = False,
    implementation: str = "auto",
    every_step: bool = True,
) -> tuple[Float[Tensor, "T B R*H"], Float[Tensor, "L*R B H"]]:
    """A GRU as a pure function of its canonical parameters (see common/params.py).

    x holds the inputs [T, B, D], or, with tokens [T, B], the distinct inputs [K, D] that tokens
    points at. What stands in x where no word reads it (at t >= lengths) has no influence, even
    where it is not a number. A direction's first state is h0[layer * R + direction], or zero.

    Returns (outputs, h_last): the last layer's states, zero behind the end, and the state of every
    layer and direction after its last word (its first, for the backward direction). Without
    every_step, outputs are left out: they have no time steps.

    Raises ValueError for a shape or a device that does not fit, for lengths that are not in 0..T
    and tokens that are not in 0..K-1, TypeError for a dtype. x, h0 and the parameters have the same
    dtype. float32 and float64 are computed in; of bfloat16 and float16, whatever the
    implementation, the numbers are computed with in float32 and the results rounded once. Under
    torch.autocast, float32 counts as autocast's dtype. Lengths and tokens may be of any integer
    dtype; their values are not looked at where they are not known: while torch.compile traces, and
    under torch.func.vmap. There, in scan and loop, a length beyond T counts as T, one below 0 as 0.
    """
    check_arrays(parameters, x=x, lengths=lengths, h0=h0, tokens=tokens)
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        parameters, x, h0 = in_dtype(low, parameters, x, h0, only=(torch.float32, *HALF))
        with torch.autocast(device, enabled=False):
            return gru(
                parameters,
                x,
                lengths,
                h0,
                tokens=tokens,
                reset_after=reset_after,
                implementation=implementation,
                every_step=every_step,
            )
    layers, directions, size = check_gru(parameters, x, lengths, h0, tokens)
    dtype = x.dtype
    if dtype in HALF:
        parameters, x, h0 = in_dtype(torch.float32, parameters, x, h0, only=HALF)
    implementation = resolve(implementation, device)
    steps, R = (x if tokens is None else tokens).shape[0], len(directions)
    kernel_looks = implementation == "fused" and not fused.forward_mode()
    if not kernel_looks or lengths.dtype != torch.int32:
        lengths = in_range("lengths", lengths, steps, "T, the number of time steps")
    if tokens is not None and (not kernel_looks or tokens.dtype != torch.int32):
        tokens = in_range("tokens", tokens, len(x) - 1, "K - 1, x having K rows")
    if h0 is None:
        h0 = x.new_zeros(layers * R, lengths.shape[0], size)
    x = without_padding(x, tokens, lengths)
    h_last = []
    for number in range(layers):
        weight_ih, weight_hh, bias_ih, bias_hh = (
            [parameters[f"gru.{number}.{direction}.{name}"] for direction in directions]
            for name in GRU_PARAMETERS
        )
        x, last = layer(
            x,
            tokens,
            weight_ih,
            weight_hh,
            bias_ih,
            bias_hh,
            lengths,
            h0[number * R : (number + 1) * R],
            reset_after=reset_after,
            implementation=implementation,
            every_step=every_step or number < layers - 1,
        )
        tokens = None
        h_last.append(last)
    outputs = x if every_step else x[:0]
    states = torch.cat(h_last) if layers > 1 else h_last[0]
    return (outputs.to(dtype), states.to(dtype)) if dtype in HALF else (outputs, states)


def check_arrays(parameters: Mapping[str, Tensor], **others: Tensor | None) -> None:
    """Raise TypeError for what is no dense tensor, ValueError for one that is not where others are.

    The others are named arguments; h0 and tokens may be None.
    """
    check_mapping(parameters)
    device = None
    for given in (others, parameters):
        for name, value in given.items():
            if value is None and name in ("h0", "tokens") and given is others:
                continue
            array = as_array(name, value)
            device = device or array.device
            if array.device != device:
                raise ValueError(f"{name}: expected it on {device}, found {array.device}")


def as_array(name: str, value: Any) -> Tensor:
    """What may be taken for an array: dense tensors. Nothing else is made one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, found {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, found one of {value.layout}")
    return value


def in_dtype(
    dtype: torch.dtype,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    h0: Tensor | None,
    *,
    only: tuple[torch.dtype, ...],
) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """The GRU's parameters, x and h0 in another dtype, if they are in one of `only`."""

    def convert(array: Tensor) -> Tensor:
        return array.to(dtype) if array.dtype in only else array

    own = {name: convert(p) for name, p in parameters.items() if name.startswith("gru.")}
    return own, convert(x), None if h0 is None else convert(h0)


def in_range(name: str, array: Int[Tensor, "..."], limit: int, what: str) -> Int[Tensor, "..."]:
    """The array as int32, its values having been seen to be in 0..limit, where they are known."""
    if array.numel() and fused.plain(array):
        lowest, highest = torch.aminmax(array if array.dtype in SIGNED else array.to(torch.int64))
        check_range(name, int(lowest), int(highest), limit, what)
    return array.to(torch.int32)


def without_padding(
    x: Float[Tensor, "T B D"] | Float[Tensor, "K D"],
    tokens: Int[Tensor, "T B"] | None,
    lengths: Int[Tensor, " B"],
) -> Float[Tensor, "T B D"] | Float[Tensor, "K D"]:
    """x with zeros where no word reads it: what stands there has no part in gradients, either."""
    if not torch.is_grad_enabled() or (fused.plain(x) and math.isfinite(x.detach().sum())):
        return x  # 0 times it is 0, and only gradients have such products
    if tokens is None:
        return torch.where(within(lengths, len(x))[..., None], x, 0)
    word = within(lengths, len(tokens))
    read = torch.zeros(len(x) + 1, dtype=torch.bool, device=x.device)
    places = torch.where(word, tokens, len(x)).flatten().long().clamp(0, len(x))
    read = read.scatter(0, places, True)
    return torch.where(read[:-1, None], x, 0)


class GRU(nn.Module):
    """A drop-in for torch.nn.GRU(batch_first=True), with the equations above.

    Example:
        outputs, h_last = GRU(300, 128, bidirectional=True)(x, lengths)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        bidirectional: bool = False,
        reset_after: bool = False,
        implementation: str = "auto",
    ) -> None:
        """Parameters are drawn with torch's generator, uniformly in ±1/sqrt(hidden_size).

        Raises ValueError for a size below 1 and for an unknown implementation.
        """
        super().__init__()
        check_sizes(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        resolve(implementation)
        self.input_size = input_size
        self.reset_after = reset_after
        self.implementation = implementation
        seed = int(torch.randint(2**31, ()))
        drawn = init_gru(input_size, hidden_size, num_layers, bidirectional, seed)
        self.names = register(self, drawn, torch.get_default_dtype())

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        lengths: Int[Tensor, " B"] | None = None,
        h0: Float[Tensor, "L*R B H"] | None = None,
    ) -> tuple[Float[Tensor, "B T R*H"], Float[Tensor, "L*R B H"]]:
        """As torch.nn.GRU(batch_first=True); lengths, in any order, counts each row's time steps.

        Returns (outputs, h_last): the last layer's states, zero behind the end of a row, and the
        state of every layer and direction after its last step. Raises as `gru` does.
        """
        check_shape("x", as_array("x", x), "B", "T", self.input_size)
        if lengths is None:
            lengths = torch.full(x.shape[:1], x.shape[1], dtype=torch.int32, device=x.device)
        outputs, h_last = gru(
            canonical(self, self.names),
            x.transpose(0, 1),
            lengths,
            h0,
            reset_after=self.reset_after,
            implementation=self.implementation,
        )
        return outputs.transpose(0, 1), h_last


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
