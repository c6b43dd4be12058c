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

from common.convert.layout import Layout


class Onnx(Layout):
    name = "onnx"
    reset_kinds = (False, True)
    order = "zrn"
    z_keeps = True
    scope = "gru.{layer}."
    stacks_directions = True

    def cell(self, reset_after: bool) -> dict[str, tuple[str, ...]]:
        return {"weight_ih": ("W",), "weight_hh": ("R",), "biases end to end": ("B",)}
