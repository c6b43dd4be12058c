"""The plain tanh RNN in PyTorch, the GRU without its gates. Its twin is jax_impl/rnn.py.

    h <- tanh(x W' + b + h U' + c)

It is here to be measured against the GRU (docs/questions.md). Names and shapes are those of
torch_impl/gru.py, but for W, U, b, c, which hold one block of H rows in place of three gates.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from common.params import GRU_PARAMETERS, structure
from torch_impl.gru import gather, project, within, without_padding


def scan(
    projections: Float[Tensor, "T B H"] | Float[Tensor, "K H"],
    tokens: Int[Tensor, "T B"] | None,
    weight_hh: Float[Tensor, "H H"],
    bias_hh: Float[Tensor, " H"],
    lengths: Int[Tensor, " B"],
    h0: Float[Tensor, "B H"],
) -> tuple[Float[Tensor, "T B H"], Float[Tensor, "B H"]]:
    """The recurrence as a loop over time; behind the end of a review the state stays."""
    word = within(lengths, len(projections) if tokens is None else len(tokens))[..., None]
    a = projections if tokens is None else gather(projections, tokens, word)
    h, outputs = h0, []
    for t in range(len(a)):
        h = torch.where(word[t], torch.tanh(a[t] + F.linear(h, weight_hh, bias_hh)), h)
        outputs.append(h)
    return torch.where(word, torch.stack(outputs), 0), h


def rnn(
    parameters: Mapping[str, Tensor],
    x: Float[Tensor, "T B D"] | Float[Tensor, "K D"],
    lengths: Int[Tensor, " B"],
    *,
    tokens: Int[Tensor, "T B"] | None = None,
) -> tuple[Float[Tensor, "T B H"], Float[Tensor, "L B H"]]:
    """A forward RNN as a pure function of its canonical parameters (see common/params.py).

    Arguments and results are those of `gru`: (outputs, h_last). The first state is zero.
    """
    layers, _ = structure(parameters)
    x = without_padding(x, tokens, lengths)
    h_last = []
    for number in range(layers):
        weight_ih, weight_hh, bias_ih, bias_hh = (
            parameters[f"rnn.{number}.forward.{name}"] for name in GRU_PARAMETERS
        )
        h0 = x.new_zeros(len(lengths), len(weight_hh))
        projections = project(x, weight_ih, bias_ih)
        x, last = scan(projections, tokens, weight_hh, bias_hh, lengths, h0)
        tokens = None
        h_last.append(last)
    return x, torch.stack(h_last)
