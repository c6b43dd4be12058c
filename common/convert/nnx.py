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

from common.convert.linen import Linen


class Nnx(Linen):
    name = "nnx"

    def cell(self, reset_after: bool) -> dict[str, tuple[str, ...]]:
        return {
            "weight_ih": ("dense_i/kernel",),
            "weight_hh": ("dense_h/kernel",),
            "bias": ("dense_i/bias",),
        }
