"""The GRU operator of ONNX. Gates in the order z, r, h; one node a layer, for all its directions.

    z = sigmoid(W_z x + R_z h + Wb_z + Rb_z)              this z keeps the old state
    r = sigmoid(W_r x + R_r h + Wb_r + Rb_r)
    n = tanh(W_h x + R_h (r * h) + Rb_h + Wb_h)           linear_before_reset=0: reset_after=False
    n = tanh(W_h x + r * (R_h h + Rb_h) + Wb_h)           linear_before_reset=1: reset_after=True
    h <- (1 - z) * n + z * h

The node's inputs:

    gru.{layer}.W  [directions, 3H, D]    weight_ih
    gru.{layer}.R  [directions, 3H, H]    weight_hh
    gru.{layer}.B  [directions, 6H]       bias_ih, then bias_hh
    head.weight [C, H*directions]    head.bias [C]    vectors.weight [V, D]

The node's attribute linear_before_reset is not a tensor, and has to be set to match. A single
node that stands alone has W, R and B only.

Source: the ONNX operator specification, GRU (version 22 of the default operator set).
"""

import numpy as np

from common.convert.layout import Cell, Layout, Tensors


class Onnx(Layout):
    name = "onnx"
    reset_kinds = (False, True)
    order = "zrn"
    z_keeps = True
    scope = "gru.{layer}."
    stacks_directions = True

    def shapes(self, reset_after: bool) -> dict[str, str]:
        return {"R": "3H H", "W": "3H D", "B": "6H"}

    def write_cell(self, cell: Cell, reset_after: bool) -> dict[str, np.ndarray]:
        bias = np.concatenate([cell.bias_ih, cell.bias_hh])
        return {"W": cell.weight_ih, "R": cell.weight_hh, "B": bias}

    def read_cell(self, tensors: Tensors, reset_after: bool) -> Cell:
        return Cell(tensors["W"], tensors["R"], *np.split(tensors["B"], 2))
