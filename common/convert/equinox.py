"""equinox.nn.GRUCell. Gates in the order r, z, n.

    r = sigmoid(W_ir x + b_r + W_hr h)
    z = sigmoid(W_iz x + b_z + W_hz h)                    this z keeps the old state
    n = tanh(W_in x + b_n + r * (W_hn h + bias_n))        the reset acts after the product, always
    h <- n + z * (h - n)

Its leaves, named by attribute:

    gru.{layer}.{direction}.weight_ih  [3H, D]    gru.{layer}.{direction}.weight_hh  [3H, H]
    gru.{layer}.{direction}.bias       [3H]       bias_ih + bias_hh of r and z, bias_ih of n
    gru.{layer}.{direction}.bias_n     [H]        bias_hh of n
    head.weight [C, H*directions]    head.bias [C]    vectors.weight [V, D]

A GRUCell that stands alone has its own names only: weight_ih and so on.

Source: equinox/nn/_rnn.py, class GRUCell.
"""

import numpy as np

from common.convert.layout import Cell, Layout, Tensors, merge_biases, unmerge_biases


class Equinox(Layout):
    name = "equinox"
    reset_kinds = (True,)
    order = "rzn"
    z_keeps = True
    scope = "gru.{layer}.{direction}."

    def shapes(self, reset_after: bool) -> dict[str, str]:
        return {"weight_hh": "3H H", "weight_ih": "3H D", "bias": "3H", "bias_n": "H"}

    def write_cell(self, cell: Cell, reset_after: bool) -> dict[str, np.ndarray]:
        bias, bias_n = merge_biases(cell, reset_after)
        return {
            "weight_ih": cell.weight_ih,
            "weight_hh": cell.weight_hh,
            "bias": bias,
            "bias_n": bias_n,
        }

    def read_cell(self, tensors: Tensors, reset_after: bool) -> Cell:
        return Cell(
            weight_ih=tensors["weight_ih"],
            weight_hh=tensors["weight_hh"],
            **unmerge_biases(tensors["bias"], tensors["bias_n"]),
        )
