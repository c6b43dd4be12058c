"""torch.nn.GRU, and with it cuDNN. Gates in the order r, z, n; any layers and directions.

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
    z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)            this z keeps the old state
    n = tanh(W_in x + b_in + r * (W_hn h + b_hn))         the reset acts after the product, always
    h <- (1 - z) * n + z * h

The state_dict, with "_reverse" at the end for the backward direction:

    gru.weight_ih_l{layer}  [3H, D]    gru.weight_hh_l{layer}  [3H, H]
    gru.bias_ih_l{layer}    [3H]       gru.bias_hh_l{layer}    [3H]
    head.weight [C, H*directions]      head.bias [C]           vectors.weight [V, D]

These are the names of a module with `gru = nn.GRU(...)`, `head = nn.Linear(...)` and
`vectors = nn.Embedding(...)`; an nn.GRU that stands alone has no "gru." in front.

Source: the documentation of torch.nn.GRU, torch/nn/modules/rnn.py.
"""

from common.convert.layout import Layout


class Torch(Layout):
    name = "torch"
    reset_kinds = (True,)
    order = "rzn"
    z_keeps = True
    scope = "gru."
    tensor = "{tensor}_l{layer}{reverse}"
