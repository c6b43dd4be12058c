"""The project's own parameters (the equations: common/oracle.py), gates in the order z, r, n.

    gru.{layer}.{forward|backward}.weight_ih  [3H, D]    weight_hh  [3H, H]
    gru.{layer}.{forward|backward}.bias_ih    [3H]       bias_hh    [3H]
    head.weight  [C, H*directions]    head.bias  [C]    vectors.weight  [V, D]

Nothing in these tensors says where the reset gate acts; that has to be known.
"""

from common.convert.layout import Layout


class Canonical(Layout):
    name = "canonical"
    reset_kinds = (False, True)
    order = "zrn"
    z_keeps = False
    scope = ""
    tensor = "gru.{layer}.{direction}.{tensor}"
