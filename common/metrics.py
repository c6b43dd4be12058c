"""How good a classifier's answers are."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

MOST_DRAWN = 30
"""Of up to so many classes the confusion matrix is stored and drawn; of more, the most frequent
mistakes and the largest classes."""
_MOST_MISTAKES = 1_000
MOST_SCORES = 2**23
"""Reviews times classes; of more, training stores no logits and computes no roc_auc."""
_LIMIT = 5  # of a temperature's logarithm


def evaluate(
    logits: Float[np.ndarray, "N C"],
    labels: Int[np.ndarray, " N"],
    classes: Sequence[str],
    categories: Int[np.ndarray, " N"] | None = None,
    category_names: Sequence[str] = (),
) -> dict[str, Any]:
    """All metrics of a test set, ready for JSON: those of evaluate_answers, and roc_auc.

    roc_auc: of the second of two classes; of more, the plain mean of one against rest; None where a
    class is missing.
    """
    from scipy.special import softmax  # slow to import
    from sklearn.metrics import roc_auc_score

    found = evaluate_answers(
        answers(logits, labels), labels, classes, categories=categories, names=category_names
    )
    if len(np.unique(labels)) == len(classes):
        probabilities = softmax(logits.astype(np.float64), axis=1)
        # One class at a time: multi_class="ovr" would allocate N x C labels.
        ones = range(1 if len(classes) == 2 else 0, len(classes))
        areas = [roc_auc_score(labels == one, probabilities[:, one]) for one in ones]
        found["roc_auc"] = float(np.mean(areas))
    return found


def answers(
    logits: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"]
) -> Float[np.ndarray, "N 3"]:
    """Of each review the predicted class, its probability and the cross-entropy of its label."""
    from scipy.special import log_softmax  # slow to import

    scores, every = log_softmax(logits.astype(np.float64), axis=1), np.arange(len(labels))
    predicted = logits.argmax(axis=1)
    return np.stack([predicted, np.exp(scores[every, predicted]), -scores[every, labels]], axis=1)


def evaluate_answers(
    found: Float[np.ndarray, "N 3"],
    labels: Int[np.ndarray, " N"],
    classes: Sequence[str],
    categories: Int[np.ndarray, " N"] | None = None,
    names: Sequence[str] = (),
) -> dict[str, Any]:
    """All metrics that need no more of a test set than its answers, ready for JSON; roc_auc: None.

    accuracy, accuracy_interval (95 %, Wilson 1927), confusion (row: true class, column: predicted
    class) or, of more than MOST_DRAWN classes, mistakes (see there), for each class precision,
    recall, f1 and support, and for each category that occurs accuracy, accuracy_interval and
    support; calibration_error and reliability, see there.
    A class that is never predicted has precision 0, as in scikit-learn with zero_division=0.
    """
    # Slow to import.
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    every = np.arange(len(classes))
    predicted, confidence = found[:, 0].astype(int), found[:, 1]
    correct = np.equal(predicted, labels)
    error, bins = reliability(confidence, correct)
    scores = precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0)
    supports = scores[-1].astype(int)  # of floats where no answer is right
    if len(classes) > MOST_DRAWN:
        confused: dict[str, Any] = {"mistakes": mistakes(labels, predicted, len(classes))}
    else:
        confused = {"confusion": confusion_matrix(labels, predicted, labels=every).tolist()}
    return {
        **_accuracy(correct),
        **confused,
        "roc_auc": None,
        "calibration_error": error,
        "reliability": bins,
        "classes": {
            name: dict(zip(("precision", "recall", "f1", "support"), row, strict=True))
            for name, *row in zip(
                classes, *(each.tolist() for each in (*scores[:-1], supports)), strict=True
            )
        },
        "categories": {
            name: {**_accuracy(rows), "support": len(rows)}
            for number, name in enumerate(names)
            if len(rows := correct[categories == np.int32(number)])
        },
    }


def mistakes(
    labels: Int[np.ndarray, " N"], predicted: Int[np.ndarray, " N"], classes: int
) -> list[list[int]]:
    """The most frequent mistakes, at most 1,000: true class, predicted class, how many reviews."""
    wrong = labels != predicted
    pairs = labels[wrong].astype(np.int64) * classes + predicted[wrong]
    pair, count = np.unique(pairs, return_counts=True)
    most = np.argsort(-count, kind="stable")[:_MOST_MISTAKES]
    return np.stack([*np.divmod(pair[most], classes), count[most]], axis=1).tolist()


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


def table(evaluated: Mapping[str, Any]) -> str:
    """What `evaluate_answers` returned, as lines: accuracy, its interval, macro F1, and precision,
    recall and F1 of each class or, of more than MOST_DRAWN classes, of the largest ones."""
    low, high = evaluated["accuracy_interval"]
    scores = evaluated["classes"]
    macro = np.mean([each["f1"] for each in scores.values()])
    largest = sorted(scores, key=lambda name: -scores[name]["support"])[:MOST_DRAWN]
    shown = [name for name in scores if name in set(largest)]
    width = max(map(len, ["class", *shown]))
    return "\n".join(
        [
            f"Accuracy: {evaluated['accuracy']:.2%}",
            f"95 % interval: {low:.2%} to {high:.2%}   macro F1: {macro:.2%}",
            f"{'class':{width}}  precision   recall       F1  texts",
            *(
                f"{name:{width}}  {each['precision']:9.2%}  {each['recall']:7.2%}  "
                f"{each['f1']:7.2%}  {each['support']:5,}"
                for name, each in ((name, scores[name]) for name in shown)
            ),
        ]
    )


def _accuracy(correct: Bool[np.ndarray, " N"]) -> dict[str, Any]:
    from scipy.stats import binomtest  # slow to import

    interval = binomtest(int(correct.sum()), len(correct)).proportion_ci(0.95, method="wilson")
    return {
        "accuracy": int(correct.sum()) / len(correct),
        "accuracy_interval": [float(interval.low), float(interval.high)],
    }
