"""How good a classifier's answers are."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

_LIMIT = 5  # of a temperature's logarithm


def evaluate(
    logits: Float[np.ndarray, "N C"],
    labels: Int[np.ndarray, " N"],
    classes: Sequence[str],
    categories: Int[np.ndarray, " N"] | None = None,
    category_names: Sequence[str] = (),
) -> dict[str, Any]:
    """All metrics of a test set, ready for JSON.

    accuracy, accuracy_interval (95 %, Wilson 1927), confusion (row: true class, column: predicted
    class), roc_auc (of the second of two classes; of more, the plain mean of one against rest; None
    where a class is missing), for each class precision, recall, f1 and support, and for each
    category that occurs accuracy, accuracy_interval and support; calibration_error and reliability,
    see there.
    A class that is never predicted has precision 0, as in scikit-learn with zero_division=0.
    """
    # Slow to import.
    from scipy.special import softmax
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score

    every = np.arange(len(classes))
    predicted = logits.argmax(axis=1)
    correct = np.equal(predicted, labels)
    probabilities = softmax(logits.astype(np.float64), axis=1)
    error, bins = reliability(probabilities.max(axis=1), correct)
    scores = precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0)
    auc = None
    if len(np.unique(labels)) == len(classes):
        score = probabilities[:, 1] if len(classes) == 2 else probabilities
        auc = float(roc_auc_score(labels, score, multi_class="ovr", labels=every))
    return {
        **_accuracy(correct),
        "confusion": confusion_matrix(labels, predicted, labels=every).tolist(),
        "roc_auc": auc,
        "calibration_error": error,
        "reliability": bins,
        "classes": {
            name: dict(zip(("precision", "recall", "f1", "support"), row, strict=True))
            for name, *row in zip(classes, *(each.tolist() for each in scores), strict=True)
        },
        "categories": {
            name: {**_accuracy(rows), "support": len(rows)}
            for number, name in enumerate(category_names)
            if len(rows := correct[categories == np.int32(number)])
        },
    }


def reliability(
    confidence: Float[np.ndarray, " N"], correct: Bool[np.ndarray, " N"], bins: int = 15
) -> tuple[float, list[dict[str, float]]]:
    """The expected calibration error (Guo et al. 2017), and what it is made of.

    confidence: the probability of the predicted class. Of each of so many equally wide bins that
    is not empty: its count, mean confidence and accuracy; the error is the mean distance of the
    latter two, over the answers.
    """
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    found = [
        {
            "count": int(own.sum()),
            "confidence": float(confidence[own].mean()),
            "accuracy": float(correct[own].mean()),
        }
        for own in (place == number for number in np.unique(place))
    ]
    apart = [each["count"] * abs(each["accuracy"] - each["confidence"]) for each in found]
    return sum(apart) / len(correct), found


def fit_temperature(logits: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"]) -> float:
    """What to divide logits by so that their cross-entropy is the least (Guo et al. 2017)."""
    from scipy.optimize import minimize_scalar  # slow to import
    from scipy.special import log_softmax

    def loss(log_temperature: float) -> float:
        scaled = log_softmax(logits.astype(np.float64) / np.exp(log_temperature), axis=1)
        return float(-scaled[np.arange(len(labels)), labels].mean())

    limits = -_LIMIT, _LIMIT
    inside = minimize_scalar(loss, bounds=limits, method="bounded").x
    return float(np.exp(min(*limits, inside, key=loss)))


def temperature_said(temperature: float) -> str:
    """The line for a temperature that was fitted: whether it is one, too."""
    why = ""
    if abs(np.log(temperature)) > _LIMIT - 1e-6:
        why = "they tell nothing of the validation reviews' classes"
        if temperature < 1:
            why = "all validation reviews are answered right, and say no more"
        why = f", the limit, which is no fit: {why}"
    return f"temperature: {temperature:.3f}{why}"


def _accuracy(correct: Bool[np.ndarray, " N"]) -> dict[str, Any]:
    from scipy.stats import binomtest  # slow to import

    interval = binomtest(int(correct.sum()), len(correct)).proportion_ci(0.95, method="wilson")
    return {
        "accuracy": int(correct.sum()) / len(correct),
        "accuracy_interval": [float(interval.low), float(interval.high)],
    }
