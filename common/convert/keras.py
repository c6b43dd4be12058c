"""keras.layers.GRU (Keras 3). Gates in the order z, r, h; kernels transposed.

    z = sigmoid(x K_z + b_z + h R_z + c_z)                this z keeps the old state
    r = sigmoid(x K_r + b_r + h R_r + c_r)
    n = tanh(x K_h + b_h + r * (h R_h + c_h))             reset_after=True, the default of Keras
    n = tanh(x K_h + b_h + (r * h) R_h)                   reset_after=False; here c is absent
    h <- z * h + (1 - z) * n

Its variables (the paths that Keras gives them begin with the names of the layers instead):

    gru/{layer}/{direction}/kernel            [D, 3H]    weight_ih, transposed
    gru/{layer}/{direction}/recurrent_kernel  [H, 3H]    weight_hh, transposed
    gru/{layer}/{direction}/bias              [2, 3H]    bias_ih, bias_hh       reset_after=True
                                              [3H]       bias_ih + bias_hh      reset_after=False
    head/kernel [H*directions, C]    head/bias [C]    vectors/embeddings [V, D]

The order of the first three is that of get_weights() and set_weights(). A GRU layer that stands
alone has kernel, recurrent_kernel and bias only.

Source: keras/src/layers/rnn/gru.py, class GRUCell.
"""

from typing import ClassVar

import numpy as np

from common.convert.layout import Cell, Layout, Tensors, merge_biases, unmerge_biases


class Keras(Layout):
    name = "keras"
    reset_kinds = (True, False)
    order = "zrn"
    z_keeps = True
    scope = "gru/{layer}/{direction}/"
    others: ClassVar = {
        "head.weight": ("head/kernel", "D C"),
        "head.bias": ("head/bias", "C"),
        "vectors.weight": ("vectors/embeddings", "V D"),
    }

    def shapes(self, reset_after: bool) -> dict[str, str]:
        return {
            "recurrent_kernel": "H 3H",
            "kernel": "D 3H",
            "bias": "2 3H" if reset_after else "3H",
        }

    def write_cell(self, cell: Cell, reset_after: bool) -> dict[str, np.ndarray]:
        if reset_after:
            bias = np.stack([cell.bias_ih, cell.bias_hh])
        else:
            bias, _ = merge_biases(cell, reset_after)
        return {"kernel": cell.weight_ih.T, "recurrent_kernel": cell.weight_hh.T, "bias": bias}

    def read_cell(self, tensors: Tensors, reset_after: bool) -> Cell:
        if reset_after:
            biases = dict(zip(("bias_ih", "bias_hh"), tensors["bias"], strict=True))
        else:
            biases = unmerge_biases(tensors["bias"])
        return Cell(tensors["kernel"].T, tensors["recurrent_kernel"].T, **biases)
