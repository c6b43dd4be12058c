"""The homework's networks. MyGRU: one nn.Linear, with a bias, for each gate and operand.

    z = sigmoid(Wz(x) + Uz(h))
    r = sigmoid(Wr(x) + Ur(h))
    n = tanh(Wh(x) + Uh(r * h))          the reset acts before the product, always
    h <- (1 - z) * h + z * n             this z replaces the old state, as ours does

The state_dict, for one layer in one direction:

    gru.Wz.weight  gru.Wr.weight  gru.Wh.weight  [H, D]
    gru.Uz.weight  gru.Ur.weight  gru.Uh.weight  [H, H]
    gru.Wz.bias    gru.Wr.bias    gru.Wh.bias    gru.Uz.bias  gru.Ur.bias  gru.Uh.bias  [H]
    fc.weight [C, H]    fc.bias [C]    vectors.weight [V, D]

The three W are weight_ih, the three U are weight_hh, their biases bias_ih and bias_hh. The networks
with nn.GRU, in one direction or both, have its tensors (see torch.py) with the same fc.
"""

from typing import ClassVar

import numpy as np

from common.convert.layout import Cell, Layout, Tensors
from common.convert.torch import Torch

W, U = ("Wz", "Wr", "Wh"), ("Uz", "Ur", "Uh")
OTHERS = {
    "head.weight": ("fc.weight", "C D"),
    "head.bias": ("fc.bias", "C"),
    "vectors.weight": ("vectors.weight", "V D"),
}


class Homework(Layout):
    name = "homework"
    reset_kinds = (False,)
    order = "zrn"
    z_keeps = False
    scope = "gru."
    others: ClassVar = OTHERS

    def shapes(self, reset_after: bool) -> dict[str, str]:
        return (
            {f"{linear}.weight": "H H" for linear in U}
            | {f"{linear}.weight": "H D" for linear in W}
            | {f"{linear}.bias": "H" for linear in W + U}
        )

    def write_cell(self, cell: Cell, reset_after: bool) -> dict[str, np.ndarray]:
        weights = (*np.split(cell.weight_ih, 3), *np.split(cell.weight_hh, 3))
        biases = (*np.split(cell.bias_ih, 3), *np.split(cell.bias_hh, 3))
        return {
            f"{linear}.weight": weight for linear, weight in zip(W + U, weights, strict=True)
        } | {f"{linear}.bias": bias for linear, bias in zip(W + U, biases, strict=True)}

    def read_cell(self, tensors: Tensors, reset_after: bool) -> Cell:
        return Cell(
            weight_ih=np.concatenate([tensors[f"{linear}.weight"] for linear in W]),
            weight_hh=np.concatenate([tensors[f"{linear}.weight"] for linear in U]),
            bias_ih=np.concatenate([tensors[f"{linear}.bias"] for linear in W]),
            bias_hh=np.concatenate([tensors[f"{linear}.bias"] for linear in U]),
        )


class HomeworkBuiltin(Torch):
    name = "homework-nn"
    others: ClassVar = OTHERS
