"""ONNX's GRU in OpenVINO, for the speed of inference, in two precisions.

They are float32 and OpenVINO's default, which is bfloat16 where the processor computes in it.
"""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import openvino

from common.cores import cores
from comparison.contenders import BFLOAT16_TOLERANCE, Contenders
from comparison.implementations import Inference


def contenders(variant: str, device: str) -> Contenders:
    """OpenVINO on the CPU."""
    inference: dict[str, Inference] = {
        "OpenVINO": gru,
        "OpenVINO float32": partial(gru, INFERENCE_PRECISION_HINT="f32"),
    }
    return Contenders({}, inference, tolerances={"OpenVINO": BFLOAT16_TOLERANCE})


def gru(
    weights: Mapping[str, np.ndarray], x: np.ndarray, **options: object
) -> Callable[[], object]:
    """A request of ONNX Runtime's model on all cores."""
    from comparison.peers.onnxruntime import model

    options |= {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": cores()}
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model(weights, x)), "CPU", options)
    infer = compiled.create_infer_request().infer
    return lambda: infer({"x": x}, share_inputs=True, share_outputs=True)["h_last"]
