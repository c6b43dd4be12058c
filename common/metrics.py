"""How good a classifier's answers are."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int


def evaluate(
    logits: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"], classes: Sequence[str]
) -> dict[str, Any]:
    """All metrics of a test set, ready for JSON.

    accuracy, accuracy_interval (95 %, Wilson 1927), confusion (row: true class, column: predicted
    class), roc_auc (of the second of two classes; of more, the plain mean of one against rest; None
    where a class is missing) and, for each class, precision, recall, f1 and support.
    A class that is never predicted has precision 0, as in scikit-learn with zero_division=0.
    """
    # Slow to import.
    from scipy.special import softmax
    from scipy.stats import binomtest
    from sklearn.metrics import (
        confusion_matrix,
        precision_recall_fscore_support,
        roc_auc_score,
    )

    every = np.arange(len(classes))
    predicted = logits.argmax(axis=1)
    correct = int((predicted == labels).sum())
    interval = binomtest(correct, len(labels)).proportion_ci(0.95, method="wilson")
    scores = precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0)
    auc = None
    if len(np.unique(labels)) == len(classes):
        probabilities = softmax(logits.astype(np.float64), axis=1)
        score = probabilities[:, 1] if len(classes) == 2 else probabilities
        auc = float(roc_auc_score(labels, score, multi_class="ovr", labels=every))
    return {
        "accuracy": correct / len(labels),
        "accuracy_interval": [float(interval.low), float(interval.high)],
        "confusion": confusion_matrix(labels, predicted, labels=every).tolist(),
        "roc_auc": auc,
        "classes": {
            name: {
                "precision": float(precision),
                "recall": float(recall),
                "f1": float(f1),
                "support": int(support),
            }
            for name, precision, recall, f1, support in zip(classes, *scores, strict=True)
        },
    }
