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

from common.convert.layout import Layout
from common.convert.torch import Torch

OTHERS = {
    "head.weight": "fc.weight",
    "head.bias": "fc.bias",
    "vectors.weight": "vectors.weight",
}


class Homework(Layout):
    name = "homework"
    reset_kinds = (False,)
    order = "zrn"
    z_keeps = False
    scope = "gru."
    others: ClassVar = OTHERS

    def cell(self, reset_after: bool) -> dict[str, tuple[str, ...]]:
        return {
            "weight_ih": ("Wz.weight", "Wr.weight", "Wh.weight"),
            "weight_hh": ("Uz.weight", "Ur.weight", "Uh.weight"),
            "bias_ih": ("Wz.bias", "Wr.bias", "Wh.bias"),
            "bias_hh": ("Uz.bias", "Ur.bias", "Uh.bias"),
        }


class HomeworkBuiltin(Torch):
    name = "homework-nn"
    others: ClassVar = OTHERS
