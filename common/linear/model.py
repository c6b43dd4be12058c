"""NB-SVM: a support vector machine on which word n-grams a text has.

Wang and Manning (2012), Baselines and Bigrams: each n-gram counts as much as its log-count ratio
(common/data/ngrams.py). scikit-learn fits the machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int

from common.data.corpus import EncodedSplit, Texts, concatenate
from common.data.ngrams import Codes, find, log_count_ratios, matrix
from common.errors import InputError


@dataclass(frozen=True)
class Linear:
    """The classifier. Of two classes, it has weights for the second alone; of more, for each."""

    words: int
    """V."""
    codes: list[Codes]
    """Those of the words that count, of the pairs of them, and so on; ascending."""
    weight: Float32[np.ndarray, "R F"]
    """Of each n-gram, in the order of the codes."""
    bias: Float32[np.ndarray, " R"]

    def logits(self, texts: Texts) -> Float[np.ndarray, "N C"]:
        """A number for each class of each text; its differences are the machine's margins.

        A word that the classifier does not know is -1.
        """
        _, features = matrix(texts, self.words, self.codes)
        margins = features @ self.weight.T + self.bias
        return margins if len(self.bias) > 1 else np.pad(margins, ((0, 0), (1, 0)))

    def contributions(self, text: Int[np.ndarray, " T"]) -> Float[np.ndarray, "T R"]:
        """At each word of one text, the sum of the weights of the n-grams that end there.

        An n-gram counts once a text, so its weight is shared by the places where the text has it.
        With the bias, the sum over the words is the margin.
        """
        found, start = np.zeros((len(text), len(self.bias))), 0
        flat = concatenate([text])
        for n, (codes, _, place) in enumerate(find(*flat, self.words, self.codes)):
            begins = np.flatnonzero(place >= 0)
            ngrams, which, count = np.unique(place[begins], return_inverse=True, return_counts=True)
            found[begins + n] += (self.weight.T[start + ngrams] / count[:, None])[which]
            start += len(codes)
        return found


def fit(
    split: EncodedSplit,
    words: int,
    classes: Sequence[str],
    *,
    longest: int,
    fewest: int,
    smoothing: float,
    c: float,
) -> Linear:
    """Train on the texts of a split.

    longest: words of an n-gram, at most. fewest: texts that have an n-gram, at least. smoothing:
    added to each count. c: what a text on the wrong side costs.

    Raises InputError where a class has no text, or no n-gram counts.
    """
    from scipy.sparse import csr_array  # slow to import
    from sklearn.svm import LinearSVC

    for number, name in enumerate(classes):
        if not (split.labels == number).any():
            raise InputError(f"class {name}: none of {len(split):,} texts to train on is of it")
    codes, features = matrix(split, words, longest=longest, fewest=fewest)
    if not features.shape[1]:
        raise InputError(f"no word stands in {fewest:,} of {len(split):,} texts to train on")
    weights, biases = [], []
    for number in range(1 if len(classes) == 2 else 0, len(classes)):
        own = split.labels == number
        ratio = log_count_ratios(features, own, smoothing)
        data = ratio[features.indices]
        weighted = csr_array((data, features.indices, features.indptr), features.shape)
        machine = LinearSVC(C=c, random_state=0).fit(weighted, own)
        weights.append(machine.coef_[0] * ratio)
        biases.append(machine.intercept_[0])
    return Linear(words, codes, np.array(weights, np.float32), np.array(biases, np.float32))
