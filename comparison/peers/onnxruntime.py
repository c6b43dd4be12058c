"""ONNX's GRU in ONNX Runtime, for the speed of inference: it has no gradients."""

from collections.abc import Callable, Mapping

import numpy as np
import onnxruntime

from common.cores import cores
from comparison.contenders import Contenders
from comparison.implementations import converted


def contenders(variant: str, device: str) -> Contenders:
    """ONNX Runtime on the CPU."""
    return Contenders({}, {"ONNX Runtime": session})


def model(weights: Mapping[str, np.ndarray], x: np.ndarray) -> bytes:
    """An ONNX file of a GRU node whose only output is the last state, h_last."""
    from common.inference.onnx_graph import Graph, TensorProto, recurrent

    graph, H = Graph(), weights["gru.0.forward.weight_hh"].shape[1]
    tensors, outputs = converted("onnx", weights), ["", "h_last"]
    recurrent(graph, tensors, "gru.0.", "x", reset_after=True, outputs=outputs)
    shapes = {"x": x.shape, "h_last": (1, x.shape[1], H)}
    ends = [{name: (TensorProto.FLOAT, shape)} for name, shape in shapes.items()]
    return graph.model(*ends).SerializeToString()


def session(weights: Mapping[str, np.ndarray], x: np.ndarray) -> Callable[[], object]:
    """A session of the model on all cores."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores()
    run = onnxruntime.InferenceSession(model(weights, x), options, ["CPUExecutionProvider"]).run
    return lambda: run(["h_last"], {"x": x})[0]
