"""The GRU in JAX/Flax. Its twin is torch_impl/gru.py: the same names in the same order.

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

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, DTypeLike, Float, Int

from common.arguments import FLOATS, check_gru, check_mapping, check_range, check_shape, check_sizes
from common.errors import InputError
from common.params import GRU_PARAMETERS, init_gru
from jax_impl import fused

IMPLEMENTATIONS = ("scan",) + (("fused",) if fused.available() else ())
HALF = (jnp.bfloat16, jnp.float16)


def resolve(implementation: str, device: str = "cpu") -> str:
    """The implementation that `implementation` ("auto" or a name) stands for on a kind of device.

    auto is fused where the kernel has been built and the device is the CPU, else scan.
    """
    here = [name for name in IMPLEMENTATIONS if name != "fused" or device == "cpu"]
    if implementation == "auto":
        return here[-1]
    if implementation not in here:
        raise InputError(
            f"--implementation {implementation}: on {device}, JAX has auto, {', '.join(here)}"
        )
    return implementation


def within(lengths: Int[Array, " B"], steps: int) -> Bool[Array, "T B"]:
    """Which time steps of which reviews are words, not padding."""
    return jnp.arange(steps)[:, None] < lengths


def project(
    x: Float[Array, "*N D"], weight_ih: Float[Array, "3H D"], bias_ih: Float[Array, " 3H"]
) -> Float[Array, "*N 3H"]:
    """The inputs' share of the pre-activations, x W' + b, for all inputs.

    Many inputs are multiplied in parts: so is the sum over them in the gradient of W, and its
    rounding error is half of what it is in one go.
    """
    parts = min(max(len(x) // 64, 1), 4)
    return jnp.concatenate([part @ weight_ih.T + bias_ih for part in jnp.array_split(x, parts)])


def gather(
    rows: Float[Array, "K N"], tokens: Int[Array, "T B"], word: Bool[Array, "T B 1"]
) -> Float[Array, "T B N"]:
    """The rows that words point at; padding has zeros, since a NaN would come back as 0 * NaN."""
    return jnp.where(word, rows[tokens], 0)


def scan(
    projections: Float[Array, "T B 3H"] | Float[Array, "K 3H"],
    tokens: Int[Array, "T B"] | None,
    weight_hh: Float[Array, "3H H"],
    bias_hh: Float[Array, " 3H"],
    lengths: Int[Array, " B"],
    h0: Float[Array, "B H"],
    *,
    reverse: bool,
    reset_after: bool,
) -> tuple[Float[Array, "T B H"], Float[Array, "B H"]]:
    """The recurrence as a loop over time, differentiated by the framework."""
    size = h0.shape[-1]
    U_zr, U_n = jnp.split(weight_hh, [2 * size])
    c_zr, c_n = jnp.split(bias_hh, [2 * size])
    # What does not depend on the state is added and taken apart for all time steps at once.
    a_zr, a_n = jnp.split(projections, [2 * size], axis=-1)
    a_zr = a_zr + c_zr
    if not reset_after:
        a_n = a_n + c_n
    word = within(lengths, len(a_zr) if tokens is None else len(tokens))[..., None]
    if tokens is not None:
        a_zr, a_n = gather(a_zr, tokens, word), gather(a_n, tokens, word)

    # What is cheap is computed once more in the backward pass: to keep it costs more time.
    @partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False)
    def step(
        h: Float[Array, "B H"],
        inputs: tuple[Float[Array, "B 2H"], Float[Array, "B H"], Bool[Array, "B 1"]],
    ) -> tuple[Float[Array, "B H"], Float[Array, "B H"]]:
        a_zr, a_n, word = inputs
        z, r = jnp.split(jax.nn.sigmoid(a_zr + h @ U_zr.T), 2, axis=-1)
        a_n = a_n + r * (h @ U_n.T + c_n) if reset_after else a_n + (r * h) @ U_n.T
        n = jnp.tanh(a_n)
        h = jnp.where(word, h + z * (n - h), h)
        return h, h

    h, outputs = jax.lax.scan(step, h0, (a_zr, a_n, word), reverse=reverse)
    return jnp.where(word, outputs, 0), h


def scan_all(
    projections: Sequence[Float[Array, "T B 3H"]] | Sequence[Float[Array, "K 3H"]],
    tokens: Int[Array, "T B"] | None,
    weight_hh: Sequence[Float[Array, "3H H"]],
    bias_hh: Sequence[Float[Array, " 3H"]],
    lengths: Int[Array, " B"],
    h0: Float[Array, "R B H"],
    *,
    reverse: Sequence[bool],
    reset_after: bool,
    every_step: bool = True,
) -> tuple[Float[Array, "T B R*H"], Float[Array, "R B H"]]:
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
    joined = jnp.concatenate(outputs, axis=-1)
    return joined if every_step else joined[:0], jnp.stack(h_last)


def layer(
    x: Float[Array, "T B D"] | Float[Array, "K D"],
    tokens: Int[Array, "T B"] | None,
    weight_ih: Sequence[Float[Array, "3H D"]],
    weight_hh: Sequence[Float[Array, "3H H"]],
    bias_ih: Sequence[Float[Array, " 3H"]],
    bias_hh: Sequence[Float[Array, " 3H"]],
    lengths: Int[Array, " B"],
    h0: Float[Array, "R B H"],
    *,
    reset_after: bool,
    implementation: str,
    every_step: bool,
) -> tuple[Float[Array, "T B R*H"], Float[Array, "R B H"]]:
    """One layer; the parameters are lists with an entry a direction: forward, or both."""
    recurrence = fused.recur_all if implementation == "fused" else scan_all
    return recurrence(
        [project(x, *each) for each in zip(weight_ih, bias_ih, strict=True)],
        tokens,
        weight_hh,
        bias_hh,
        lengths,
        h0,
        reverse=(False, True)[: len(h0)],
        reset_after=reset_after,
        every_step=every_step,
    )


def gru(
    parameters: Mapping[str, Array],
    x: Float[Array, "T B D"] | Float[Array, "K D"],
    lengths: Int[Array, " B"],
    h0: Float[Array, "L*R B H"] | None = None,
    *,
    tokens: Int[Array, "T B"] | None = None,
    reset_after: bool = False,
    implementation: str = "auto",
    every_step: bool = True,
) -> tuple[Float[Array, "T B R*H"], Float[Array, "L*R B H"]]:
    """A GRU as a pure function of its canonical parameters (see common/params.py).

    x holds the inputs [T, B, D], or, with tokens [T, B], the distinct inputs [K, D] that tokens
    points at. What stands in x where no word reads it (at t >= lengths) has no influence, even
    where it is not a number. A direction's first state is h0[layer * R + direction], or zero.

    Returns (outputs, h_last): the last layer's states, zero behind the end, and the state of every
    layer and direction after its last word (its first, for the backward direction). Without
    every_step, outputs are left out: they have no time steps.

    Raises ValueError for a shape that does not fit, for lengths that are not in 0..T and tokens
    that are not in 0..K-1, TypeError for a dtype. x, h0 and the parameters have the same dtype.
    float32 and float64 are computed in; of bfloat16 and float16, whatever the implementation, the
    numbers are computed with in float32 and the results rounded once. Lengths and tokens may be of
    any integer dtype. Where their values are not known, as under jax.jit, nothing can be raised: a
    row of the batch with a length or a token out of range has NaN for its states.
    """
    own, x, lengths, h0, tokens = check_arrays(parameters, x, lengths, h0, tokens)
    layers, directions, size = check_gru(own, x, lengths, h0, tokens)
    dtype = x.dtype
    if dtype in HALF:
        own, x, h0 = in_dtype(jnp.float32, own, x, h0)
    # Where a compiled function will run is not known here, so only "auto" depends on it.
    device = jax.default_backend() if implementation == "auto" else "cpu"
    implementation = resolve(implementation, device)
    steps, R = len(x) if tokens is None else len(tokens), len(directions)
    if h0 is None:
        h0 = jnp.zeros((layers * R, len(lengths), size), x.dtype)
    lengths, wrong = in_range("lengths", lengths, steps, "T, the number of time steps")
    if wrong is not None:
        h0 = jnp.where(wrong[:, None], jnp.nan, h0)
    if tokens is not None:
        tokens, wrong = in_range("tokens", tokens, len(x) - 1, "K - 1, x having K rows")
        if wrong is not None:
            h0 = jnp.where(wrong.any(axis=0)[:, None], jnp.nan, h0)
    x = without_padding(x, tokens, lengths)
    h_last = []
    for number in range(layers):
        weight_ih, weight_hh, bias_ih, bias_hh = (
            [own[f"gru.{number}.{direction}.{name}"] for direction in directions]
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
    return outputs.astype(dtype), jnp.concatenate(h_last).astype(dtype)


def check_arrays(
    parameters: Mapping[str, Array],
    x: Array,
    lengths: Array,
    h0: Array | None = None,
    tokens: Array | None = None,
) -> tuple[dict[str, Array], Array, Any, Array | None, Any]:
    """The arguments of `gru` as arrays, its own parameters alone; TypeError for what is none.

    Lengths and tokens that were NumPy's, or numbers in a list, become NumPy's: with all their bits.
    """

    check_mapping(parameters)
    own = {name: as_array(name, p) for name, p in parameters.items() if name.startswith("gru.")}
    return (
        own,
        as_array("x", x),
        as_array("lengths", lengths, np.asarray),
        None if h0 is None else as_array("h0", h0),
        None if tokens is None else as_array("tokens", tokens, np.asarray),
    )


def as_array(name: str, value: Any, convert: Callable[[np.ndarray], Any] = jnp.asarray) -> Any:
    """What may be taken for an array as one: JAX's, or what `convert` makes of NumPy's."""
    if isinstance(value, Array):
        return value
    array = np.asarray(value)
    if array.dtype.kind in "OSUV" and array.dtype.name not in FLOATS:
        raise TypeError(f"{name}: expected an array, found {type(value).__name__}")
    return convert(array)


def in_dtype(
    dtype: DTypeLike, parameters: Mapping[str, Array], x: Array, h0: Array | None
) -> tuple[dict[str, Array], Array, Array | None]:
    """parameters, x and h0 in another dtype."""
    converted = {name: value.astype(dtype) for name, value in parameters.items()}
    return converted, x.astype(dtype), None if h0 is None else h0.astype(dtype)


def in_range(
    name: str, array: Int[Array, "*N"], limit: int, what: str
) -> tuple[Int[Array, "*N"], Bool[Array, "*N"] | None]:
    """The array as int32, its values brought into 0..limit, and where they were not.

    Raises ValueError where they are known and out of range; then the second is None.
    """
    if not isinstance(array, jax.core.Tracer):
        values = np.asarray(array)
        if values.size:
            check_range(name, int(values.min()), int(values.max()), limit, what)
        return jnp.asarray(array, jnp.int32), None
    if array.dtype.itemsize < 4:  # too small, maybe, for the limit
        array = array.astype(jnp.int32)
    return jnp.clip(array, 0, limit).astype(jnp.int32), (array < 0) | (array > limit)


def without_padding(
    x: Float[Array, "T B D"] | Float[Array, "K D"],
    tokens: Int[Array, "T B"] | None,
    lengths: Int[Array, " B"],
) -> Float[Array, "T B D"] | Float[Array, "K D"]:
    """x with zeros where no word reads it: what stands there has no part in gradients, either."""
    if tokens is None:
        return jnp.where(within(lengths, len(x))[..., None], x, 0)
    word = within(lengths, len(tokens))
    read = jnp.zeros(len(x) + 1, bool).at[jnp.where(word, tokens, len(x))].set(True)
    return jnp.where(read[:-1, None], x, 0)


class GRU(nnx.Module):
    """What torch.nn.GRU(batch_first=True) is in PyTorch, with the equations above.

    Example:
        outputs, h_last = GRU(300, 128, bidirectional=True, rngs=nnx.Rngs(0))(x, lengths)
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
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Parameters are drawn from rngs.params, uniformly in ±1/sqrt(hidden_size).

        Raises ValueError for a size below 1 and for an unknown implementation.
        """
        check_sizes(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        resolve(implementation)
        self.input_size = input_size
        self.reset_after = reset_after
        self.implementation = implementation
        seed = int(jax.random.randint(rngs.params(), (), 0, 2**31 - 1))
        drawn = init_gru(input_size, hidden_size, num_layers, bidirectional, seed)
        self.names = register(self, drawn, dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        lengths: Int[Array, " B"] | None = None,
        h0: Float[Array, "L*R B H"] | None = None,
    ) -> tuple[Float[Array, "B T R*H"], Float[Array, "L*R B H"]]:
        """As torch.nn.GRU(batch_first=True); lengths, in any order, counts each row's time steps.

        Returns (outputs, h_last): the last layer's states, zero behind the end of a row, and the
        state of every layer and direction after its last step. Raises as `gru` does.
        """
        x = as_array("x", x)
        check_shape("x", x, "B", "T", self.input_size)
        rows: Any = np.full(x.shape[0], x.shape[1]) if lengths is None else lengths
        outputs, h_last = gru(
            canonical(self, self.names),
            x.swapaxes(0, 1),
            rows,
            h0,
            reset_after=self.reset_after,
            implementation=self.implementation,
        )
        return outputs.swapaxes(0, 1), h_last


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
