"""Every layout against its own library, whose own layer runs on the converted parameters.

What the parameters mean is what the oracle computes from them, in NumPy, float64.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen
import jax
import numpy as np
import pytest
import torch
from flax import nnx, traverse_util

from common import oracle
from common.convert import FORMATS, from_format, to_format
from comparison.peers.jax import linen_rnn, nnx_rnn
from tests.convert.test_convert import D, H, draw_parameters

T, B = 6, 4
DTYPES = ("float32", "float64")
# Outputs are below 1, from sums of D + H + 2 = 10 terms of order 1: some ten roundings, which the
# gates damp rather than amplify. A wrong gate, sign or bias shows as a difference above 1e-2.
ROUNDINGS = 10

Tensors = dict[str, np.ndarray]
Run = Callable[[Tensors, np.ndarray, bool], np.ndarray]
"""Outputs [T, B, H] for tensors under the library's own names, x [T, B, D] and reset_after."""


def torch_gru(layers: int = 1, directions: int = 1) -> torch.nn.GRU:
    return torch.nn.GRU(D, H, layers, bidirectional=directions == 2)


class MyGRU(torch.nn.Module):
    """The homework's."""

    def __init__(self) -> None:
        super().__init__()
        self.Wz, self.Wr, self.Wh = (torch.nn.Linear(D, H) for _ in range(3))
        self.Uz, self.Ur, self.Uh = (torch.nn.Linear(H, H) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.new_zeros(x.shape[1], H)
        outputs = []
        for x_t in x:
            z = torch.sigmoid(self.Wz(x_t) + self.Uz(h))
            r = torch.sigmoid(self.Wr(x_t) + self.Ur(h))
            h_tilde = torch.tanh(self.Wh(x_t) + self.Uh(r * h))
            h = (1 - z) * h + z * h_tilde
            outputs.append(h)
        return torch.stack(outputs)


def load(module: torch.nn.Module, tensors: Tensors) -> Any:
    state = {key: torch.from_numpy(value) for key, value in tensors.items()}
    module.to(next(iter(state.values())).dtype).load_state_dict(state, strict=True)
    return module.requires_grad_(False)


def run_torch(tensors: Tensors, x: np.ndarray, reset_after: bool) -> np.ndarray:
    layers = 1 + max(int(key.removesuffix("_reverse")[-1]) for key in tensors)
    directions = 1 + any(key.endswith("_reverse") for key in tensors)
    return load(torch_gru(layers, directions), tensors)(torch.from_numpy(x))[0].numpy()


def run_homework(tensors: Tensors, x: np.ndarray, reset_after: bool) -> np.ndarray:
    return load(MyGRU(), tensors)(torch.from_numpy(x)).numpy()


def scan(step: Callable, x: np.ndarray) -> np.ndarray:
    """Outputs of a cell, h <- step(h, x[t])."""
    h = np.zeros((x.shape[1], H), x.dtype)
    outputs = []
    for x_t in x:
        h = np.asarray(step(h, x_t))
        outputs.append(h)
    return np.stack(outputs)


def by_rnn(rnn: Callable[..., tuple]) -> Run:
    """What the parity checks and the speed comparison run of a library in JAX."""

    def run(tensors: Tensors, x: np.ndarray, reset_after: bool) -> np.ndarray:
        h0, lengths = np.zeros((x.shape[1], H), x.dtype), np.full(x.shape[1], len(x))
        return np.asarray(rnn(tensors, False, x, h0, lengths)[1])

    return run


def linen_parameters() -> Tensors:
    variables = flax.linen.GRUCell(H).init(jax.random.key(0), np.zeros(H), np.zeros(D))
    return traverse_util.flatten_dict(variables["params"], sep="/")


def nnx_parameters() -> Tensors:
    state = nnx.state(nnx.GRUCell(D, H, rngs=nnx.Rngs(0)), nnx.Param)
    return {"/".join(path): value[...] for path, value in nnx.to_flat_state(state)}


def run_keras(tensors: Tensors, x: np.ndarray, reset_after: bool) -> np.ndarray:
    import keras

    layer = keras.layers.GRU(H, reset_after=reset_after, return_sequences=True, dtype=x.dtype.name)
    layer.build((None, *x.shape[1:]))
    layer.set_weights([tensors[key] for key in ("kernel", "recurrent_kernel", "bias")])
    return layer(x.swapaxes(0, 1)).detach().numpy().swapaxes(0, 1)


def keras_parameters(reset_after: bool) -> Tensors:
    import keras

    layer = keras.layers.GRU(H, reset_after=reset_after)
    layer.build((None, T, D))
    return {weight.name: weight for weight in layer.weights}


def run_equinox(tensors: Tensors, x: np.ndarray, reset_after: bool) -> np.ndarray:
    from comparison.peers import equinox

    return by_rnn(equinox.rnn)(tensors, x, reset_after)


def equinox_parameters() -> Tensors:
    import equinox

    cell = equinox.nn.GRUCell(D, H, key=jax.random.key(0))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(cell)
    }


def haiku_gru() -> Any:
    import haiku

    def step(x: np.ndarray, h: np.ndarray) -> Any:
        return haiku.GRU(H)(x, h)

    return haiku.without_apply_rng(haiku.transform(step))


def run_haiku(tensors: Tensors, x: np.ndarray, reset_after: bool) -> np.ndarray:
    gru = haiku_gru()
    return scan(lambda h, x_t: gru.apply({"gru": tensors}, x_t, h)[0], x)


def haiku_parameters() -> Tensors:
    return haiku_gru().init(jax.random.key(0), np.zeros(D), np.zeros(H))["gru"]


def run_onnx(tensors: Tensors, x: np.ndarray, reset_after: bool) -> np.ndarray:
    import onnx.reference
    import onnxruntime

    node = onnx.helper.make_node(
        "GRU",
        ["X", "W", "R", "B"],
        ["Y"],
        hidden_size=H,
        direction="bidirectional" if len(tensors["W"]) == 2 else "forward",
        linear_before_reset=int(reset_after),
    )
    kind = onnx.helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = onnx.helper.make_graph(
        [node],
        "gru",
        [onnx.helper.make_tensor_value_info("X", kind, x.shape)],
        [onnx.helper.make_tensor_value_info("Y", kind, ["T", "directions", "B", "H"])],
        [onnx.numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 22)], ir_version=10
    )
    onnx.checker.check_model(model)
    session: Any
    if x.dtype == np.float32:
        session = onnxruntime.InferenceSession(model.SerializeToString())
    else:  # "GRU operator does not support double yet"
        session = onnx.reference.ReferenceEvaluator(model)
    (outputs,) = session.run(None, {"X": x})  # [T, directions, B, H]
    return np.concatenate(list(outputs.swapaxes(0, 1)), axis=-1)


def onnx_parameters() -> Tensors:
    import onnx

    # The shapes are in the documentation only, so they are written down here.
    names = [name.name for name in onnx.defs.get_schema("GRU").inputs[1:4]]
    shapes = [(1, 3 * H, D), (1, 3 * H, H), (1, 6 * H)]
    return {name: np.zeros(shape) for name, shape in zip(names, shapes, strict=True)}


# By layout: what runs its layer, and a layer's own parameters, for their names and shapes.
LIBRARIES: dict[str, tuple[Run, Callable[[bool], Tensors]]] = {
    "torch": (run_torch, lambda _: torch_gru().state_dict()),
    "homework": (run_homework, lambda _: MyGRU().state_dict()),
    "linen": (by_rnn(partial(linen_rnn, flax.linen.GRUCell)), lambda _: linen_parameters()),
    "nnx": (by_rnn(nnx_rnn), lambda _: nnx_parameters()),
    "keras": (run_keras, keras_parameters),
    "equinox": (run_equinox, lambda _: equinox_parameters()),
    "haiku": (run_haiku, lambda _: haiku_parameters()),
    "onnx": (run_onnx, lambda _: onnx_parameters()),
}
PEERS = {
    "keras": ("keras",),
    "equinox": ("equinox",),
    "haiku": ("haiku",),
    "onnx": ("onnx", "onnxruntime"),
}
KINDS = [(name, kind) for name in LIBRARIES for kind in FORMATS[name].reset_kinds]
# By default each dtype and each size once; the layers of the JAX libraries, which compile for every
# dtype and which `run` calls once for each layer and direction, only one size.
CASES = [
    pytest.param(name, kind, *size, dtype, marks=[] if is_default else [pytest.mark.long])
    for name, kind in KINDS
    for size in [(1, 1), (2, 2)]
    for dtype in DTYPES
    if name != "homework" or size == (1, 1)
    for is_default in [
        name == "homework"
        or (size == (1, 1) and dtype == "float32")
        or (size == (2, 2) and dtype == "float64" and name in ("torch", "keras", "onnx"))
    ]
]


@pytest.fixture(autouse=True)
def library(request, monkeypatch):
    """Skip where the library of the layout under test is not installed."""
    name = request.node.callspec.params["name"]
    monkeypatch.setenv("KERAS_BACKEND", "torch")  # read by Keras when it is imported
    for module in PEERS.get(name, ()):
        pytest.importorskip(module, reason="comes with the extra `peers`")


@pytest.fixture(autouse=True)
def jax_dtype(request):
    """JAX, too, computes in the dtype of the test."""
    with jax.enable_x64(request.node.callspec.params["dtype"] == "float64"):
        yield


def draw(shapes: dict[str, tuple[int, ...]], dtype: str) -> Tensors:
    rng = np.random.default_rng(0)
    return {name: rng.uniform(-1, 1, shape).astype(dtype) for name, shape in shapes.items()}


def run(name: str, tensors: Tensors, x: np.ndarray, reset_after: bool) -> np.ndarray:
    """All layers and directions: those that the library's layer has no notion of, one by one."""
    run_layer, _ = LIBRARIES[name]
    scopes: dict[tuple[str, str], Tensors] = {}
    for key, value in tensors.items():
        result = re.fullmatch(r"gru[./](\d)[./](?:(forward|backward)[./])?(.+)", key)
        if result is None:  # a layer that stands alone
            return run_layer(tensors, x, reset_after)
        layer, direction, own_name = result.groups()
        scopes.setdefault((layer, direction or "forward"), {})[own_name] = value
    for layer in sorted({layer for layer, _ in scopes}):
        outputs = [run_layer(scopes[layer, "forward"], x, reset_after)]
        if (layer, "backward") in scopes:
            backward = run_layer(scopes[layer, "backward"], x[::-1].copy(), reset_after)
            outputs.append(backward[::-1])
        x = np.concatenate(outputs, axis=-1)
    return x


def check_outputs(name: str, tensors: Tensors, parameters: Tensors, reset_after: bool) -> None:
    """The library on its tensors, against the oracle on the canonical parameters."""
    dtype = next(iter(parameters.values())).dtype
    x = np.random.default_rng(1).uniform(-1, 1, (T, B, D)).astype(dtype)
    actual = run(name, tensors, x, reset_after)
    expected = oracle.forward(parameters, x, np.full(B, T), reset_after=reset_after).outputs
    assert actual.dtype == dtype
    # keras.ops.matmul multiplies float64 matrices in float32; the PyTorch backend's own loop for
    # reset_after=True does not use it.
    rounded_to = np.float32 if name == "keras" and not reset_after else dtype
    tolerance = ROUNDINGS * np.finfo(rounded_to).eps
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("name", "reset_after", "layers", "directions", "dtype"), CASES)
def test_library_computes_the_same_from_converted_parameters(
    name, reset_after, layers, directions, dtype
):
    parameters = draw_parameters(name, layers, directions, dtype, gru_only=True)
    tensors = to_format(name, parameters, reset_after=reset_after)
    check_outputs(name, tensors, parameters, reset_after)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.long), "float64"])
@pytest.mark.parametrize(("name", "reset_after"), KINDS)
def test_library_parameters_keep_their_names_and_meaning(name, reset_after, dtype):
    _, own_parameters = LIBRARIES[name]
    shapes = {key: tuple(value.shape) for key, value in own_parameters(reset_after).items()}
    tensors = draw(shapes, dtype)
    parameters = from_format(name, tensors, reset_after=reset_after)
    check_outputs(name, tensors, parameters, reset_after)

    back = to_format(name, parameters, reset_after=reset_after)
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(back[key], value, strict=True)
