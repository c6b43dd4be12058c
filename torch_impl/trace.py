"""The recurrent layer with everything in between, word by word. Its twin is jax_impl/trace.py.

For looking at a model, not for training it: the equations of torch_impl/gru.py (and rnn.py) one
word after the other, with gates and states returned and the gradients one asks about.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from common.params import GRU_PARAMETERS, cell_of, structure
from torch_impl.classifier import head
from torch_impl.gru import gru, project, within
from torch_impl.rnn import rnn


def gru_step(
    a: Float[Tensor, "B 3H"],
    h: Float[Tensor, "B H"],
    weight_hh: Float[Tensor, "3H H"],
    bias_hh: Float[Tensor, " 3H"],
    *,
    reset_after: bool,
) -> tuple[Float[Tensor, "B H"], dict[str, Float[Tensor, "B H"]]]:
    """One word: the new state, and the gates z, r and the candidate n on the way to it."""
    a_z, a_r, a_n = torch.chunk(a, 3, dim=-1)
    U_z, U_r, U_n = torch.chunk(weight_hh, 3)
    c_z, c_r, c_n = torch.chunk(bias_hh, 3)
    z = torch.sigmoid(a_z + F.linear(h, U_z, c_z))
    r = torch.sigmoid(a_r + F.linear(h, U_r, c_r))
    if reset_after:
        n = torch.tanh(a_n + r * F.linear(h, U_n, c_n))
    else:
        n = torch.tanh(a_n + F.linear(r * h, U_n, c_n))
    return h + z * (n - h), {"z": z, "r": r, "n": n}


def rnn_step(
    a: Float[Tensor, "B H"],
    h: Float[Tensor, "B H"],
    weight_hh: Float[Tensor, "H H"],
    bias_hh: Float[Tensor, " H"],
    *,
    reset_after: bool,
) -> tuple[Float[Tensor, "B H"], dict[str, Float[Tensor, "B H"]]]:
    """One word of the plain RNN, which has nothing in between."""
    return torch.tanh(a + F.linear(h, weight_hh, bias_hh)), {}


def trace(
    parameters: Mapping[str, Tensor],
    x: Float[Tensor, "T B D"],
    lengths: Int[Tensor, " B"],
    nudges: Float[Tensor, "R T B H"],
    *,
    reset_after: bool,
) -> dict[str, Float[Tensor, "R T B H"]]:
    """What the last layer does at every word, from the canonical parameters.

    Returns states, the state after each word, and of a GRU z, r and n. Behind the end of a review
    the states stay and the others mean nothing. nudges are added to the states as they are handed
    on to the next word: pass zeros, and the gradient with respect to them is that with respect to
    the states.
    """
    layers, directions = structure(parameters)
    cell = cell_of(parameters)
    step = gru_step if cell == "gru" else rnn_step
    last = f"{cell}.{layers - 1}."
    if layers > 1:
        below = {name: p for name, p in parameters.items() if not name.startswith(last)}
        if cell == "gru":
            x, _ = gru(below, x, lengths, reset_after=reset_after, implementation="scan")
        else:
            x, _ = rnn(below, x, lengths)
    word = within(lengths, len(x))[..., None]
    every: list[dict[str, Tensor]] = []
    for i, direction in enumerate(directions):
        weight_ih, weight_hh, bias_ih, bias_hh = (
            parameters[f"{last}{direction}.{name}"] for name in GRU_PARAMETERS
        )
        a = project(x, weight_ih, bias_ih)
        h = torch.zeros_like(nudges[i, 0])
        steps: list[dict[str, Tensor]] = [{}] * len(x)
        for t in reversed(range(len(x))) if direction == "backward" else range(len(x)):
            after, between = step(a[t], h, weight_hh, bias_hh, reset_after=reset_after)
            h = torch.where(word[t], after, h) + nudges[i, t]
            steps[t] = {"states": h, **between}
        every.append({name: torch.stack([each[name] for each in steps]) for name in steps[0]})
    return {name: torch.stack([found[name] for found in every]) for name in every[0]}


def explain(
    parameters: Mapping[str, Tensor],
    vectors: Float[Tensor, "V D"],
    distinct: Int[Tensor, " K"],
    tokens: Int[Tensor, "T B"],
    lengths: Int[Tensor, " B"],
    labels: Int[Tensor, " B"],
    *,
    reset_after: bool,
) -> dict[str, Tensor]:
    """How a classifier comes to its answers on a batch, word by word; every layer counts.

    Returns the last layer's states, z, r and n as `trace` does, logits [B, C], and two gradients
    that ask about the class in labels (where that is NO_LABEL, they are zero):
        influence [T, B]       gradient x input: of that class's logit with respect to each word's
                               vector, times the vector
        d_states [R, T, B, H]  of each review's own cross-entropy with respect to the states
    Both are zero behind the end of a review.
    """
    x = F.embedding(distinct, parameters.get("vectors.weight", vectors))[tokens]
    x = x.detach().requires_grad_()
    _, directions = structure(parameters)
    size = parameters["head.weight"].shape[1] // len(directions)
    nudges = x.new_zeros(len(directions), *tokens.shape, size, requires_grad=True)
    found = trace(parameters, x, lengths, nudges, reset_after=reset_after)
    h_last = torch.stack(
        [states[end] for states, end in zip(found["states"], (-1, 0), strict=False)]
    )
    logits = head(parameters, h_last)
    asked = labels[:, None] == torch.arange(logits.shape[1], device=labels.device)
    loss = -(asked * torch.log_softmax(logits, dim=-1)).sum()
    (d_x,) = torch.autograd.grad((asked * logits).sum(), x, retain_graph=True)
    (d_states,) = torch.autograd.grad(loss, nudges)
    word = within(lengths, len(tokens))
    return {
        **found,
        "logits": logits,
        "influence": torch.where(word, (d_x * x).sum(dim=-1), 0),
        "d_states": torch.where(word[..., None], d_states, 0),
    }
