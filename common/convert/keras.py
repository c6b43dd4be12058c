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

from common.convert.layout import Layout


class Keras(Layout):
    name = "keras"
    reset_kinds = (True, False)
    order = "zrn"
    z_keeps = True
    transposes = True
    scope = "gru/{layer}/{direction}/"
    others: ClassVar = {
        "head.weight": "head/kernel",
        "head.bias": "head/bias",
        "vectors.weight": "vectors/embeddings",
    }

    def cell(self, reset_after: bool) -> dict[str, tuple[str, ...]]:
        return {
            "weight_ih": ("kernel",),
            "weight_hh": ("recurrent_kernel",),
            "biases" if reset_after else "bias": ("bias",),
        }
