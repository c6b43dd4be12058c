"""flax.linen.GRUCell: a Dense layer for each gate and operand, kernels transposed.

    r = sigmoid(ir(x) + hr(h))           ir, iz, in and hn have a bias, hr and hz do not
    z = sigmoid(iz(x) + hz(h))           this z keeps the old state
    n = tanh(in(x) + r * hn(h))          the reset acts after the product, always
    h <- (1 - z) * n + z * h

The "params" collection, flattened with "/" (flax.traverse_util.flatten_dict(params, sep="/")):

    gru/{layer}/{direction}/ir/kernel  iz/kernel  in/kernel  [D, H]    weight_ih, transposed
    gru/{layer}/{direction}/hr/kernel  hz/kernel  hn/kernel  [H, H]    weight_hh, transposed
    gru/{layer}/{direction}/ir/bias    iz/bias               [H]       bias_ih + bias_hh of r and z
    gru/{layer}/{direction}/in/bias    hn/bias               [H]       bias_ih and bias_hh of n
    head/kernel [H*directions, C]    head/bias [C]    vectors/embedding [V, D]

A GRUCell that stands alone has its own names only: ir/kernel and so on.

Source: flax/linen/recurrent.py, class GRUCell.
"""

from typing import ClassVar

import numpy as np

from common.convert.layout import Cell, Layout, Tensors, merge_biases, unmerge_biases

INPUT, HIDDEN = ("ir", "iz", "in"), ("hr", "hz", "hn")


class Linen(Layout):
    name = "linen"
    reset_kinds = (True,)
    order = "rzn"
    z_keeps = True
    scope = "gru/{layer}/{direction}/"
    others: ClassVar = {
        "head.weight": ("head/kernel", "D C"),
        "head.bias": ("head/bias", "C"),
        "vectors.weight": ("vectors/embedding", "V D"),
    }

    def shapes(self, reset_after: bool) -> dict[str, str]:
        return (
            {f"{dense}/kernel": "H H" for dense in HIDDEN}
            | {f"{dense}/kernel": "D H" for dense in INPUT}
            | {f"{dense}/bias": "H" for dense in (*INPUT, "hn")}
        )

    def write_cell(self, cell: Cell, reset_after: bool) -> dict[str, np.ndarray]:
        bias, bias_n = merge_biases(cell, reset_after)
        tensors = {"hn/bias": bias_n}
        for dense, weight in zip(INPUT, np.split(cell.weight_ih, 3), strict=True):
            tensors[f"{dense}/kernel"] = weight.T
        for dense, weight in zip(HIDDEN, np.split(cell.weight_hh, 3), strict=True):
            tensors[f"{dense}/kernel"] = weight.T
        for dense, gate_bias in zip(INPUT, np.split(bias, 3), strict=True):
            tensors[f"{dense}/bias"] = gate_bias
        return tensors

    def read_cell(self, tensors: Tensors, reset_after: bool) -> Cell:
        bias = np.concatenate([tensors[f"{dense}/bias"] for dense in INPUT])
        return Cell(
            weight_ih=np.concatenate([tensors[f"{dense}/kernel"].T for dense in INPUT]),
            weight_hh=np.concatenate([tensors[f"{dense}/kernel"].T for dense in HIDDEN]),
            **unmerge_biases(bias, tensors["hn/bias"]),
        )
