"""A trained classifier as an ONNX graph, made from its canonical parameters without a framework.

tokens [B, T] and lengths [B] (int32) to logits [B, C] (float32): word vectors, log-count ratios of
n-grams, one GRU or RNN node a layer, pooling and head. Inside, arrays are time-major.
"""

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from common import convert
from common.errors import InputError
from common.params import cell_of, structure
from common.training.run_directory import Run

OPSET, IR_VERSION = 22, 10  # of the operators, and of the file format that belongs to them
_LARGEST = 2**31  # bytes of a protobuf message


class Graph:
    """A graph under construction: nodes and constants."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def __call__(
        self, operator: str, *inputs: Any, outputs: Sequence[str] = (), **attributes: Any
    ) -> str:
        """Add a node; returns its first output. inputs: names or constants."""
        names = [each if isinstance(each, str) else self.constant(each) for each in inputs]
        outputs = outputs or [f"{operator}_{len(self.nodes)}"]
        self.nodes.append(helper.make_node(operator, names, outputs, **attributes))
        return outputs[0]

    def constant(self, value: Any) -> str:
        """Add a constant; returns its name. Python's integers become int64."""
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def model(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> onnx.ModelProto:
        """The complete model, validated by onnx.checker.

        inputs, outputs: (type, shape) by name; a size that is a string is arbitrary.
        """
        graph_inputs, graph_outputs = (
            [
                helper.make_tensor_value_info(name, *type_and_shape)
                for name, type_and_shape in values.items()
            ]
            for values in (inputs, outputs)
        )
        graph = helper.make_graph(self.nodes, "model", graph_inputs, graph_outputs, self.constants)
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
        if model.ByteSize() >= _LARGEST:
            raise InputError("an ONNX file holds at most 2 GiB, this model does not fit")
        onnx.checker.check_model(model, full_check=True)
        return model


def recurrent_weights(
    parameters: Mapping[str, np.ndarray], *, reset_after: bool, ngrams: int = 0
) -> dict[str, np.ndarray]:
    """The parameters of the nodes: W, R and B of each layer, directions stacked, as "gru.0.W"."""
    if cell_of(parameters) == "gru":
        return convert.to_format("onnx", parameters, reset_after=reset_after, ngrams=ngrams)
    if (cell := cell_of(parameters)) != "rnn":
        raise InputError(f"--to onnx: no operator of ONNX computes the cell {cell}")
    layers, directions = structure(parameters)
    names = {"W": ["weight_ih"], "R": ["weight_hh"], "B": ["bias_ih", "bias_hh"]}
    weights = {}
    for place, name in product((f"rnn.{layer}." for layer in range(layers)), names):
        sides = [[parameters[f"{place}{side}.{n}"] for n in names[name]] for side in directions]
        weights[place + name] = np.stack([*map(np.concatenate, sides)])
    return weights


def recurrent(
    graph: Graph,
    weights: Mapping[str, np.ndarray],
    place: str,
    x: str,
    lengths: str = "",
    *,
    reset_after: bool,
    outputs: Sequence[str],
) -> None:
    """Add the node of a layer with the weights of this prefix ("gru.0.") and input x [T, B, D].

    Its outputs are the states [T, R, B, H] and the last states [R, B, H].
    """
    W, R, B = (weights[place + name] for name in "WRB")
    attributes = {
        "hidden_size": R.shape[-1],
        "direction": "bidirectional" if len(R) == 2 else "forward",
    }
    kind = place.partition(".")[0].upper()
    attributes |= {"linear_before_reset": int(reset_after)} if kind == "GRU" else {}
    graph(kind, x, W, R, B, lengths, outputs=outputs, **attributes)


def find_code(graph: Graph, code: str, codes: np.ndarray) -> str:
    """The index of each code in `codes`, which are sorted; len(codes) for an unknown code.

    An unrolled bisection computes how many known codes are smaller.
    """
    known = graph.constant(np.append(codes, np.iinfo(np.int64).max))
    place = graph.constant(0)
    for bit in reversed(range(len(codes).bit_length())):
        further = graph("Add", place, 1 << bit)
        last = graph("Min", graph("Sub", further, 1), len(codes))
        smaller = graph("Less", graph("Gather", known, last), code)
        place = graph("Where", smaller, further, place)
    is_known = graph("Equal", graph("Gather", known, place), code)
    return graph("Where", is_known, place, len(codes))


def read_ratios(graph: Graph, values: Mapping[str, np.ndarray], tokens: str, ngrams: int) -> str:
    """The ratios at each word [T, B, E], as Ratios.read in common/data/ngrams.py computes them.

    An unknown n-gram has the index after the last, at which the ratios are zero. Longer n-grams
    that begin with it have codes above those of all known ones.
    """
    words = len(values["vectors.weight"])
    place = word = graph("Cast", tokens, to=TensorProto.INT64)
    ratios = []
    for n in range(1, ngrams + 1):
        if n > 1:  # the preceding words end a step earlier
            before = graph("Pad", place, [1, 0, -1, 0], len(values[f"codes.{n - 1}"]))
            place = graph("Add", graph("Mul", before, words), word)
        place = find_code(graph, place, values[f"codes.{n}"])
        ratios.append(graph("Gather", np.pad(values[f"ratios.{n}"], ((0, 1), (0, 0))), place))
    return graph("Concat", *ratios, axis=-1)


def classifier(run: Run) -> onnx.ModelProto:
    """The classifier of a run."""
    config, values, graph = run.model, run.arrays(), Graph()
    steps = graph("Squeeze", graph("Shape", "tokens", start=1))
    step = graph("Unsqueeze", graph("Range", 0, steps, 1), [1])
    mask = graph("Less", step, graph("Cast", "lengths", to=TensorProto.INT64))  # [T, B]
    vectors, zero = values["vectors.weight"], np.int32(0)
    tokens = graph("Where", mask, graph("Transpose", "tokens", perm=[1, 0]), zero)
    # ONNX counts negative indices from the end; here they are out of range as well.
    tokens = graph("Where", graph("Less", tokens, zero), np.int32(len(vectors)), tokens)
    x = graph("Gather", vectors, tokens)
    if config.ngrams:
        x = graph("Concat", x, read_ratios(graph, values, tokens, config.ngrams), axis=-1)
    parameters = {name: values[name] for name in run.parameters}
    options = {"reset_after": config.reset_after}
    weights = recurrent_weights(parameters, ngrams=config.ngrams, **options)
    for layer in range(config.num_layers):
        states, last = outputs = f"states_{layer}", f"last_{layer}"
        place = f"{config.cell}.{layer}."
        recurrent(graph, weights, place, x, "lengths", outputs=outputs, **options)
        states = graph("Transpose", states, perm=[0, 2, 1, 3])
        x = graph("Reshape", states, [0, 0, -1])  # [T, B, R*H]
    features = graph("Concat", *pool(graph, x, last, mask, config.pooling), axis=-1)
    features = graph("Relu", features) if config.relu else features
    head = values["head.weight"], values["head.bias"]
    graph("Gemm", features, *head, outputs=["logits"], transB=1)
    inputs = {"tokens": (TensorProto.INT32, ["batch", "time"])}
    inputs |= {"lengths": (TensorProto.INT32, ["batch"])}
    return graph.model(inputs, {"logits": (TensorProto.FLOAT, ["batch", config.classes])})


def pool(graph: Graph, outputs: str, last: str, mask: str, pooling: str) -> list[str]:
    """The input of the head, from outputs [T, B, R*H] and last states [R, B, H].

    It is zero for a row without words. mask [T, B]: true at words.
    """
    zero, lowest = np.float32(0), np.float32(-np.inf)
    mask, row = graph("Unsqueeze", mask, [2]), graph("Unsqueeze", "lengths", [1])
    features = []
    for kind in pooling.split("+"):
        if kind == "last":
            states = graph("Transpose", last, perm=[1, 0, 2])
            features.append(graph("Reshape", states, [0, -1]))
        elif kind == "mean":
            total = graph("ReduceSum", graph("Where", mask, outputs, zero), [0], keepdims=0)
            count = graph("Cast", graph("Max", row, np.int32(1)), to=TensorProto.FLOAT)
            features.append(graph("Div", total, count))
        else:
            most = graph("ReduceMax", graph("Where", mask, outputs, lowest), [0], keepdims=0)
            features.append(graph("Where", graph("Greater", row, np.int32(0)), most, zero))
    return features


def save(run: Run, *, int8: bool = False) -> bytes:
    """The classifier of a run as the content of an ONNX file.

    int8: quantize the word vectors, the ratios and the last layer to int8. Raises InputError if the
    model does not fit into 2 GiB.
    """
    model = classifier(run)
    if not int8:
        return model.SerializeToString()
    from onnxruntime.quantization import quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)  # warnings about tokens, which must not be quantized
        try:
            quantize_dynamic(model, path := Path(folder, "model.onnx"))
        finally:
            logging.disable(before)
        return path.read_bytes()


def load(content: bytes) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function of (tokens, lengths) that runs the content of an ONNX file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda tokens, lengths: session.run(None, {"tokens": tokens, "lengths": lengths})[0]
