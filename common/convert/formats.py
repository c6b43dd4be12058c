"""The layouts of the frameworks, in the notation of layout.py.

docs/layouts.md has their equations and the mapping of their keys.
"""

from dataclasses import replace

from common.convert.layout import Layout

# The layout of this project. The tensors do not show where the reset gate acts.
CANONICAL = Layout(
    name="canonical",
    scope="",
    cell={
        "gru.{layer}.{direction}.weight_ih": "Wz Wr Wn",
        "gru.{layer}.{direction}.weight_hh": "Uz Ur Un",
        "gru.{layer}.{direction}.bias_ih": "bz br bn",
        "gru.{layer}.{direction}.bias_hh": "cz cr cn",
    },
    reset_kinds=(False, True),
    z_keeps=False,
)

# torch.nn.GRU, and with it cuDNN: the state_dict of a module with gru = nn.GRU(...),
# head = nn.Linear(...) and vectors = nn.Embedding(...). Source: torch/nn/modules/rnn.py.
TORCH = Layout(
    name="torch",
    scope="gru.",
    cell={
        "weight_ih_l{layer}{direction}": "Wr Wz Wn",
        "weight_hh_l{layer}{direction}": "Ur Uz Un",
        "bias_ih_l{layer}{direction}": "br bz bn",
        "bias_hh_l{layer}{direction}": "cr cz cn",
    },
    directions=("", "_reverse"),
    ending="_l{layer}{direction}",
)

# The homework's MyGRU: an nn.Linear, with a bias, for each gate and operand.
_GATES = {"z": "z", "r": "r", "h": "n"}  # name in the homework: canonical name
HOMEWORK = Layout(
    name="homework",
    scope="gru.",
    cell={
        **{f"W{name}.weight": f"W{gate}" for name, gate in _GATES.items()},
        **{f"U{name}.weight": f"U{gate}" for name, gate in _GATES.items()},
        **{f"W{name}.bias": f"b{gate}" for name, gate in _GATES.items()},
        **{f"U{name}.bias": f"c{gate}" for name, gate in _GATES.items()},
    },
    reset_kinds=(False,),
    z_keeps=False,
    others=("fc.weight", "fc.bias", "vectors.weight"),
)
HOMEWORK_NN = replace(TORCH, name="homework-nn", others=HOMEWORK.others)

# flax.linen.GRUCell: a Dense layer for each gate and operand; hr and hz have no bias. The "params"
# collection, flattened by flax.traverse_util.flatten_dict(params, sep="/").
# Source: flax/linen/recurrent.py.
LINEN = Layout(
    name="linen",
    scope="gru/{layer}/{direction}/",
    cell={
        **{f"i{gate}/kernel": f"W{gate}" for gate in "rzn"},
        **{f"h{gate}/kernel": f"U{gate}" for gate in "rzn"},
        **{"ir/bias": "br+cr", "iz/bias": "bz+cz", "in/bias": "bn", "hn/bias": "cn"},
    },
    transposes=True,
    others=("head/kernel", "head/bias", "vectors/embedding"),
)

# flax.nnx.GRUCell: "/".join(path) for the paths of nnx.to_flat_state(nnx.state(cell, nnx.Param)).
# Despite its docstring, n has no hidden bias. Source: flax/nnx/nn/recurrent.py.
NNX = replace(
    LINEN,
    name="nnx",
    cell={
        "dense_i/kernel": "Wr Wz Wn",
        "dense_h/kernel": "Ur Uz Un",
        "dense_i/bias": "br+cr bz+cz bn",
    },
)

# keras.layers.GRU (Keras 3), in the order of get_weights() and set_weights(). (Paths of variables
# in Keras begin with the names of the layers.)
# Source: keras/src/layers/rnn/gru.py.
_KERNELS = {"kernel": "Wz Wr Wn", "recurrent_kernel": "Uz Ur Un"}
KERAS = Layout(
    name="keras",
    scope="gru/{layer}/{direction}/",
    cell=_KERNELS | {"bias": "bz br bn, cz cr cn"},
    cell_before=_KERNELS | {"bias": "bz+cz br+cr bn+cn"},
    reset_kinds=(True, False),
    transposes=True,
    others=("head/kernel", "head/bias", "vectors/embeddings"),
)

# equinox.nn.GRUCell: its leaves, named by attribute. Source: equinox/nn/_rnn.py.
EQUINOX = Layout(
    name="equinox",
    scope="gru.{layer}.{direction}.",
    cell={
        "weight_ih": "Wr Wz Wn",
        "weight_hh": "Ur Uz Un",
        "bias": "br+cr bz+cz bn",
        "bias_n": "cn",
    },
)

# haiku.GRU (dm-haiku): module path and parameter name joined by "/".
# Source: haiku/_src/recurrent.py.
HAIKU = Layout(
    name="haiku",
    scope="gru/{layer}/{direction}/",
    cell={"w_i": "Wz Wr Wn", "w_h": "Uz Ur Un", "b": "bz+cz br+cr bn+cn"},
    reset_kinds=(False,),
    z_keeps=False,
    transposes=True,
    others=("head/w", "head/b", "vectors/embeddings"),
)

# The inputs of the GRU operator of ONNX, one node per layer. The attribute linear_before_reset of
# the node must equal reset_after. Source: the operator specification, GRU, version 22.
ONNX = Layout(
    name="onnx",
    scope="gru.{layer}.",
    cell={"W": "Wz Wr Wn", "R": "Uz Ur Un", "B": "bz br bn cz cr cn"},
    reset_kinds=(False, True),
    stacks_directions=True,
)

FORMATS = {
    layout.name: layout
    for layout in (CANONICAL, TORCH, HOMEWORK, HOMEWORK_NN, LINEN, NNX, KERAS, EQUINOX, HAIKU, ONNX)
}
