"""How good a classifier's answers are."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int


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
    category that occurs accuracy, accuracy_interval and support.
    A class that is never predicted has precision 0, as in scikit-learn with zero_division=0.
    """
    # Slow to import.
    from scipy.special import softmax
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score

    every = np.arange(len(classes))
    predicted = logits.argmax(axis=1)
    correct = np.equal(predicted, labels)
    scores = precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0)
    auc = None
    if len(np.unique(labels)) == len(classes):
        probabilities = softmax(logits.astype(np.float64), axis=1)
        score = probabilities[:, 1] if len(classes) == 2 else probabilities
        auc = float(roc_auc_score(labels, score, multi_class="ovr", labels=every))
    return {
        **_accuracy(correct),
        "confusion": confusion_matrix(labels, predicted, labels=every).tolist(),
        "roc_auc": auc,
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


def _accuracy(correct: Bool[np.ndarray, " N"]) -> dict[str, Any]:
    from scipy.stats import binomtest  # slow to import

    interval = binomtest(int(correct.sum()), len(correct)).proportion_ci(0.95, method="wilson")
    return {
        "accuracy": int(correct.sum()) / len(correct),
        "accuracy_interval": [float(interval.low), float(interval.high)],
    }
