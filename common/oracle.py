"""The reference: the cells and their gradients in NumPy float64.

The code follows the equations, one time step after the other, without a framework or automatic
differentiation; it is written to be verifiable, not fast. It defines a step of each cell and its
derivative by the chain rule; `forward` and `backward`, which apply them; and `classify` (last
states -> ReLU -> linear -> cross-entropy, and its derivative).

The GRU, for the input x of one step and the state h (Cho et al. 2014, arXiv:1406.1078; the second
form of n is that of version 1 of the paper, of cuDNN and of nn.GRU):

    z = sigmoid(x W_z' + b_z + h U_z' + c_z)
    r = sigmoid(x W_r' + b_r + h U_r' + c_r)
    n = tanh(x W_n' + b_n + (r * h) U_n' + c_n)      reset_after=False
    n = tanh(x W_n' + b_n + r * (h U_n' + c_n))      reset_after=True
    h <- h + z * (n - h)

The tanh RNN: h <- tanh(x W' + b + h U' + c).

Parameters are a flat dict of arrays, with gates in the order z, r, n. Those of the RNN begin with
rnn and have H rows instead of 3H. A step takes further parameters of its cell after c:

    gru.{layer}.{forward|backward}.weight_ih [3H, D]  weight_hh [3H, H]  bias_ih [3H]  bias_hh [3H]
    head.weight [C, H * directions]                   head.bias [C]
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import DTypeLike

from common import params
from common.params import cell_of, structure

Between = dict[str, Float[np.ndarray, "B H"]]


def gru_step(
    a: Float[np.ndarray, "B 3H"],
    h: Float[np.ndarray, "B H"],
    U: Float[np.ndarray, "3H H"],
    c: Float[np.ndarray, " 3H"],
    reset_after: bool,
) -> tuple[Float[np.ndarray, "B H"], Between]:
    """The next state, from a = x W' + b."""
    (a_z, a_r, a_n), (U_z, U_r, U_n), (c_z, c_r, c_n) = (
        np.split(a, 3, axis=-1),
        np.split(U, 3),
        np.split(c, 3),
    )
    z = _sigmoid(a_z + h @ U_z.T + c_z)
    r = _sigmoid(a_r + h @ U_r.T + c_r)
    n = np.tanh(a_n + (r * (h @ U_n.T + c_n) if reset_after else (r * h) @ U_n.T + c_n))
    return h + z * (n - h), {"h": h, "z": z, "r": r, "n": n}


def gru_step_backward(
    d_new: Float[np.ndarray, "B H"],
    between: Between,
    U: Float[np.ndarray, "3H H"],
    c: Float[np.ndarray, " 3H"],
    reset_after: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """d_a, d_h, d_U, d_c from d_new. d_v is the gradient with respect to v, and a_v the argument of
    v's sigmoid or tanh."""
    h, z, r, n = (between[name] for name in "hzrn")
    (U_z, U_r, U_n), (_, _, c_n) = np.split(U, 3), np.split(c, 3)
    d_a_z = d_new * (n - h) * z * (1 - z)
    d_a_n = d_new * z * (1 - n**2)
    d_h = d_new * (1 - z)
    if reset_after:  # a_n = … + r * q with q = h U_n' + c_n
        d_r = d_a_n * (h @ U_n.T + c_n)
        d_q = d_a_n * r
        d_h = d_h + d_q @ U_n
        d_U_n, d_c_n = d_q.T @ h, d_q.sum(axis=0)
    else:  # a_n = … + q U_n' + c_n with q = r * h
        d_q = d_a_n @ U_n
        d_r = d_q * h
        d_h = d_h + d_q * r
        d_U_n, d_c_n = d_a_n.T @ (r * h), d_a_n.sum(axis=0)
    d_a_r = d_r * r * (1 - r)
    d_h = d_h + d_a_z @ U_z + d_a_r @ U_r
    d_U = np.concatenate([d_a_z.T @ h, d_a_r.T @ h, d_U_n])
    d_c = np.concatenate([d_a_z.sum(axis=0), d_a_r.sum(axis=0), d_c_n])
    return np.concatenate([d_a_z, d_a_r, d_a_n], axis=-1), d_h, d_U, d_c


def rnn_step(
    a: Float[np.ndarray, "B H"],
    h: Float[np.ndarray, "B H"],
    U: Float[np.ndarray, "H H"],
    c: Float[np.ndarray, " H"],
    reset_after: bool,
) -> tuple[Float[np.ndarray, "B H"], Between]:
    """The next state, from a = x W' + b."""
    n = np.tanh(a + h @ U.T + c)
    return n, {"h": h, "n": n}


def rnn_step_backward(
    d_new: Float[np.ndarray, "B H"],
    between: Between,
    U: Float[np.ndarray, "H H"],
    c: Float[np.ndarray, " H"],
    reset_after: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """d_a, d_h, d_U, d_c from d_new."""
    d_a = d_new * (1 - between["n"] ** 2)
    return d_a, d_a @ U, d_a.T @ between["h"], d_a.sum(axis=0)


CELLS: dict[str, tuple[Callable[..., tuple[np.ndarray, Between]], Callable[..., tuple], str]] = {
    "gru": (gru_step, gru_step_backward, "hzrn"),
    "rnn": (rnn_step, rnn_step_backward, "hn"),
}
"""The step of each cell, its derivative, and the names of the intermediate values.

The calls are step(a, h, U, c, *own, reset_after=...) and step_backward(d_new, between, U, c, *own,
reset_after=...), where own are the parameters that the cell declares beyond GRU_PARAMETERS. The
derivative returns d_a, d_h, d_U, d_c, *d_own.
"""


@dataclass(frozen=True)
class Direction:
    """The intermediate values of one direction of one layer; t is the position in the sequence."""

    name: str
    """The prefix of the parameters' names, such as "gru.0.backward"."""
    x: Float[np.ndarray, "T B D"]
    """The inputs, 0 at padded steps."""
    between: dict[str, Float[np.ndarray, "T B H"]]
    """The intermediate values of CELLS; "h" is the state before the step."""


@dataclass(frozen=True)
class Forward:
    """The result of `forward`, with all values that `backward` needs."""

    outputs: Float[np.ndarray, "T B H*directions"]
    """The last layer's state after each step, 0 at padded steps."""
    h_last: Float[np.ndarray, "L*directions B H"]
    """The last state of each direction: layer 0 forward, layer 0 backward, layer 1 …"""
    parameters: dict[str, np.ndarray]
    live: Bool[np.ndarray, "T B 1"]
    """Whether step t of row b is not padding."""
    resets: Bool[np.ndarray, "T B 1"]
    """Whether a sequence begins at step t of row b."""
    layers: list[list[Direction]]
    reset_after: bool


@dataclass(frozen=True)
class Classified:
    """The result of `classify`."""

    logits: Float[np.ndarray, "B C"]
    loss: Float[np.ndarray, ""]
    """Mean cross-entropy over the rows with a label; 0 without any."""
    gradients: dict[str, np.ndarray]
    """The gradients of the loss with respect to head.weight and head.bias."""
    d_h_last: Float[np.ndarray, "L*directions B H"]
    """The gradient of the loss with respect to h_last."""


def forward(
    parameters: Mapping[str, np.ndarray],
    x: Float[np.ndarray, "T B D"],
    lengths: Int[np.ndarray, " B"],
    h0: Float[np.ndarray, "L*directions B H"] | None = None,
    resets: Bool[np.ndarray, "T B"] | None = None,
    h_reset: Float[np.ndarray, "L*directions B H"] | None = None,
    *,
    reset_after: bool,
    dtype: DTypeLike = np.float64,
) -> Forward:
    """Run a cell over a padded batch.

    Row b has `lengths[b]` time steps; later elements of x are ignored. The backward direction
    starts from its h0 at the last step of each row. A row of length 0 keeps its h0.
    resets: where a sequence begins within the row. No state crosses its start in either direction;
    the recurrence continues from h_reset (default: h0).
    The names of the parameters determine the cell, the layers and the directions. `dtype` is the
    dtype of all numbers; float32 shows the effect of rounding alone.
    """
    parameters = {name: np.asarray(value, dtype) for name, value in parameters.items()}
    cell, (count, sides) = cell_of(parameters), structure(parameters)
    T, B, _ = x.shape
    if h0 is None:
        size = parameters[f"{cell}.0.forward.weight_hh"].shape[1]
        h0 = np.zeros((count * len(sides), B, size))

    h_reset = h0 if h_reset is None else h_reset
    live = (np.arange(T)[:, None] < lengths)[..., None]
    resets = np.zeros((T, B), bool) if resets is None else resets
    begins = resets[..., None] & live
    outputs = np.where(live, x, 0).astype(dtype)
    layers: list[list[Direction]] = []
    last_states: list[np.ndarray] = []
    for layer in range(count):
        directions, states = [], []
        for side in sides:
            direction, after, last = _forward_direction(
                parameters,
                f"{cell}.{layer}.{side}",
                outputs,
                live,
                begins,
                h0[len(last_states)].astype(dtype),
                h_reset[len(last_states)].astype(dtype),
                reset_after=reset_after,
            )
            directions.append(direction)
            states.append(after)
            last_states.append(last)
        layers.append(directions)
        outputs = np.concatenate(states, axis=-1)
    return Forward(outputs, np.stack(last_states), parameters, live, begins, layers, reset_after)


def _forward_direction(
    parameters: Mapping[str, np.ndarray],
    name: str,
    x: Float[np.ndarray, "T B D"],
    live: Bool[np.ndarray, "T B 1"],
    resets: Bool[np.ndarray, "T B 1"],
    h: Float[np.ndarray, "B H"],
    h_reset: Float[np.ndarray, "B H"],
    *,
    reset_after: bool,
) -> tuple[Direction, Float[np.ndarray, "T B H"], Float[np.ndarray, "B H"]]:
    """Run one direction of one layer from state h; returns it, its outputs and its last state."""
    cell = cell_of([name])
    W, U, b, *hidden = (parameters[f"{name}.{part}"] for part in params.CELLS[cell].names)
    step, _, names = CELLS[cell]
    outputs = np.zeros((len(x), *h.shape), h.dtype)
    between = {name: np.zeros_like(outputs) for name in names}
    for t in _steps(name, len(x)):
        h = np.where(_begins(name, resets, t), h_reset, h)
        new, values = step(x[t] @ W.T + b, h, U, *hidden, reset_after=reset_after)
        for each in names:
            between[each][t] = values[each]
        h = np.where(live[t], new, h)
        outputs[t] = np.where(live[t], h, 0)
    return Direction(name, x, between), outputs, h


def backward(
    run: Forward,
    d_outputs: Float[np.ndarray, "T B H*directions"],
    d_h_last: Float[np.ndarray, "L*directions B H"],
) -> dict[str, np.ndarray]:
    """Gradients from those with respect to the outputs and the last states.

    Returns an array for each parameter of the GRU, by name, and for "x", "h0" and "h_reset". The
    last two are separate even if h0 serves as h_reset.
    """
    gradients: dict[str, np.ndarray] = {}
    d_h0, d_h_reset = np.zeros_like(run.h_last), np.zeros_like(run.h_last)
    place = len(d_h0)
    for directions in reversed(run.layers):
        d_states = np.split(d_outputs, len(directions), axis=-1)
        # All directions read the input of a layer, so their gradients add up.
        d_outputs = np.zeros_like(directions[0].x)
        for direction, d_state in zip(reversed(directions), reversed(d_states), strict=True):
            place -= 1
            d_x, d_h0[place], d_h_reset[place] = _backward_direction(
                run, direction, d_state, d_h_last[place], gradients
            )
            d_outputs += d_x
    return gradients | {"x": d_outputs, "h0": d_h0, "h_reset": d_h_reset}


def _backward_direction(
    run: Forward,
    direction: Direction,
    d_outputs: Float[np.ndarray, "T B H"],
    d_h: Float[np.ndarray, "B H"],
    gradients: dict[str, np.ndarray],
) -> tuple[Float[np.ndarray, "T B D"], Float[np.ndarray, "B H"], Float[np.ndarray, "B H"]]:
    """Differentiate `_forward_direction`; adds the gradients of its parameters to `gradients`.

    Returns the gradients with respect to x, h0 and h_reset.
    """
    cell = cell_of([direction.name])
    names = [f"{direction.name}.{part}" for part in params.CELLS[cell].names]
    W, U, b, *hidden = (run.parameters[name] for name in names)
    _, step_backward, _ = CELLS[cell]
    d_x, d_h_reset = np.zeros_like(direction.x), np.zeros_like(d_h)
    d_W, d_b = np.zeros_like(W), np.zeros_like(b)
    d_U, *d_hidden = (np.zeros_like(each) for each in (U, *hidden))
    for t in reversed(_steps(direction.name, len(d_x))):
        # A padded row passes its gradient through unchanged.
        d_new = np.where(run.live[t], d_h + d_outputs[t], 0)
        between = {name: each[t] for name, each in direction.between.items()}
        d_a, d_before, *at_step = step_backward(
            d_new, between, U, *hidden, reset_after=run.reset_after
        )
        d_x[t] = d_a @ W
        d_W += d_a.T @ direction.x[t]
        d_b += d_a.sum(axis=0)
        d_U += at_step[0]
        d_hidden = [total + each for total, each in zip(d_hidden, at_step[1:], strict=True)]
        d_h = np.where(run.live[t], d_before, d_h)
        begins = _begins(direction.name, run.resets, t)
        d_h_reset += np.where(begins, d_h, 0)
        d_h = np.where(begins, 0, d_h)
    gradients.update(zip(names, (d_W, d_U, d_b, *d_hidden), strict=True))
    return d_x, d_h, d_h_reset


def classify(run: Forward, labels: Int[np.ndarray, " B"]) -> Classified:
    """The classifier's head on the last layer's last states, and the gradient of its loss.

    features = concatenation of the last states, forward then backward;
    logits = relu(features) weight' + bias. Rows with a negative label are ignored.
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
    """The time steps in the order of a direction."""
    return range(T - 1, -1, -1) if name.endswith("backward") else range(T)


def _begins(
    name: str, resets: Bool[np.ndarray, "T B 1"], t: int
) -> Bool[np.ndarray, "B 1"] | np.bool_:
    """Whether a direction resets its state before step t; backward starts at a sequence's end."""
    t += name.endswith("backward")
    return resets[t] if t < len(resets) else np.False_


def _sigmoid(a: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-a))
