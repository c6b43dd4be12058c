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

from common.convert.layout import Layout


class Equinox(Layout):
    name = "equinox"
    reset_kinds = (True,)
    order = "rzn"
    z_keeps = True
    scope = "gru.{layer}.{direction}."

    def cell(self, reset_after: bool) -> dict[str, tuple[str, ...]]:
        return {name: (name,) for name in ("weight_ih", "weight_hh", "bias", "bias_n")}
