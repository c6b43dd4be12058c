"""A GRU in ONNX Runtime, for the speed of inference: it has no gradients."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec

import numpy as np
import onnxruntime

from common.data.encoding import cores
from comparison.implementations import Inference, Layer, converted


def onnx_gru(weights: Mapping[str, np.ndarray], x: np.ndarray) -> Callable[[], object]:
    """A session of one GRU node, of whose outputs it computes the last state alone."""
    import onnx
    from onnx import helper, numpy_helper

    tensors = converted("onnx", weights)
    H = weights["gru.0.forward.weight_hh"].shape[1]
    how = {"hidden_size": H, "linear_before_reset": 1}
    last = (1, x.shape[1], H)
    graph = helper.make_graph(
        [helper.make_node("GRU", ["x", *tensors], ["", "h_last"], **how)],
        "gru",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("h_last", onnx.TensorProto.FLOAT, last)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    version = {"opset_imports": [helper.make_opsetid("", 22)], "ir_version": 10}
    model = helper.make_model(graph, **version).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores()
    session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    return lambda: session.run(["h_last"], {"x": x})[0]


CONTENDERS: dict[str, tuple[Layer, str]] = {}
INFERENCE: dict[str, Inference] = {"ONNX Runtime": onnx_gru} if find_spec("onnx") else {}
