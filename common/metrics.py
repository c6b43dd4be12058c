"""Metrics of a classifier."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

MOST_DRAWN = 30
"""The number of classes up to which the confusion matrix is stored and drawn; with more classes,
the most frequent mistakes and the largest classes are."""
_MOST_MISTAKES = 1_000
MOST_SCORES = 2**23
"""Reviews times classes; above this, training stores no logits and computes no roc_auc."""
_LIMIT = 5  # bound of the absolute logarithm of a temperature


def evaluate(
    logits: Float[np.ndarray, "N C"],
    labels: Int[np.ndarray, " N"],
    classes: Sequence[str],
    categories: Int[np.ndarray, " N"] | None = None,
    category_names: Sequence[str] = (),
) -> dict[str, Any]:
    """All metrics of a test set, ready for JSON: those of evaluate_answers, and roc_auc.

    roc_auc: of the second of two classes, or else the mean of one-vs-rest over the classes; None if
    a class has no review.
    """
    from scipy.special import softmax  # slow to import
    from sklearn.metrics import roc_auc_score

    metrics = evaluate_answers(
        answers(logits, labels), labels, classes, categories=categories, names=category_names
    )
    if len(np.unique(labels)) == len(classes):
        probabilities = softmax(logits.astype(np.float64), axis=1)
        # One class at a time: multi_class="ovr" would allocate N x C labels.
        scored = range(1 if len(classes) == 2 else 0, len(classes))
        areas = [roc_auc_score(labels == i, probabilities[:, i]) for i in scored]
        metrics["roc_auc"] = float(np.mean(areas))
    return metrics


def answers(
    logits: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"]
) -> Float[np.ndarray, "N 3"]:
    """For each review: the predicted class, its probability, and the cross-entropy of the label."""
    from scipy.special import log_softmax  # slow to import

    scores, every = log_softmax(logits.astype(np.float64), axis=1), np.arange(len(labels))
    predicted = logits.argmax(axis=1)
    return np.stack([predicted, np.exp(scores[every, predicted]), -scores[every, labels]], axis=1)


def evaluate_answers(
    results: Float[np.ndarray, "N 3"],
    labels: Int[np.ndarray, " N"],
    classes: Sequence[str],
    categories: Int[np.ndarray, " N"] | None = None,
    names: Sequence[str] = (),
) -> dict[str, Any]:
    """All metrics that follow from the result of `answers`, ready for JSON; roc_auc is None.

    accuracy, accuracy_interval (95 %, Wilson 1927), confusion (row: true class, column: predicted
    class) or, for more than MOST_DRAWN classes, `mistakes`; for each class precision, recall, f1
    and support; for each category that occurs accuracy, accuracy_interval and support;
    calibration_error and reliability, see `reliability`.
    A class that is never predicted has precision 0, as in scikit-learn with zero_division=0.
    """
    # Slow to import.
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    every = np.arange(len(classes))
    predicted, confidence = results[:, 0].astype(int), results[:, 1]
    correct = np.equal(predicted, labels)
    error, bins = reliability(confidence, correct)
    scores = precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0)
    supports = scores[-1].astype(int)  # floats if no prediction is correct
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
    """The most frequent mistakes, at most 1,000: true class, predicted class, number of reviews."""
    wrong = labels != predicted
    pairs = labels[wrong].astype(np.int64) * classes + predicted[wrong]
    pair, count = np.unique(pairs, return_counts=True)
    most = np.argsort(-count, kind="stable")[:_MOST_MISTAKES]
    return np.stack([*np.divmod(pair[most], classes), count[most]], axis=1).tolist()


def reliability(
    confidence: Float[np.ndarray, " N"], correct: Bool[np.ndarray, " N"], bins: int = 15
) -> tuple[float, list[dict[str, float]]]:
    """The expected calibration error (Guo et al. 2017), and its bins.

    confidence: the probability of the predicted class. Of the equally wide bins, each non-empty one
    has a count, the mean confidence and the accuracy; the error is the mean absolute difference of
    the latter two over the reviews.
    """
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    result = [
        {
            "count": int(members.sum()),
            "confidence": float(confidence[members].mean()),
            "accuracy": float(correct[members].mean()),
        }
        for members in (bin_of == number for number in np.unique(bin_of))
    ]
    errors = [each["count"] * abs(each["accuracy"] - each["confidence"]) for each in result]
    return sum(errors) / len(correct), result


def fit_temperature(logits: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"]) -> float:
    """The divisor of the logits that minimizes their cross-entropy (Guo et al. 2017)."""
    from scipy.optimize import minimize_scalar  # slow to import
    from scipy.special import log_softmax

    def loss(log_temperature: float) -> float:
        scaled = log_softmax(logits.astype(np.float64) / np.exp(log_temperature), axis=1)
        return float(-scaled[np.arange(len(labels)), labels].mean())

    limits = -_LIMIT, _LIMIT
    minimum = minimize_scalar(loss, bounds=limits, method="bounded").x
    return float(np.exp(min(*limits, minimum, key=loss)))


def describe_temperature(temperature: float) -> str:
    """The printed line of a fitted temperature; it tells whether the fit succeeded."""
    reason = ""
    if abs(np.log(temperature)) > _LIMIT - 1e-6:
        reason = ", the limit, which is no fit: the logits do not predict the validation labels"
        if temperature < 1:
            reason = ", the limit, which is no fit: all validation reviews are classified correctly"
    return f"temperature: {temperature:.3f}{reason}"


def table(metrics: Mapping[str, Any]) -> str:
    """The result of `evaluate_answers` as lines: accuracy, its interval, macro F1, and precision,
    recall and F1 of each class or, for more than MOST_DRAWN classes, of the largest ones.

    Macro F1 is the mean over the classes that have texts.
    """
    low, high = metrics["accuracy_interval"]
    scores = metrics["classes"]
    macro = np.mean([each["f1"] for each in scores.values() if each["support"]])
    largest = sorted(scores, key=lambda name: -scores[name]["support"])[:MOST_DRAWN]
    shown = [name for name in scores if name in set(largest)]
    width = max(map(len, ["class", *shown]))
    return "\n".join(
        [
            f"Accuracy: {metrics['accuracy']:.2%}",
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
