"""A GRU in ONNX Runtime, for the speed of inference: it has no gradients."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec

import numpy as np
import onnxruntime

from common.cores import cores
from comparison.implementations import Inference, Layer, converted


def onnx_gru(weights: Mapping[str, np.ndarray], x: np.ndarray) -> Callable[[], object]:
    """A session of one GRU node, of whose outputs it computes the last state alone."""
    from common.inference.onnx_graph import Graph, TensorProto, recurrent

    graph, H = Graph(), weights["gru.0.forward.weight_hh"].shape[1]
    tensors, outputs = converted("onnx", weights), ["", "h_last"]
    recurrent(graph, tensors, "gru.0.", "x", reset_after=True, outputs=outputs)
    shapes = {"x": x.shape, "h_last": (1, x.shape[1], H)}
    ends = [{name: (TensorProto.FLOAT, shape)} for name, shape in shapes.items()]
    model = graph.model(*ends).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores()
    session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    return lambda: session.run(["h_last"], {"x": x})[0]


CONTENDERS: dict[str, tuple[Layer, str]] = {}
INFERENCE: dict[str, Inference] = {"ONNX Runtime": onnx_gru} if find_spec("onnx") else {}
