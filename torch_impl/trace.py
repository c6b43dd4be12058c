"""The recurrent layer with its intermediate values at each step. Its twin is jax_impl/trace.py.

It explains a model, and does not train it: it calls a cell's step in a loop and returns gates,
states and gradients.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from common.cells import LayerCall
from common.params import ModelConfig, cell_of, structure
from torch_impl.classifier import CELLS, head, pool
from torch_impl.layers import project, run, unroll, within


def trace(
    parameters: Mapping[str, Tensor],
    x: Float[Tensor, "T B D"],
    lengths: Int[Tensor, " B"],
    perturbations: Float[Tensor, "R T B H"],
    *,
    reset_after: bool,
) -> dict[str, Float[Tensor, "R T B H"]]:
    """The intermediate values of the last layer at every time step.

    Returns "states", the state after each step, and the values that the step returns by name, for a
    GRU z, r and n. At padding the states do not change and the other values are undefined. The
    perturbations are added to the states before the next step; the gradient with respect to
    perturbations of zero is the gradient with respect to the states.
    """
    cell = CELLS[cell_of(parameters)]
    layers, directions = structure(parameters)
    last = f"{cell.name}.{layers - 1}."
    if layers > 1:
        below = {name: p for name, p in parameters.items() if not name.startswith(last)}
        call = LayerCall(x, lengths=lengths, reset_after=reset_after)
        x, _ = run(cell, below, call, implementation=cell.traceable)
    mask = within(lengths, len(x))[..., None]
    values = []
    for i, direction in enumerate(directions):
        weight_ih, weight_hh, bias_ih, *hidden = cell.weights(parameters, layers - 1, direction)
        a, h0 = project(x, weight_ih, bias_ih), torch.zeros_like(perturbations[i, 0])
        options = {"reverse": direction == "backward", "reset_after": reset_after}
        weights = weight_hh, *hidden
        _, traced = unroll(cell.step, a, mask, h0, weights, None, perturbations[i], **options)
        values.append(traced)
    return {name: torch.stack([each[name] for each in values]) for name in values[0]}


def explain(
    parameters: Mapping[str, Tensor],
    vectors: Float[Tensor, "V D"],
    distinct: Int[Tensor, " K"],
    tokens: Int[Tensor, "T B"],
    lengths: Int[Tensor, " B"],
    labels: Int[Tensor, " B"],
    *,
    ratios: Float[Tensor, "T B E"] | None,
    config: ModelConfig,
) -> dict[str, Tensor]:
    """The intermediate values of a classifier on a batch, through all layers.

    Returns the result of `trace`, logits [B, C], and two gradients for the class in labels, which
    are zero where the label is NO_LABEL and at padding:
        influence [T, B]       the gradient of that class's logit with respect to each word's vector
                               (and ratios), multiplied by them
        d_states [R, T, B, H]  the gradient of each review's cross-entropy with respect to the
                               states
    """
    x = F.embedding(distinct, parameters.get("vectors.weight", vectors))[tokens]
    x = x if ratios is None else torch.cat([x, ratios], -1)
    x = x.detach().requires_grad_()
    _, directions = structure(parameters)
    cell = CELLS[cell_of(parameters)]
    size = parameters[f"{cell.name}.0.forward.weight_hh"].shape[1]
    perturbations = x.new_zeros(
        len(directions), *tokens.shape, cell.spec.states * size, requires_grad=True
    )
    values = trace(parameters, x, lengths, perturbations, reset_after=config.reset_after)
    states = values["states"][..., :size]
    h_last = torch.stack([each[end] for each, end in zip(states, (-1, 0), strict=False)])
    outputs = torch.cat(list(states), -1)
    outputs = torch.where(within(lengths, len(outputs))[..., None], outputs, 0)
    features = pool(outputs, h_last, lengths, config.pooling)
    logits = head(parameters, features, relu=config.relu)
    is_label = labels[:, None] == torch.arange(logits.shape[1], device=labels.device)
    loss = -(is_label * torch.log_softmax(logits, dim=-1)).sum()
    (d_x,) = torch.autograd.grad((is_label * logits).sum(), x, retain_graph=True)
    (d_states,) = torch.autograd.grad(loss, perturbations)
    mask = within(lengths, len(tokens))
    return {
        **values,
        "logits": logits,
        "influence": torch.where(mask, (d_x * x).sum(dim=-1), 0),
        "d_states": torch.where(mask[..., None], d_states, 0),
    }
