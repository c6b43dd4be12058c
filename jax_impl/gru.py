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

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, DTypeLike, Float, Int

from common.errors import InputError
from common.params import GRU_PARAMETERS, init_gru, structure
from jax_impl import fused

IMPLEMENTATIONS = ("scan",) + (("fused",) if fused.available() else ())


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
    if tokens is not None:
        a_zr, a_n = a_zr[tokens], a_n[tokens]
    word = within(lengths, len(a_zr))[..., None]

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
    reverse = (False, True)[: len(h0)]
    projections = [project(x, *each) for each in zip(weight_ih, bias_ih, strict=True)]
    if implementation == "fused":
        return fused.recur_all(
            projections,
            tokens,
            weight_hh,
            bias_hh,
            lengths,
            h0,
            reverse=reverse,
            reset_after=reset_after,
            every_step=every_step,
        )
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
        for i in range(len(h0))
    ]
    outputs, h_last = zip(*results, strict=True)
    return jnp.concatenate(outputs, axis=-1), jnp.stack(h_last)


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
    points at. What stands in x behind the end of a review (t >= lengths) has no influence, even
    where it is not a number. A direction's first state is h0[layer * R + direction], or zero.

    Returns (outputs, h_last): the last layer's states, zero behind the end, and the state of every
    layer and direction after its last word (its first, for the backward direction). Without
    every_step, outputs are left out: they have no time steps.
    """
    # Where a compiled function will run is not known here, so only "auto" depends on it.
    device = jax.default_backend() if implementation == "auto" else "cpu"
    implementation = resolve(implementation, device)
    layers, directions = structure(parameters)
    R, size = len(directions), parameters["gru.0.forward.weight_hh"].shape[-1]
    if h0 is None:
        h0 = jnp.zeros((layers * R, len(lengths), size), x.dtype)
    if tokens is None:
        x = jnp.where(within(lengths, len(x))[..., None], x, 0)
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
    return x if every_step else x[:0], jnp.concatenate(h_last)


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
        """Parameters are drawn from rngs.params, uniformly in ±1/sqrt(hidden_size)."""
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
        state of every layer and direction after its last step.
        """
        if lengths is None:
            lengths = jnp.full(x.shape[0], x.shape[1])
        outputs, h_last = gru(
            canonical(self, self.names),
            x.swapaxes(0, 1),
            lengths,
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
