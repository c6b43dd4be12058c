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

import numpy as np

from common.convert.layout import Cell, Layout, Tensors, merge_biases, unmerge_biases


class Haiku(Layout):
    name = "haiku"
    reset_kinds = (False,)
    order = "zrn"
    z_keeps = False
    scope = "gru/{layer}/{direction}/"
    others: ClassVar = {
        "head.weight": ("head/w", "D C"),
        "head.bias": ("head/b", "C"),
        "vectors.weight": ("vectors/embeddings", "V D"),
    }

    def shapes(self, reset_after: bool) -> dict[str, str]:
        return {"w_h": "H 3H", "w_i": "D 3H", "b": "3H"}

    def write_cell(self, cell: Cell, reset_after: bool) -> dict[str, np.ndarray]:
        bias, _ = merge_biases(cell, reset_after)
        return {"w_i": cell.weight_ih.T, "w_h": cell.weight_hh.T, "b": bias}

    def read_cell(self, tensors: Tensors, reset_after: bool) -> Cell:
        return Cell(tensors["w_i"].T, tensors["w_h"].T, **unmerge_biases(tensors["b"]))
