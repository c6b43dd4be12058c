"""The oracle against finite differences and against limits with a closed form."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common import oracle
from common.params import ModelConfig, shapes
from tests import ROOT

T, B, D, H, C = 5, 5, 3, 4, 3
LENGTHS = np.array([2, 5, 0, 5, 1])
LABELS = np.array([0, 2, 1, -1, 2])
STRUCTURES = [(1, 1), (1, 2), (2, 1), (3, 2)]


def draw(layers: int, directions: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Parameters, x, h0 and h_reset, everything non-zero and of order one."""
    rng = np.random.default_rng(seed)
    states = (layers * directions, B, H)
    sizes = shapes(ModelConfig(D, H, layers, directions == 2, classes=C))
    sizes |= {"x": (T, B, D), "h0": states, "h_reset": states}
    return {name: rng.uniform(-1, 1, shape) for name, shape in sizes.items()}


def run(
    values: dict[str, np.ndarray], reset_after: bool, resets: np.ndarray | None = None
) -> oracle.Forward:
    parameters = {name: value for name, value in values.items() if "." in name}
    states = values["h0"], resets, values["h_reset"]
    return oracle.forward(parameters, values["x"], LENGTHS, *states, reset_after=reset_after)


@pytest.mark.parametrize("reset_after", [False, True])
@pytest.mark.parametrize(("layers", "directions"), STRUCTURES)
def test_gradients_are_central_differences(layers, directions, reset_after):
    values = draw(layers, directions)
    rng = np.random.default_rng(1)
    resets = np.tile([False, True, False, False, True], (B, 1)).T  # one of them within a row
    first = run(values, reset_after, resets)
    d_outputs = rng.standard_normal(first.outputs.shape)
    d_h_last = rng.standard_normal(first.h_last.shape)

    def objective() -> float:
        result = run(values, reset_after, resets)
        pulled = (result.outputs * d_outputs).sum() + (result.h_last * d_h_last).sum()
        return pulled + oracle.classify(result, LABELS).loss

    head = oracle.classify(first, LABELS)
    gradients = oracle.backward(first, d_outputs, d_h_last + head.d_h_last) | head.gradients
    assert gradients.keys() == values.keys()

    epsilon = 1e-5  # truncation of order epsilon^2, rounding of order 1e-15 / epsilon
    for name, value in values.items():
        assert gradients[name].shape == value.shape
        # Up to 25 entries of each array suffice, because a wrong formula affects all entries.
        for place in rng.permutation(value.size)[:25]:
            stored = value.flat[place]
            value.flat[place] = stored + epsilon
            above = objective()
            value.flat[place] = stored - epsilon
            below = objective()
            value.flat[place] = stored
            expected = (above - below) / (2 * epsilon)
            assert gradients[name].flat[place] == pytest.approx(expected, rel=1e-7, abs=2e-9), name


@pytest.mark.parametrize("reset_after", [False, True])
def test_a_row_with_resets_is_its_sequences(reset_after):
    """A row with resets equals its sequences as separate rows, all but the first from h_reset."""
    values, (start, end) = draw(1, 2), (2, 4)
    resets = np.zeros((T, B), bool)
    resets[[start, end]] = True
    whole = run(values, reset_after, resets)
    row, parameters = 1, {name: value for name, value in values.items() if "." in name}
    parts = [(0, start), (start, end), (end, T)]
    for first, last in parts:
        begins = values["h0" if first == 0 else "h_reset"][:1, row : row + 1]
        ends = values["h0" if last == T else "h_reset"][1:, row : row + 1]
        x = values["x"][first:last, row : row + 1]
        h0 = np.concatenate([begins, ends])
        one = oracle.forward(parameters, x, np.array([last - first]), h0, reset_after=reset_after)
        same = np.allclose(whole.outputs[first:last, row], one.outputs[:, 0], rtol=0, atol=1e-14)
        assert same


@pytest.mark.parametrize("reset_after", [False, True])
def test_saturated_gates(reset_after):
    """If a bias opens or closes a gate completely, the next state has a closed form."""
    values = draw(1, 1)
    weights = {name: np.zeros_like(value) for name, value in values.items() if "weight" in name}
    biases = {name: np.zeros_like(value) for name, value in values.items() if "bias" in name}
    values |= weights | biases
    h0 = values["h0"][0]

    # With zero parameters, z = 1/2 and n = 0, so each word halves the state.
    assert np.allclose(run(values, reset_after).h_last[0], h0 * 0.5 ** LENGTHS[:, None])

    def limit(z: float, r: float) -> np.ndarray:
        values["gru.0.forward.bias_ih"] = np.repeat([z, r, 0.3], H)
        values["gru.0.forward.bias_hh"] = np.repeat([0.0, 0.0, 0.2], H)
        values["gru.0.forward.weight_hh"] = np.concatenate([np.zeros((2 * H, H)), 0.7 * np.eye(H)])
        return run(values, reset_after).h_last[0][LENGTHS == 1]

    start = h0[LENGTHS == 1]
    shut, open_ = -500.0, 500.0
    assert np.allclose(limit(z=shut, r=open_), start)
    assert np.allclose(limit(z=open_, r=open_), np.tanh(0.3 + 0.7 * start + 0.2))
    # A closed reset gate removes the state, and also the hidden bias if the product contains it.
    assert np.allclose(limit(z=open_, r=shut), np.tanh(0.3 + (0 if reset_after else 0.2)))


@pytest.mark.parametrize("reset_after", [False, True])
def test_padding_is_never_read(reset_after):
    values = draw(2, 2)
    result = run(values, reset_after)
    padded = ~result.live
    filled = run(values | {"x": np.where(padded, np.nan, values["x"])}, reset_after)
    ones = np.ones_like(result.outputs), np.ones_like(result.h_last)
    gradients, expected = oracle.backward(filled, *ones), oracle.backward(result, *ones)
    for name in expected:
        assert np.array_equal(gradients[name], expected[name]), name
    assert np.array_equal(filled.outputs, result.outputs)
    assert np.all(np.where(padded, result.outputs, 0) == 0)
    assert np.all(np.where(padded, gradients["x"], 0) == 0)
    assert np.array_equal(result.h_last[:, LENGTHS == 0], values["h0"][:, LENGTHS == 0])


def test_backward_direction_starts_at_the_last_word():
    """The backward direction is a forward direction over the words in reverse order."""
    values = draw(1, 2)
    result = run(values, reset_after=False)
    mirrored = {
        name.replace("backward", "forward"): value
        for name, value in result.parameters.items()
        if "forward" not in name
    }
    for row, length in enumerate(LENGTHS):
        words = values["x"][:length, row : row + 1][::-1]
        h0 = values["h0"][1:, row : row + 1]
        alone = oracle.forward(mirrored, words, np.array([length]), h0, reset_after=False)
        assert np.allclose(alone.h_last[0, 0], result.h_last[1, row], rtol=0, atol=1e-15)
        assert np.allclose(
            alone.outputs[::-1, 0], result.outputs[:length, row, H:], rtol=0, atol=1e-15
        )


def test_state_starts_at_zero_without_h0():
    values = draw(2, 2)
    with_zeros = run(values | {"h0": np.zeros_like(values["h0"])}, reset_after=False)
    without = oracle.forward(with_zeros.parameters, values["x"], LENGTHS, reset_after=False)
    assert np.array_equal(without.outputs, with_zeros.outputs)


def test_loss_is_the_mean_over_labelled_rows():
    result = run(draw(1, 1), reset_after=False)
    features = np.maximum(result.h_last[0], 0)
    logits = features @ result.parameters["head.weight"].T + result.parameters["head.bias"]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    counted = LABELS >= 0
    expected = -np.log(p[counted, LABELS[counted]]).mean()
    assert oracle.classify(result, LABELS).loss == pytest.approx(expected, rel=1e-14)

    unlabelled = oracle.classify(result, np.full(B, -1))
    assert unlabelled.loss == 0
    assert not np.any(unlabelled.d_h_last)


def test_large_logits_do_not_overflow():
    result = run(draw(1, 1), reset_after=False)
    large = result.parameters | {"head.bias": np.array([1e4, 0.0, -1e4])}
    classified = oracle.classify(replace(result, parameters=large), LABELS)
    assert np.isfinite(classified.loss)
    assert np.all(np.isfinite(classified.gradients["head.weight"]))


def test_the_worked_step_of_the_docs_is_the_oracles() -> None:
    text = (ROOT / "docs" / "gru.md").read_text()
    values: dict[str, Any] = {}
    (block,) = [block.partition("```")[0] for block in text.split("```python\n")[1:]]
    exec(compile(block, "docs/gru.md", "exec"), values)
    W, U = (np.concatenate([values[f"{name}_{gate}"] for gate in "zrn"]) for name in "WU")
    h, between = oracle.gru_step(values["x"] @ W.T, np.array([[0.5]]), U, np.zeros(3), False)
    np.testing.assert_allclose(values["h"], h)
    for name, output in {"z": "0.5", "r": "0.6225", "n": "0.9250"}.items():
        np.testing.assert_allclose(values[name], between[name])
        assert f"= {output}\n" in block and abs(float(output) - values[name].item()) < 5e-5
    assert "= 0.7125\n" in block and abs(0.7125 - h.item()) < 5e-5
