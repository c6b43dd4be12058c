import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from common.metrics import (
    MOST_DRAWN,
    answers,
    describe_temperature,
    evaluate,
    evaluate_answers,
    fit_temperature,
    reliability,
)


def test_two_classes_against_numbers_worked_out_by_hand() -> None:
    # True class 0: predicted 0, 0, 1. True class 1: predicted 1, 0.
    logits = np.array([[2, 0], [1, 0], [0, 3], [0, 1], [1.5, 0]], np.float32)
    result = evaluate(logits, np.array([0, 0, 0, 1, 1]), ("bad", "good"))
    assert result["accuracy"] == 3 / 5
    assert result["confusion"] == [[2, 1], [1, 1]]
    # Of the 6 pairs (true 0, true 1), the score of the 1 is the larger in 3: -2, -1, 3 / 1, -1.5.
    assert result["roc_auc"] == pytest.approx(3 / 6)
    assert result["classes"]["good"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    # Wilson (1927) with z = 1.959964: centre 0.5566, half width 0.3257.
    assert result["accuracy_interval"] == pytest.approx([0.2307, 0.8824], abs=1e-4)


def test_three_classes_one_never_predicted_and_one_missing() -> None:
    logits = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0]], np.float32)
    result = evaluate(logits, np.array([0, 1, 1]), ("a", "b", "c"))
    assert result["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert result["roc_auc"] is None
    assert result["classes"]["c"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}


def test_many_classes_have_their_mistakes_in_place_of_a_matrix() -> None:
    classes = tuple(map(str, range(MOST_DRAWN + 1)))
    labels = np.array([3, 3, 3, 7, 7, 30, 0])
    logits = np.eye(len(classes))[[5, 5, 3, 5, 7, 0, 0]]
    result = evaluate(logits, labels, classes)
    assert "confusion" not in result
    assert result["mistakes"] == [[3, 5, 2], [7, 5, 1], [30, 0, 1]]
    assert result["classes"]["7"] == {"precision": 1, "recall": 0.5, "f1": 2 / 3, "support": 2}
    assert evaluate(logits[2:3], labels[2:3], classes)["mistakes"] == []
    wrong = evaluate(logits[:1], labels[:1], classes)["classes"]["3"]["support"]
    assert (wrong, type(wrong)) == (1, int)
    assert len(evaluate(logits[:, :30], labels % 30, classes[:30])["confusion"]) == 30


def test_metrics_but_roc_auc_follow_from_the_answers() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((400, 5)), rng.integers(0, 5, 400)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    whole = evaluate(logits, labels, "abcde")
    assert whole["roc_auc"] == pytest.approx(
        roc_auc_score(labels, probabilities, multi_class="ovr")
    )
    blocks = [answers(logits[rows], labels[rows]) for rows in (slice(0, 7), slice(7, 400))]
    assert evaluate_answers(np.concatenate(blocks), labels, "abcde") == whole | {"roc_auc": None}


def test_accuracy_of_each_category_that_occurs() -> None:
    logits = np.array([[1, 0], [0, 1], [1, 0], [1, 0]], np.float32)
    labels, categories = np.array([0, 1, 1, 0]), np.array([2, 0, 0, 0])
    result = evaluate(logits, labels, ("bad", "good"), categories, ("books", "dvd", "toys"))
    assert list(result["categories"]) == ["books", "toys"]
    assert result["categories"]["books"]["accuracy"] == 2 / 3
    assert result["categories"]["books"]["support"] == 3
    # Wilson (1927) of 2 in 3 and of 1 in 1.
    interval = result["categories"]["books"]["accuracy_interval"]
    assert interval == pytest.approx([0.2077, 0.9385], abs=1e-4)
    interval = result["categories"]["toys"]["accuracy_interval"]
    assert interval == pytest.approx([0.2065, 1], abs=1e-4)
    assert evaluate(logits, labels, ("bad", "good"))["categories"] == {}


def test_reliability_follows_from_its_bins():
    confidence = np.array([0.5, 0.52, 0.71, 0.72, 0.99, 1.0])
    correct = np.array([True, False, True, True, True, False])
    error, bins = reliability(confidence, correct, bins=10)
    assert [each["count"] for each in bins] == [2, 2, 2]
    assert [each["confidence"] for each in bins] == pytest.approx([0.51, 0.715, 0.995])
    assert [each["accuracy"] for each in bins] == [0.5, 1.0, 0.5]
    assert error == pytest.approx((2 * 0.01 + 2 * 0.285 + 2 * 0.495) / 6)


def test_temperature_calibrates_probabilities():
    """Answers drawn from the softmax of logits, which are then three times as large."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((40_000, 3))
    odds = np.exp(logits)
    drawn = (odds / odds.sum(1, keepdims=True)).cumsum(1) < rng.random((40_000, 1))
    labels = drawn.sum(1)
    temperature = fit_temperature(3 * logits, labels)
    assert temperature == pytest.approx(3, rel=0.03)
    names = ("a", "b", "c")
    before, after = (
        evaluate(3 * logits / by, labels, names)["calibration_error"] for by in (1, temperature)
    )
    assert after < 0.01 < 0.1 < before


def test_temperature_at_its_limit_is_rejected():
    logits, labels = np.array([[1.0, 0], [0, 1]] * 3), np.array([0, 1] * 3)
    assert describe_temperature(1.234) == "temperature: 1.234"
    for each, start in ((labels, "0.007"), (1 - labels, "148.413")):
        output = describe_temperature(fit_temperature(logits, each))
        assert output.startswith(f"temperature: {start}, the limit, which is no fit: ")
