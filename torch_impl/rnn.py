"""The plain tanh RNN in PyTorch, the GRU without its gates. Its twin is jax_impl/rnn.py.

    h <- tanh(x W' + b + h U' + c)

docs/questions.md compares it with the GRU. Shapes are named as in layers.py; G is 1.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from common.cells import Cell, Recurrence
from common.params import CELLS
from torch_impl import fused
from torch_impl.layers import loop


def step(
    a: Float[Tensor, "B H"],
    h: Float[Tensor, "B H"],
    weight_hh: Float[Tensor, "H H"],
    bias_hh: Float[Tensor, " H"],
    *,
    reset_after: bool,
) -> tuple[Float[Tensor, "B H"], dict[str, Float[Tensor, "B H"]]]:
    """One time step, from a = x W' + b: the next state, and no intermediate values."""
    return torch.tanh(a + F.linear(h, weight_hh, bias_hh)), {}


RECURRENCES = {
    "scan": Recurrence(loop(step)),
    "fused": Recurrence(fused.recurrence, fused.available, True),
}
fused.SCANS["rnn"] = RECURRENCES["scan"].compute
CELL = Cell(CELLS["rnn"], step, RECURRENCES)
