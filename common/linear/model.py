"""NB-SVM: a linear support vector machine whose features are the word n-grams of a text.

Wang and Manning (2012), Baselines and Bigrams: the value of each n-gram is its log-count ratio
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
    """The classifier. With two classes, it has weights only for the second; with more, for each."""

    words: int
    """V."""
    codes: list[Codes]
    """The codes of the known words, of the known pairs of words, and so on; ascending."""
    weight: Float32[np.ndarray, "R F"]
    """The weight of each n-gram, in the order of the codes."""
    bias: Float32[np.ndarray, " R"]

    def logits(self, texts: Texts) -> Float[np.ndarray, "N C"]:
        """A number for each class of each text; the differences are the margins of the machine.

        An unknown word has the id -1.
        """
        _, features = matrix(texts, self.words, self.codes)
        margins = features @ self.weight.T + self.bias
        return margins if len(self.bias) > 1 else np.pad(margins, ((0, 0), (1, 0)))

    def contributions(self, text: Int[np.ndarray, " T"]) -> Float[np.ndarray, "T R"]:
        """At each word of one text, the sum of the weights of the n-grams that end there.

        An n-gram counts once per text, so its weight is divided among its occurrences. The sum over
        the words and the bias is the margin.
        """
        sums, start = np.zeros((len(text), len(self.bias))), 0
        flat = concatenate([text])
        for n, (codes, _, place) in enumerate(find(*flat, self.words, self.codes)):
            begins = np.flatnonzero(place >= 0)
            ngrams, which, count = np.unique(place[begins], return_inverse=True, return_counts=True)
            sums[begins + n] += (self.weight.T[start + ngrams] / count[:, None])[which]
            start += len(codes)
        return sums


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

    longest: the largest number of words of an n-gram. fewest: the smallest number of texts with an
    n-gram. smoothing: added to each count. c: the cost of a misclassified text.

    Raises InputError if a class has no text or no n-gram is frequent enough.
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
