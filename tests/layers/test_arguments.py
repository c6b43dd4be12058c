"""Invalid calls of the layer raise and name the argument; unusual valid calls are right.

Both frameworks behave alike. Most of these calls once returned wrong numbers, or accessed memory
outside the caller's arrays.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch._subclasses.fake_tensor import FakeTensorMode

import jax_impl.classifier
import jax_impl.fused
import torch_impl.classifier
import torch_impl.fused
from common.cells import LayerCall
from common.params import GRU_PARAMETERS, ModelConfig, init, init_gru
from jax_impl.gru import CELL as JAX_GRU
from tests import ROOT
from torch_impl.gru import CELL as TORCH_GRU

T, B, D, H, K = 7, 4, 5, 8, 6
pytestmark = pytest.mark.usefixtures("x64")
EACH = [("torch", name) for name in TORCH_GRU.implementations()]
EACH += [("jax", name) for name in JAX_GRU.implementations()]
each = pytest.mark.parametrize(("framework", "implementation"), EACH)
each_framework = pytest.mark.parametrize("framework", ["torch", "jax"])
PARAMETERS = init_gru(D, H, 1, False, seed=0)
WEIGHT_HH = "gru.0.forward.weight_hh"


def arguments(**changes: object) -> dict[str, object]:
    """The arguments of a valid call of gru, as NumPy arrays, with some of them replaced."""
    rng = np.random.default_rng(0)
    valid = {
        "parameters": {name: value.astype(np.float32) for name, value in PARAMETERS.items()},
        "x": rng.normal(size=(T, B, D)).astype(np.float32),
        "lengths": np.array([3, 7, 0, 5], np.int32),
        "h0": rng.normal(size=(1, B, H)).astype(np.float32),
        "tokens": None,
    }
    if "tokens" in changes:
        valid["x"] = rng.normal(size=(K, D)).astype(np.float32)
    return valid | changes


def convert(framework: str, value: object) -> object:
    """The value with all NumPy arrays, also nested ones, as arrays of a framework."""
    if isinstance(value, dict):
        return {name: convert(framework, each) for name, each in value.items()}
    if not isinstance(value, np.ndarray):
        return value
    return torch.from_numpy(value) if framework == "torch" else jnp.asarray(value)


def call(framework: str, implementation: str, arguments: dict) -> tuple[np.ndarray, ...]:
    """outputs and h_last of a call."""
    gru = {"torch": torch_impl.gru.gru, "jax": jax_impl.gru.gru}[framework]
    results = gru(**convert(framework, arguments), implementation=implementation)
    return tuple(np.asarray(result) for result in results)


def parameter(**changes: object) -> dict[str, object]:
    """All parameters, with one replaced or, if it is None, removed."""
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    both = arguments()["parameters"] | {f"gru.0.forward.{n}": v for n, v in changed.items()}
    return {name: value for name, value in both.items() if value is not None}


def ones(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.ones(shape, dtype)


TOKENS = np.zeros((T, B), np.int32)
RESETS = np.zeros((T, B), bool)
WRONG = {
    "h0 of a wide state": ("h0", {"h0": ones(1, B, 4096)}),
    "h0 of few rows": ("h0", {"h0": ones(1, 3, H)}),
    "h0 of another state": ("h0", {"h0": ones(1, B, 64)}),
    "h0 of two layers": ("h0", {"h0": ones(2, B, H)}),
    "h0 of no layers": ("h0", {"h0": ones(B, H)}),
    "h0 in float64": ("h0", {"h0": ones(1, B, H, dtype="float64")}),
    "h0 in float16": ("h0", {"h0": ones(1, B, H, dtype="float16")}),
    "h0 in int32": ("h0", {"h0": ones(1, B, H, dtype="int32")}),
    "x in float64": ("x", {"x": ones(T, B, D, dtype="float64")}),
    "x in int64": ("x", {"x": ones(T, B, D, dtype="int64")}),
    "x in complex64": ("x", {"x": ones(T, B, D, dtype="complex64")}),
    "x of few rows": ("lengths", {"x": ones(T, 3, D)}),
    "x of another size": ("weight_ih", {"x": ones(T, B, D + 1)}),
    "x of two dimensions": ("x", {"x": ones(T, D)}),
    "x of three dimensions, and tokens": ("x", {"tokens": TOKENS, "x": ones(T, B, D)}),
    "no x": ("x", {"x": None}),
    "lengths beyond T": ("lengths", {"lengths": np.array([3, 8, 0, 5])}),
    "lengths below 0": ("lengths", {"lengths": np.array([3, -1, 0, 5])}),
    "lengths beyond int32": ("lengths", {"lengths": np.array([3, 2**32 + 3, 0, 5])}),
    "lengths in float32": ("lengths", {"lengths": ones(B)}),
    "lengths in bool": ("lengths", {"lengths": ones(B, dtype="bool")}),
    "few lengths": ("lengths", {"lengths": np.array([3, 7, 0])}),
    "no lengths": ("lengths", {"lengths": None}),
    "tokens beyond K": ("tokens", {"tokens": TOKENS + K}),
    "tokens below 0": ("tokens", {"tokens": TOKENS - 1}),
    "tokens beyond int32": ("tokens", {"tokens": TOKENS + np.int64(2**32)}),
    "tokens in float32": ("tokens", {"tokens": TOKENS.astype(np.float32)}),
    "tokens of few rows": ("lengths", {"tokens": TOKENS[:, :3]}),
    "tokens and no rows in x": ("x", {"tokens": TOKENS, "x": ones(0, D)}),
    "weight_hh too small": (WEIGHT_HH, {"parameters": parameter(weight_hh=ones(3 * H, H - 1))}),
    "weight_hh too large": (WEIGHT_HH, {"parameters": parameter(weight_hh=ones(4 * H, H))}),
    "weight_hh of one dimension": (WEIGHT_HH, {"parameters": parameter(weight_hh=ones(3 * H))}),
    "weight_ih of another size": ("weight_ih", {"parameters": parameter(weight_ih=ones(H, D))}),
    "bias_hh too small": ("bias_hh", {"parameters": parameter(bias_hh=ones(3 * H - 1))}),
    "bias_ih in float64": (
        "bias_ih",
        {"parameters": parameter(bias_ih=ones(3 * H, dtype="float64"))},
    ),
    "no bias_hh": ("bias_hh", {"parameters": parameter(bias_hh=None)}),
    "resets of few rows": ("resets", {"resets": ones(T, 3, dtype="bool")}),
    "resets in int32": ("resets", {"resets": ones(T, B, dtype="int32")}),
    "resets of another state": ("h_reset", {"resets": RESETS, "h_reset": ones(1, B, H + 1)}),
    "resets in float64": ("h_reset", {"resets": RESETS, "h_reset": ones(1, B, H, dtype="float64")}),
    "h_reset alone": ("h_reset", {"h_reset": ones(1, B, H)}),
    "no parameters": ("parameters", {"parameters": {}}),
    "parameters without names": ("parameters", {"parameters": [ones(3 * H, D)]}),
}


@each
def test_valid_arguments_do_not_raise(framework, implementation):
    for changes in ({}, {"tokens": TOKENS}):
        call(framework, implementation, arguments(**changes))


@each
@pytest.mark.parametrize("wrong", WRONG)
def test_invalid_arguments_raise(framework, implementation, wrong):
    name, changes = WRONG[wrong]
    with pytest.raises((ValueError, TypeError), match=name):
        call(framework, implementation, arguments(**changes))


def layer(framework: str, *sizes: int, **options: object) -> Callable:
    if framework == "torch":
        return torch_impl.GRU(*sizes, **options)
    return jax_impl.GRU(*sizes, rngs=nnx.Rngs(0), **options)


WRONG_OF_MODULES = {
    "input of another size": ("input", {"x": ones(B, T, D + 1)}),
    "input of one dimension": ("input", {"x": ones(D)}),
    "no input": ("input", {"x": None}),
    "a word for input": ("input", {"x": "words"}),
    "h0 of few rows": ("h0|hx", {"h0": ones(1, 3, H)}),
    "h_reset of few rows": (
        "h_reset",
        {"h_reset": ones(1, 3, H), "resets": ones(B, T, dtype="bool")},
    ),
    "h_reset alone": ("h_reset", {"h_reset": ones(1, B, H)}),
    "resets with the time steps first": ("resets", {"resets": ones(T, B, dtype="bool")}),
    "resets of two steps": ("resets", {"resets": ones(B, 2, dtype="bool")}),
    "resets in int32": ("resets", {"resets": ones(B, T, dtype="int32")}),
    "words for lengths": ("lengths", {"lengths": "words"}),
    "few lengths": ("lengths", {"lengths": [1, 2]}),
    "lengths beyond T": ("lengths", {"lengths": [1, 2, 3, 8]}),
}


@each_framework
@pytest.mark.parametrize("wrong", WRONG_OF_MODULES)
def test_module_names_its_own_arguments(framework, wrong):
    name, changes = WRONG_OF_MODULES[wrong]
    inputs = convert(framework, {"x": ones(B, T, D)} | changes)
    first = [inputs.pop("x"), *([inputs.pop("h0", None)] if framework == "torch" else [])]
    gru = layer(framework, D, H, **({"batch_first": True} if framework == "torch" else {}))
    errors = (ValueError, TypeError, *([RuntimeError] if framework == "torch" else []))
    with pytest.raises(errors, match=name):
        gru(*first, **inputs)


@each_framework
@pytest.mark.parametrize(
    ("sizes", "options", "error"),
    [
        ((0, H), {}, ValueError),
        ((D, -1), {}, ValueError),
        ((D, H, 0), {}, ValueError),
        ((D, 8.0), {}, TypeError),
        ((D, H), {"implementation": "fast"}, ValueError),
    ],
)
def test_module_rejects_invalid_sizes_and_names(framework, sizes, options, error):
    with pytest.raises(error):
        layer(framework, *sizes, **options)


@each
def test_any_layout_and_any_integers_are_right(framework, implementation):
    """Another integer dtype gives the same bits, another memory layout the same numbers."""
    usual = arguments(tokens=TOKENS + np.arange(B, dtype=np.int32))
    wanted_result = call(framework, implementation, usual)
    for dtype in ("int8", "uint8", "int16", "uint16", "int64"):
        odd = {name: usual[name].astype(dtype) for name in ("lengths", "tokens")}
        for actual, expected in zip(
            call(framework, implementation, usual | odd), wanted_result, strict=True
        ):
            np.testing.assert_array_equal(actual, expected)
    odd = {"h0": np.asfortranarray(usual["h0"]), "x": np.repeat(usual["x"], 2, axis=1)[:, ::2]}
    odd["lengths"] = np.repeat(usual["lengths"], 2)[::2]
    odd["tokens"] = np.asfortranarray(usual["tokens"])
    odd["parameters"] = {n: np.asfortranarray(p) for n, p in usual["parameters"].items()}
    for actual, expected in zip(
        call(framework, implementation, usual | odd), wanted_result, strict=True
    ):
        # A product of matrices with another layout may add in another order.
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


@each
@pytest.mark.parametrize("everywhere", [False, True])
def test_unread_inputs_do_not_influence_gradients(framework, implementation, everywhere):
    """A row of x that is NaN and that only padding reads, in some or in all sequences."""
    tokens = np.random.default_rng(1).integers(0, K - 2, (T, B)).astype(np.int32)
    lengths = arguments()["lengths"]
    padding = np.arange(T)[:, None] >= lengths
    tokens[padding & (everywhere | (np.arange(B) == 0))] = K - 2  # no step reads row K - 1
    usual = arguments(tokens=tokens)
    odd = usual | {"x": usual["x"].copy()}
    odd["x"][K - 2 :] = np.nan
    usual["x"][K - 2 :] = 0

    gru = {"torch": torch_impl.gru.gru, "jax": jax_impl.gru.gru}[framework]
    places = convert(framework, {"lengths": lengths, "tokens": tokens})

    def loss(leaves: dict) -> object:
        own = {"x": leaves["x"], "h0": leaves["h0"], "implementation": implementation}
        outputs, h_last = gru(leaves, **own, **places)
        return (outputs**2).sum() + h_last.sum()

    gradient = jax.jit(jax.grad(loss))

    def gradients(given: dict) -> list[np.ndarray]:
        leaves = {"x": given["x"], "h0": given["h0"], **given["parameters"]}
        if framework == "jax":
            result = gradient(leaves)
            return [np.asarray(result[name]) for name in leaves]
        inputs = {name: torch.tensor(v, requires_grad=True) for name, v in leaves.items()}
        return [g.numpy() for g in torch.autograd.grad(loss(inputs), list(inputs.values()))]

    for actual, expected in zip(gradients(odd), gradients(usual), strict=True):
        np.testing.assert_array_equal(actual, expected)


def out_of_range(given: dict, name: str) -> list[np.ndarray]:
    """lengths and tokens; one of the two is far too large in row 1."""
    changed = {each: given[each].copy() for each in ("lengths", "tokens")}
    changed[name][..., 1] = 1000
    return list(changed.values())


@pytest.mark.parametrize("implementation", JAX_GRU.implementations())
def test_jax_under_jit_a_row_out_of_range_is_nan_and_nothing_else_is(implementation):
    """Only this row of this call is NaN; an error would make all later calls fail."""
    # The kernel multiplies one or two inputs in another order than many.
    usual = arguments(tokens=TOKENS + np.arange(B, dtype=np.int32))
    compiled = jax.jit(
        lambda lengths, tokens: jax_impl.gru.gru(
            **convert("jax", usual | {"lengths": lengths, "tokens": tokens}),
            implementation=implementation,
        )
    )
    wanted_result = compiled(usual["lengths"], usual["tokens"])
    for wrong in ("lengths", "tokens") * 2:
        outputs, h_last = compiled(*out_of_range(usual, wrong))
        assert np.isnan(outputs.sum((0, 2))[1]) and np.isnan(h_last[0, 1]).all()
        others = [0, 2, 3]
        np.testing.assert_array_equal(outputs[:, others], wanted_result[0][:, others])
        np.testing.assert_array_equal(h_last[:, others], wanted_result[1][:, others])
    for actual, expected in zip(
        compiled(usual["lengths"], usual["tokens"]), wanted_result, strict=True
    ):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("implementation", JAX_GRU.implementations())
@pytest.mark.parametrize("along", [jax.jacrev, jax.jacfwd])
def test_jax_under_jit_derivatives_of_other_rows_are_right(implementation, along):
    usual = arguments(tokens=TOKENS + np.arange(B, dtype=np.int32))

    def result(inputs, lengths, tokens):
        changed = usual | {"lengths": lengths, "tokens": tokens} | inputs
        gru = partial(jax_impl.gru.gru, implementation=implementation)
        return gru(**convert("jax", changed))[1].sum((0, 2))  # of each row

    derivatives = jax.jit(along(result))
    inputs = {name: usual[name] for name in ("h0", "parameters")}
    expected = derivatives(inputs, usual["lengths"], usual["tokens"])
    others = np.ix_([0, 2, 3], [0], [0, 2, 3])
    for wrong in ("lengths", "tokens"):
        got = derivatives(inputs, *out_of_range(usual, wrong))
        np.testing.assert_allclose(got["h0"][others], expected["h0"][others], rtol=0, atol=1e-6)
        assert np.isnan(got["h0"][1, :, 1]).any()
        for actual in jax.tree.leaves(got["parameters"]):  # the row contributes to them
            assert np.isnan(actual[1]).any()


CLASSIFY = {
    "vectors of another size": ("vectors", {"vectors": ones(9, D + 1)}),
    "vectors in float64": ("vectors", {"vectors": ones(9, D, dtype="float64")}),
    "distinct beyond V": ("distinct", {"distinct": np.arange(K) + 4}),
    "distinct below 0": ("distinct", {"distinct": np.arange(K) - 1}),
    "distinct in float32": ("distinct", {"distinct": ones(K)}),
    "tokens beyond K": ("tokens", {"tokens": TOKENS + K}),
    "lengths beyond T": ("lengths", {"lengths": np.array([3, 8, 0, 5])}),
    "few lengths": ("lengths", {"lengths": np.array([3, 0, 5])}),
    "no tokens": ("tokens", {"tokens": None}),
    "head of another size": ("head.weight", {"head.weight": ones(2, H + 1)}),
    "head in float64": ("head.bias", {"head.bias": ones(2, dtype="float64")}),
    "no head": ("head.weight", {"head.weight": None}),
}


@each_framework
@pytest.mark.parametrize("wrong", [None, *CLASSIFY])
def test_classify(framework, wrong):
    name, changes = CLASSIFY[wrong] if wrong else ("", {})
    drawn = init(ModelConfig(D, H), 0, ones(9, D))
    parameters = {n: value.astype(np.float32) for n, value in drawn.items()}
    inputs = {
        "vectors": ones(9, D),
        "distinct": np.arange(K),
        "tokens": TOKENS,
        "lengths": np.array([3, 7, 0, 5]),
    }
    for key, value in changes.items():
        (inputs if key in inputs else parameters)[key] = value
    parameters = {n: value for n, value in parameters.items() if value is not None}
    inputs = convert(framework, {"parameters": parameters, **inputs})
    classifier = {"torch": torch_impl.classifier, "jax": jax_impl.classifier}[framework]
    if wrong is None:
        assert classifier.classify(**inputs).shape == (B, 2)
        return
    with pytest.raises((ValueError, TypeError), match=name):
        classifier.classify(**inputs)


needs_kernel = pytest.mark.skipif(TORCH_GRU.implementations()[-1] == "scan", reason="no kernel")


@needs_kernel
def test_torch_takes_tensors_without_numbers():
    """Fake tensors give fake results, meta tensors meta results; no memory is read."""
    gru = torch_impl.GRU(D, H)
    with FakeTensorMode(allow_non_fake_inputs=True):
        outputs, h_last = gru(torch.empty(T, B, D))
        outputs, h_last = torch_impl.GRU(D, H)(torch.empty(T, B, D))
    assert outputs.shape == (T, B, H) and h_last.shape == (1, B, H)
    outputs, _ = torch_impl.GRU(D, H).to("meta")(torch.empty(B, T, D, device="meta"))
    assert outputs.shape == (B, T, H) and outputs.is_meta
    with pytest.raises(RuntimeError, match="hx: Input and hidden tensors are not at the same dev"):
        gru(torch.empty(B, T, D), torch.empty(1, T, H, device="meta"))
    with pytest.raises(ValueError, match="lengths: expected it on cpu, found meta"):
        gru(torch.empty(T, B, D), lengths=torch.ones(B, dtype=torch.int64, device="meta"))
    with pytest.raises(TypeError, match="dense"):
        gru(torch.empty(B, T, D).to_sparse())


@pytest.mark.parametrize("wrong", ["abc", "0", "-1", "1.5", "99999999999"])
def test_invalid_gru_num_threads_raises(wrong, monkeypatch):
    monkeypatch.setenv("GRU_NUM_THREADS", wrong)
    layer = jax_impl.GRU(D, H, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=f"GRU_NUM_THREADS: .* found {wrong}"):
        layer(jnp.zeros((T, B, D), jnp.float32))


def operator_arguments() -> dict[str, object]:
    return {
        "weight_ih": [torch.ones(3 * H, D)],
        "weight_hh": [torch.ones(3 * H, H)],
        "bias_ih": [torch.ones(3 * H)],
        "bias_hh": [torch.ones(3 * H)],
        "x": torch.ones(T, B, D),
        "h0": torch.ones(1, B, H),
        "h_reset": None,
        "tokens": None,
        "lengths": torch.full((B,), T, dtype=torch.int32),
        "resets": None,
        "save": True,
    }


def operator(given: dict[str, Any], function: str = "forward") -> Any:
    """Call an operator by argument names; the arrays of all directions are a list."""
    rest = dict(given)
    lists = [rest.pop(name) for name in GRU_PARAMETERS]
    states = [rest.pop("h0"), *filter(torch.is_tensor, [rest.pop("h_reset")])]
    weights = [each for row in zip_longest(*lists) for each in row if each is not None]
    arrays = [rest.pop("x"), *weights, *states]
    return getattr(torch.ops.gru, function)(arrays, flags=[False, True, False], **rest)


ROWS = torch.ones(K, D)
OPERATOR = {
    "h0 of few rows": ("^x:", {"h0": torch.ones(1, 3, H)}),
    "h0 of another state": ("weight_ih", {"h0": torch.ones(1, B, 64)}),
    "h0 in float64": ("^x:", {"h0": torch.ones(1, B, H, dtype=torch.float64)}),
    "h0 in bfloat16": ("scan", {"h0": torch.ones(1, B, H, dtype=torch.bfloat16)}),
    "h0 not contiguous": ("h0", {"h0": torch.ones(1, H, B).mT}),
    "weight_ih too small": ("weight_ih", {"weight_ih": [torch.ones(3 * H, D - 1)]}),
    "weight_ih of few gates": ("weight_ih", {"weight_ih": [torch.ones(2 * H, D)]}),
    "weight_ih not contiguous": ("weight_ih", {"weight_ih": [torch.ones(D, 3 * H).mT]}),
    "weight_ih for two": ("arrays", {"weight_ih": [torch.ones(3 * H, D)] * 2}),
    "weight_hh too small": ("weight_hh", {"weight_hh": [torch.ones(3 * H, H - 1)]}),
    "weight_hh for two": ("arrays", {"weight_hh": [torch.ones(3 * H, H)] * 2}),
    "bias_ih too small": ("bias_ih", {"bias_ih": [torch.ones(1)]}),
    "bias_ih for two": ("arrays", {"bias_ih": [torch.ones(3 * H)] * 2}),
    "bias_hh too small": ("bias_hh", {"bias_hh": [torch.ones(1)]}),
    "x of few steps, and lengths": ("lengths", {"x": torch.ones(T - 1, B, D)}),
    "x of few rows": ("^x:", {"x": torch.ones(T, 3, D)}),
    "x of another size": ("weight_ih", {"x": torch.ones(T, B, D + 1)}),
    "x of two dimensions": ("^x:", {"x": torch.ones(T * B, D)}),
    "x in float64": ("^x:", {"x": torch.ones(T, B, D, dtype=torch.float64)}),
    "x not contiguous": ("^x:", {"x": torch.ones(T, D, B).mT}),
    "x of three dimensions, and tokens": ("^x:", {"tokens": torch.zeros(T, B, dtype=torch.int32)}),
    "no x": ("arrays", {"x": None}),
    "lengths in int64": ("lengths", {"lengths": torch.full((B,), T)}),
    "lengths beyond T": ("lengths", {"lengths": torch.full((B,), T + 1, dtype=torch.int32)}),
    "tokens of few rows": ("tokens", {"x": ROWS, "tokens": torch.zeros(T, 3, dtype=torch.int32)}),
    "tokens beyond K": ("tokens", {"x": ROWS, "tokens": torch.from_numpy(TOKENS + np.int32(K))}),
    "three directions": ("arrays", {name: [torch.ones(1)] * 3 for name in GRU_PARAMETERS}),
    "no direction": ("arrays", {name: [] for name in GRU_PARAMETERS}),
    "h_reset without resets": ("arrays", {"h_reset": torch.ones(1, B, H)}),
    "resets without h_reset": ("arrays", {"resets": torch.ones(T, B, dtype=torch.bool)}),
}


@needs_kernel
@pytest.mark.parametrize("wrong", OPERATOR)
def test_torch_operators_validate_all_memory(wrong):
    """Operators that are called by name validate every array."""
    name, changes = OPERATOR[wrong]
    operator(operator_arguments())
    with pytest.raises((ValueError, TypeError, RuntimeError), match=name):
        operator(operator_arguments() | changes)


@needs_kernel
@pytest.mark.parametrize("flags", [[0, 1], [0, 1, 0, 0, 0], [0, 1, 0, 2], [0, 1, 0, -1]], ids=str)
def test_torch_operators_reject_invalid_flags(flags):
    shapes = (T, B, D), (3 * H, D), (3 * H, H), (3 * H,), (3 * H,), (1, B, H)
    lengths = torch.full((B,), T, dtype=torch.int32)
    with pytest.raises(ValueError, match="flags"):
        torch.ops.gru.forward([*map(torch.ones, shapes)], None, lengths, None, flags, True)


@needs_kernel
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("saved", torch.ones(1, 10)),
        ("d_h_last", torch.ones(1, 3, H)),
        ("d_outputs", torch.ones(T, B, 2 * H)),
        ("weight_ih", [torch.ones(3 * H, 2 * D)]),
        ("weight_hh", [torch.ones(3 * H, 2 * H)]),
        ("x", torch.ones(T + 1, B, D)),
        ("x", torch.ones(T, B, D + 1)),
    ],
)
def test_torch_backward_operator_validates_all_memory(name, value):
    inputs = operator_arguments()
    _, h_last, saved = operator(inputs)
    del inputs["save"]
    inputs |= {"d_outputs": None, "d_h_last": h_last, "saved": saved, "of_x": True}
    operator(inputs, "backward")
    with pytest.raises((ValueError, TypeError)):
        operator(inputs | {name: value}, "backward")


FFI_SHAPES = [(T, B, H), (1, B, H), (1, 4 * T * B * H)]
FFI_GRADIENTS = [(3 * H, D), (3 * H, H), (3 * H,), (3 * H,), (T, B, D), (1, B, H), (0,)]
FFI = {
    "h0 of few rows": {"h0": (1, 3, H)},
    "h0 of another state": {"h0": (1, B, 64)},
    "weight_ih too small": {"weight_ih": (3 * H, D - 1)},
    "weight_ih of few gates": {"weight_ih": (2 * H, D)},
    "weight_hh too small": {"weight_hh": (3 * H, H - 1)},
    "weight_hh of one dimension": {"weight_hh": (3 * H,)},
    "bias_ih too small": {"bias_ih": (3,)},
    "bias_hh too small": {"bias_hh": (3,)},
    "x of few rows": {"x": (T, 3, D)},
    "x of few steps": {"x": (T - 1, B, D)},
    "x of another size": {"x": (T, B, D + 1)},
    "x of two dimensions": {"x": (T * B, D)},
    "resets without h_reset": {"resets": (T, B)},
    "resets too small": {"resets": (T, B - 1), "h_reset": (1, B, H)},
    "h_reset of another state": {"resets": (T, B), "h_reset": (1, B, 64)},
    "outputs too small": {"results": [(T, B, H - 1), *FFI_SHAPES[1:]]},
    "saved too small": {"results": [*FFI_SHAPES[:2], (1, 10)]},
    "a result too few": {"results": FFI_SHAPES[:2]},
    "lengths in float32": {"lengths": jnp.ones(B, jnp.float32)},
    "d_weight_ih too small": {"gradients": [(3 * H, D - 1), *FFI_GRADIENTS[1:]]},
    "d_bias_ih too small": {"gradients": [*FFI_GRADIENTS[:2], (3,), *FFI_GRADIENTS[3:]]},
    "d_x too small": {"gradients": [*FFI_GRADIENTS[:4], (T, B, 1), *FFI_GRADIENTS[5:]]},
    "d_x flat": {"gradients": [*FFI_GRADIENTS[:4], (T * B * D,), *FFI_GRADIENTS[5:]]},
    "d_x of one number": {"gradients": [*FFI_GRADIENTS[:4], (1,), *FFI_GRADIENTS[5:]]},
    "a gradient too few": {"gradients": FFI_GRADIENTS[:-1]},
}


@pytest.mark.skipif(not jax_impl.fused.available(), reason="no kernel for JAX")
@pytest.mark.parametrize("wrong", [None, *FFI])
def test_jax_operators_validate_all_memory(wrong):
    """Operators that are called by jax.ffi validate every array; later calls succeed."""
    changes = FFI[wrong] if wrong else {}

    def operate(name: str, results: list, *arrays: jax.Array) -> list:
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results]
        output = jax_impl.fused.attributes(LayerCall(None, None, [()], None, None))
        return jax.block_until_ready(jax.ffi.ffi_call(name, shapes)(*arrays, **output))

    def run(changes: dict) -> tuple[list, list]:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "x", "h0", "h_reset")
        shapes = dict(zip(names, FFI_GRADIENTS, strict=True)) | changes
        arrays = {name: jnp.ones(shapes[name], jnp.float32) for name in names}
        lengths = changes.get("lengths", jnp.full(B, T, jnp.int32))
        places = jnp.zeros(0, jnp.int32), lengths, jnp.zeros(shapes.get("resets", 0), bool)
        results = shapes.get("results", FFI_SHAPES)
        outputs, h_last, saved = operate("gru_forward", results, *arrays.values(), *places)
        read = [arrays[name] for name in ("weight_ih", "weight_hh", "x")]
        read += [outputs, h_last, saved, *places]
        gradients = operate("gru_backward", shapes.get("gradients", FFI_GRADIENTS), *read)
        return outputs, gradients

    if wrong:
        with pytest.raises(jax.errors.JaxRuntimeError, match="GRU"):
            run(changes)
    inputs = operator_arguments()
    outputs, h_last, saved = operator(inputs)
    del inputs["save"]
    inputs |= {"d_outputs": outputs, "d_h_last": h_last, "saved": saved, "of_x": True}
    d_x, *d_weights, d_h0 = operator(inputs, "backward")
    wanted_result = [outputs, *d_weights, d_x, d_h0]
    result, gradients = run({})
    for actual, expected in zip([result, *gradients[:-1]], wanted_result, strict=True):
        np.testing.assert_array_equal(actual, expected)


PROGRAMS = [
    ["-m", "torch_impl.train"],
    ["-m", "jax_impl.train"],
    ["-m", "torch_impl.predict", "absent"],
    ["-m", "common.convert"],
    ["-m", "comparison.checks"],
    ["-m", "tools.gpu.rehearsal"],
    ["compare.py"],
]


@pytest.mark.parametrize("program", PROGRAMS, ids=" ".join)
def test_ctrl_c_while_a_program_is_importing_prints_nothing(program):
    # The signal is sent after the first import, of common/program.py, which python -v prints.
    process = subprocess.Popen(
        [sys.executable, "-v", *program, "--help"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("import 'common.program'"):
            break
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    rest = process.communicate()[1]
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    assert "Traceback" not in rest and "KeyboardInterrupt" not in rest
