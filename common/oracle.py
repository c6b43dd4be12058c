"""The GRU and its gradient in NumPy float64: what every other implementation is measured against.

Straight from the equations, one time step after the other, no framework and no automatic
differentiation. Speed does not matter here; being obviously right does. In the order of the text:
`forward` (the equations), `backward` (their derivative by the chain rule, written out), `classify`
(last states -> ReLU -> linear -> cross-entropy, and its derivative).

The equations, for the input x of one step and the state h (Cho et al. 2014, arXiv:1406.1078;
the second form of n is the one of version 1 of that paper, of cuDNN and of nn.GRU):

    z = sigmoid(x W_z' + b_z + h U_z' + c_z)
    r = sigmoid(x W_r' + b_r + h U_r' + c_r)
    n = tanh(x W_n' + b_n + (r * h) U_n' + c_n)      reset_after=False
    n = tanh(x W_n' + b_n + r * (h U_n' + c_n))      reset_after=True
    h <- h + z * (n - h)

Parameters are a flat dict of arrays, gates in the order z, r, n:

    gru.{layer}.{forward|backward}.weight_ih [3H, D]  weight_hh [3H, H]  bias_ih [3H]  bias_hh [3H]
    head.weight [C, H * directions]                   head.bias [C]
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import DTypeLike

from common.params import GRU_PARAMETERS, structure


@dataclass(frozen=True)
class Direction:
    """One direction of one layer, as it was computed; index t is the place in the sequence."""

    name: str
    """Start of its parameters' names, e.g. "gru.0.backward"."""
    x: Float[np.ndarray, "T B D"]
    """The inputs, 0 at padded steps."""
    h: Float[np.ndarray, "T B H"]
    """The state that step t started from."""
    z: Float[np.ndarray, "T B H"]
    r: Float[np.ndarray, "T B H"]
    n: Float[np.ndarray, "T B H"]


@dataclass(frozen=True)
class Forward:
    """The result of `forward`, with everything that `backward` needs."""

    outputs: Float[np.ndarray, "T B H*directions"]
    """The last layer's state after each step, 0 at padded steps."""
    h_last: Float[np.ndarray, "L*directions B H"]
    """Each direction's last state, in the order layer 0 forward, layer 0 backward, layer 1 …"""
    parameters: dict[str, np.ndarray]
    live: Bool[np.ndarray, "T B 1"]
    """Whether row b has a word at step t."""
    layers: list[list[Direction]]
    reset_after: bool


@dataclass(frozen=True)
class Classified:
    """The result of `classify`."""

    logits: Float[np.ndarray, "B C"]
    loss: Float[np.ndarray, ""]
    """Mean cross-entropy over the rows with a label; 0 when there are none."""
    gradients: dict[str, np.ndarray]
    """Of the loss, with respect to head.weight and head.bias."""
    d_h_last: Float[np.ndarray, "L*directions B H"]
    """Of the loss, with respect to h_last."""


def forward(
    parameters: Mapping[str, np.ndarray],
    x: Float[np.ndarray, "T B D"],
    lengths: Int[np.ndarray, " B"],
    h0: Float[np.ndarray, "L*directions B H"] | None = None,
    *,
    reset_after: bool,
    dtype: DTypeLike = np.float64,
) -> Forward:
    """Run the GRU over a padded batch.

    Row b has `lengths[b]` words, in steps 0 … lengths[b] - 1; what x holds after them is never
    looked at. The backward direction starts at the row's own last word, from its own h0. A row
    of length 0 keeps its h0. How many layers and directions there are is read off the names of
    the parameters. `dtype` is the type of every number; float32 shows what rounding alone does.
    """
    parameters = {name: np.asarray(value, dtype) for name, value in parameters.items()}
    count, sides = structure(parameters)
    T, B, _ = x.shape
    if h0 is None:
        h0 = np.zeros((count * len(sides), B, parameters["gru.0.forward.weight_hh"].shape[1]))

    live = (np.arange(T)[:, None] < lengths)[..., None]
    outputs = np.where(live, x, 0).astype(dtype)
    layers: list[list[Direction]] = []
    last_states: list[np.ndarray] = []
    for layer in range(count):
        directions, states = [], []
        for side in sides:
            direction, after, last = _forward_direction(
                parameters,
                f"gru.{layer}.{side}",
                outputs,
                live,
                h0[len(last_states)].astype(dtype),
                reset_after=reset_after,
            )
            directions.append(direction)
            states.append(after)
            last_states.append(last)
        layers.append(directions)
        outputs = np.concatenate(states, axis=-1)
    return Forward(outputs, np.stack(last_states), parameters, live, layers, reset_after)


def _forward_direction(
    parameters: Mapping[str, np.ndarray],
    name: str,
    x: Float[np.ndarray, "T B D"],
    live: Bool[np.ndarray, "T B 1"],
    h: Float[np.ndarray, "B H"],
    *,
    reset_after: bool,
) -> tuple[Direction, Float[np.ndarray, "T B H"], Float[np.ndarray, "B H"]]:
    """Run one direction of one layer from state h; also return its outputs and last state."""
    (W_z, W_r, W_n), (U_z, U_r, U_n), (b_z, b_r, b_n), (c_z, c_r, c_n) = (
        np.split(parameters[f"{name}.{part}"], 3) for part in GRU_PARAMETERS
    )
    h_all, z_all, r_all, n_all, outputs = np.zeros((5, len(x), *h.shape), h.dtype)
    for t in _steps(name, len(x)):
        z = _sigmoid(x[t] @ W_z.T + b_z + h @ U_z.T + c_z)
        r = _sigmoid(x[t] @ W_r.T + b_r + h @ U_r.T + c_r)
        if reset_after:
            n = np.tanh(x[t] @ W_n.T + b_n + r * (h @ U_n.T + c_n))
        else:
            n = np.tanh(x[t] @ W_n.T + b_n + (r * h) @ U_n.T + c_n)
        h_all[t], z_all[t], r_all[t], n_all[t] = h, z, r, n
        h = np.where(live[t], h + z * (n - h), h)
        outputs[t] = np.where(live[t], h, 0)
    return Direction(name, x, h_all, z_all, r_all, n_all), outputs, h


def backward(
    run: Forward,
    d_outputs: Float[np.ndarray, "T B H*directions"],
    d_h_last: Float[np.ndarray, "L*directions B H"],
) -> dict[str, np.ndarray]:
    """Gradients, given those with respect to the outputs and the last states.

    Returns one array for each parameter of the GRU, under its name, and for "x" and "h0".
    """
    gradients: dict[str, np.ndarray] = {}
    d_h0 = np.zeros_like(run.h_last)
    place = len(d_h0)
    for directions in reversed(run.layers):
        d_states = np.split(d_outputs, len(directions), axis=-1)
        # A layer's input feeds all of its directions, so their gradients for it add up.
        d_outputs = np.zeros_like(directions[0].x)
        for direction, d_state in zip(reversed(directions), reversed(d_states), strict=True):
            place -= 1
            d_x, d_h0[place] = _backward_direction(
                run, direction, d_state, d_h_last[place], gradients
            )
            d_outputs += d_x
    return gradients | {"x": d_outputs, "h0": d_h0}


def _backward_direction(
    run: Forward,
    direction: Direction,
    d_outputs: Float[np.ndarray, "T B H"],
    d_h: Float[np.ndarray, "B H"],
    gradients: dict[str, np.ndarray],
) -> tuple[Float[np.ndarray, "T B D"], Float[np.ndarray, "B H"]]:
    """Walk `_forward_direction` in the opposite order; add its parameters' gradients.

    Here d_v is the derivative with respect to v, and a_v is what stands inside v's sigmoid or
    tanh. Returns the gradients with respect to x and h0.
    """
    names = [f"{direction.name}.{part}" for part in GRU_PARAMETERS]
    (W_z, W_r, W_n), (U_z, U_r, U_n), _, (_, _, c_n) = (
        np.split(run.parameters[name], 3) for name in names
    )
    gradients.update({name: np.zeros_like(run.parameters[name]) for name in names})
    # np.split gives views: adding to these adds to the gradients.
    (d_W_z, d_W_r, d_W_n), (d_U_z, d_U_r, d_U_n), (d_b_z, d_b_r, d_b_n), (d_c_z, d_c_r, d_c_n) = (
        np.split(gradients[name], 3) for name in names
    )
    d_x = np.zeros_like(direction.x)
    for t in reversed(_steps(direction.name, len(d_x))):
        x, h, z, r, n = (getattr(direction, field)[t] for field in "xhzrn")

        # h_new = h + z * (n - h) in a live row; a padded row hands its gradient through.
        d_h_new = np.where(run.live[t], d_h + d_outputs[t], 0)
        d_a_z = d_h_new * (n - h) * z * (1 - z)
        d_a_n = d_h_new * z * (1 - n**2)
        d_h_live = d_h_new * (1 - z)

        if run.reset_after:  # a_n = … + r * q with q = h U_n' + c_n
            d_r = d_a_n * (h @ U_n.T + c_n)
            d_q = d_a_n * r
            d_h_live += d_q @ U_n
            d_U_n += d_q.T @ h
            d_c_n += d_q.sum(axis=0)
        else:  # a_n = … + q U_n' + c_n with q = r * h
            d_q = d_a_n @ U_n
            d_r = d_q * h
            d_h_live += d_q * r
            d_U_n += d_a_n.T @ (r * h)
            d_c_n += d_a_n.sum(axis=0)
        d_a_r = d_r * r * (1 - r)

        d_h_live += d_a_z @ U_z + d_a_r @ U_r
        d_U_z += d_a_z.T @ h
        d_U_r += d_a_r.T @ h
        d_c_z += d_a_z.sum(axis=0)
        d_c_r += d_a_r.sum(axis=0)

        d_x[t] = d_a_z @ W_z + d_a_r @ W_r + d_a_n @ W_n
        d_W_z += d_a_z.T @ x
        d_W_r += d_a_r.T @ x
        d_W_n += d_a_n.T @ x
        d_b_z += d_a_z.sum(axis=0)
        d_b_r += d_a_r.sum(axis=0)
        d_b_n += d_a_n.sum(axis=0)

        d_h = np.where(run.live[t], d_h_live, d_h)
    return d_x, d_h


def classify(run: Forward, labels: Int[np.ndarray, " B"]) -> Classified:
    """The classifier's head on the last layer's last states, and the gradient of its loss.

    features = concatenation of that layer's last states, forward then backward;
    logits = relu(features) weight' + bias. Rows with a negative label do not count.
    """
    weight, bias = run.parameters["head.weight"], run.parameters["head.bias"]
    directions = len(run.layers[-1])
    features = np.concatenate(list(run.h_last[-directions:]), axis=-1)
    active = np.maximum(features, 0)
    logits = active @ weight.T + bias

    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    target = labels[:, None] == np.arange(len(bias))
    rows = max(int(np.count_nonzero(labels >= 0)), 1)
    loss = -np.where(target, log_p, 0).sum() / rows

    d_logits = np.where(labels[:, None] >= 0, np.exp(log_p) - target, 0) / rows
    d_features = np.where(features > 0, d_logits @ weight, 0)
    d_h_last = np.zeros_like(run.h_last)
    d_h_last[-directions:] = np.split(d_features, directions, axis=-1)
    gradients = {"head.weight": d_logits.T @ active, "head.bias": d_logits.sum(axis=0)}
    return Classified(logits, loss, gradients, d_h_last)


def _steps(name: str, T: int) -> range:
    """The order in which a direction goes through the sequence."""
    return range(T - 1, -1, -1) if name.endswith("backward") else range(T)


def _sigmoid(a: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-a))
