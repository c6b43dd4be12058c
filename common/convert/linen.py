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

from common.convert.layout import Layout


class Linen(Layout):
    name = "linen"
    reset_kinds = (True,)
    order = "rzn"
    z_keeps = True
    transposes = True
    scope = "gru/{layer}/{direction}/"
    others: ClassVar = {
        "head.weight": "head/kernel",
        "head.bias": "head/bias",
        "vectors.weight": "vectors/embedding",
    }

    def cell(self, reset_after: bool) -> dict[str, tuple[str, ...]]:
        return {
            "weight_ih": ("ir/kernel", "iz/kernel", "in/kernel"),
            "weight_hh": ("hr/kernel", "hz/kernel", "hn/kernel"),
            "bias": ("ir/bias", "iz/bias", "in/bias"),
            "bias_n": ("hn/bias",),
        }
