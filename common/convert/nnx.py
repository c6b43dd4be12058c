"""flax.nnx.GRUCell: the three gates in one Linear, kernels transposed, no hidden bias at all.

    r = sigmoid(W_ir x + b_r + W_hr h)
    z = sigmoid(W_iz x + b_z + W_hz h)                    this z keeps the old state
    n = tanh(W_in x + b_n + r * (W_hn h))                 the reset acts after the product, always
    h <- (1 - z) * n + z * h

(Its docstring shows a b_hn inside the parentheses; its code has none.) The Param state, flattened
with "/" ("/".join(path) for the paths of nnx.to_flat_state(nnx.state(cell, nnx.Param))):

    gru/{layer}/{direction}/dense_i/kernel  [D, 3H]    weight_ih, transposed, gates r, z, n
    gru/{layer}/{direction}/dense_h/kernel  [H, 3H]    weight_hh, transposed
    gru/{layer}/{direction}/dense_i/bias    [3H]       bias_ih + bias_hh of r and z, bias_ih of n
    head/kernel [H*directions, C]    head/bias [C]    vectors/embedding [V, D]

bias_hh of n has no place: parameters where it is not zero are refused. A GRUCell that stands alone
has its own names only: dense_i/kernel and so on.

Source: flax/nnx/nn/recurrent.py, class GRUCell.
"""

import numpy as np

from common.convert.layout import Cell, Layout, Tensors, merge_biases, unmerge_biases
from common.convert.linen import Linen


class Nnx(Layout):
    name = "nnx"
    reset_kinds = (True,)
    order = "rzn"
    z_keeps = True
    holds_bias_hh_n = False
    scope = "gru/{layer}/{direction}/"
    others = Linen.others

    def shapes(self, reset_after: bool) -> dict[str, str]:
        return {"dense_h/kernel": "H 3H", "dense_i/kernel": "D 3H", "dense_i/bias": "3H"}

    def write_cell(self, cell: Cell, reset_after: bool) -> dict[str, np.ndarray]:
        bias, _ = merge_biases(cell, reset_after)
        return {
            "dense_i/kernel": cell.weight_ih.T,
            "dense_h/kernel": cell.weight_hh.T,
            "dense_i/bias": bias,
        }

    def read_cell(self, tensors: Tensors, reset_after: bool) -> Cell:
        return Cell(
            weight_ih=tensors["dense_i/kernel"].T,
            weight_hh=tensors["dense_h/kernel"].T,
            **unmerge_biases(tensors["dense_i/bias"]),
        )
