"""NB-SVM: a support vector machine on which word n-grams a text has.

Wang and Manning (2012), Baselines and Bigrams: each n-gram counts as much as the logarithm of how
much more frequent it is in the texts of a class than in all others. scikit-learn fits the machine.
Its CountVectorizer makes a str of every n-gram, which takes longer than all else here; so n-grams
are numbers: a word is its id in the vocabulary, V words long; a longer n-gram has the code
p V + i, where i is its last word and p the place of what comes before among the codes that count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Float32, Int64

from common.data.corpus import EncodedSplit
from common.errors import InputError

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Codes = Int64[np.ndarray, " codes"]


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

    def logits(self, split: EncodedSplit) -> Float[np.ndarray, "N C"]:
        """A number for each class of each text; its differences are the machine's margins.

        A word that the classifier does not know is -1.
        """
        _, features = ngrams(split, self.words, self.codes)
        margins = features @ self.weight.T + self.bias
        return margins if len(self.bias) > 1 else np.pad(margins, ((0, 0), (1, 0)))


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
    codes, features = ngrams(split, words, longest=longest, fewest=fewest)
    if not features.shape[1]:
        raise InputError(f"no word stands in {fewest:,} of {len(split):,} texts to train on")
    weights, biases = [], []
    for number in range(1 if len(classes) == 2 else 0, len(classes)):
        own = split.labels == number
        counts = [features[of].sum(axis=0) + smoothing for of in (own, ~own)]
        ratio = np.subtract(*(np.log(each / each.sum()) for each in counts))
        data = ratio[features.indices]
        weighted = csr_array((data, features.indices, features.indptr), features.shape)
        machine = LinearSVC(C=c, random_state=0).fit(weighted, own)
        weights.append(machine.coef_[0] * ratio)
        biases.append(machine.intercept_[0])
    return Linear(words, codes, np.array(weights, np.float32), np.array(biases, np.float32))


def ngrams(
    split: EncodedSplit,
    words: int,
    codes: Sequence[Codes] | None = None,
    *,
    longest: int = 0,
    fewest: int = 0,
) -> tuple[list[Codes], "csr_array"]:
    """Which n-grams the texts have, ones in [N, F]: those of the codes, or of the codes found.

    An n-gram that `fewest` texts have is found among those whose first words are one, too.
    """
    from scipy.sparse import csr_array  # slow to import

    tokens = np.concatenate([np.zeros(0, np.int64), *(tokens for _, tokens in split.blocks())])
    texts = np.repeat(np.arange(len(split), dtype=np.int32), split.lengths)
    place = tokens  # of what begins at each word
    found: list[Codes] = []
    rows, columns, size = [], [], 0
    for n in range(1, (longest if codes is None else len(codes)) + 1):
        if n > 1:
            before, last = place[:-1], tokens[n - 1 :]
            of, same = texts[: len(last)], texts[: len(last)] == texts[n - 1 :]
            code = np.where((before >= 0) & (last >= 0) & same, before * words + last, -1)
        else:
            of, code = texts, tokens
        found.append(_frequent(code, of, fewest) if codes is None else codes[n - 1])
        place = np.searchsorted(found[-1], code)
        known = np.append(found[-1], -1)[place] == code
        place = np.where(known & (code >= 0), place, -1)
        rows.append(of[place >= 0])
        columns.append((size + place[place >= 0]).astype(np.int32))  # scikit-learn takes no int64
        size += len(found[-1])
    where = np.concatenate(rows), np.concatenate(columns)
    features = csr_array((np.ones(len(where[0]), np.float32), where), (len(split), size))
    features.data[:] = 1  # however often a text has it
    return found, features


def _frequent(
    code: Int64[np.ndarray, " places"], texts: Int64[np.ndarray, " places"], fewest: int
) -> Codes:
    """The codes, but for those below 0, that at least so many texts have."""
    code, texts = code[code >= 0], texts[code >= 0]
    order = np.argsort(code, kind="stable")  # so a code's texts come in their order
    code, texts = code[order], texts[order]
    another = (np.diff(code, prepend=-1) != 0) | (np.diff(texts, prepend=-1) != 0)
    found, count = np.unique(code[another], return_counts=True)
    return found[count >= fewest]
