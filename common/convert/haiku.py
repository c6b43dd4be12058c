"""haiku.GRU (dm-haiku). Gates in the order z, r, a; matrices transposed; one bias a gate.

    z = sigmoid(x w_i_z + h w_h_z + b_z)              this z replaces the old state, as ours does
    r = sigmoid(x w_i_r + h w_h_r + b_r)
    a = tanh(x w_i_a + (r * h) w_h_a + b_a)           the reset acts before the product, always
    h <- (1 - z) * h + z * a

Its parameters, module path and parameter name joined by "/":

    gru/{layer}/{direction}/w_i  [D, 3H]    weight_ih, transposed
    gru/{layer}/{direction}/w_h  [H, 3H]    weight_hh, transposed
    gru/{layer}/{direction}/b    [3H]       bias_ih + bias_hh
    head/w [H*directions, C]    head/b [C]    vectors/embeddings [V, D]

A GRU that stands alone has w_i, w_h and b only.

Source: haiku/_src/recurrent.py, class GRU.
"""

from typing import ClassVar

from common.convert.layout import Layout


class Haiku(Layout):
    name = "haiku"
    reset_kinds = (False,)
    order = "zrn"
    z_keeps = False
    transposes = True
    scope = "gru/{layer}/{direction}/"
    others: ClassVar = {
        "head.weight": "head/w",
        "head.bias": "head/b",
        "vectors.weight": "vectors/embeddings",
    }

    def cell(self, reset_after: bool) -> dict[str, tuple[str, ...]]:
        return {"weight_ih": ("w_i",), "weight_hh": ("w_h",), "bias": ("b",)}
