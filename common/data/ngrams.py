"""Word n-grams and their log-count ratios.

The log-count ratio of an n-gram (Wang and Manning 2012, Baselines and Bigrams) is the logarithm of
its frequency in the texts of a class over its frequency in all others. The linear model weighs
n-grams by it, and a GRU with --ngrams reads it together with the vector of each word.

An n-gram is a number, because scikit-learn's CountVectorizer, which makes a str of every n-gram,
takes most of the time. The code of a word is its id in the vocabulary of V words; the code of a
longer n-gram is p V + i, where i is the id of its last word and p the index of the n-gram without
that word among the selected codes.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, Int64

from common.data.corpus import EncodedSplit, Texts, concatenate
from common.params import ratio_columns

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Codes = Int64[np.ndarray, " codes"]
FEWEST = 2  # texts in which a selected n-gram occurs, at least
FOLDS = 5
# Ratios are mostly between -3 and 3; the elements of word vectors have a standard deviation of 0.2.
SCALE = 0.3


@dataclass(frozen=True)
class Ratios:
    """The selected n-grams of a data set of V words, and their ratios times SCALE."""

    words: int
    """V."""
    codes: list[Codes]
    """Ascending codes: of the selected words, of the selected pairs, and so on."""
    ratios: list[Float32[np.ndarray, "codes C"]]

    def attach(self, split: EncodedSplit) -> EncodedSplit:
        """The texts, which must be contiguous, with the ratios of `read`."""
        assert np.array_equal(np.cumsum(split.lengths)[:-1], split.starts[1:])
        return dataclasses.replace(split, ratios=self.read(split))

    def read(self, texts: Texts) -> Float32[np.ndarray, "tokens E"]:
        """For each word of the concatenated texts, the ratios of the n-grams that end there.

        The ratios of one word come first, then of two words, and so on; an n-gram that is not
        selected has 0.
        """
        tokens, lengths = concatenate(texts)
        total, width = len(tokens), self.ratios[0].shape[1]
        ratios = np.zeros((total, len(self.codes), width), np.float32)
        for n, (_, _, index) in enumerate(find(tokens, lengths, self.words, self.codes)):
            begins = np.flatnonzero(index >= 0)
            ratios[begins + n, n] = self.ratios[n][index[begins]]
        return ratios.reshape(total, len(self.codes) * width)

    def problem(self) -> str:
        """Why ratios read from a file are invalid; empty if they are valid."""
        if [*map(len, self.codes)] != [*map(len, self.ratios)]:
            return "expected ratios for each code"
        return problem_of(self.codes, self.words)

    def tensors(self) -> dict[str, np.ndarray]:
        """The tensors of a file, by name."""
        named = {f"codes.{n}": each for n, each in enumerate(self.codes, 1)}
        return named | {f"ratios.{n}": each for n, each in enumerate(self.ratios, 1)}

    @classmethod
    def of(cls, words: int, tensors: Mapping[str, np.ndarray]) -> "Ratios":
        """The inverse of `tensors`."""
        orders = range(1, 1 + sum(name.startswith("codes.") for name in tensors))
        return cls(
            words, *([tensors[f"{kind}.{n}"] for n in orders] for kind in ("codes", "ratios"))
        )


def fit(split: EncodedSplit, words: int, classes: int, longest: int) -> Ratios:
    """The ratios of the n-grams of up to `longest` words in a split."""
    codes, features = matrix(split, words, longest=longest, fewest=FEWEST)
    labels = range(1, 2) if classes == 2 else range(classes)
    ratios = [SCALE * log_count_ratios(features, split.labels == label, 1) for label in labels]
    ends = np.cumsum([0, *map(len, codes)])
    stacked = np.stack(ratios, axis=1).astype(np.float32)
    return Ratios(words, codes, [stacked[start:end] for start, end in pairwise(ends)])


def read_out_of_fold(
    split: EncodedSplit, words: int, classes: int, longest: int
) -> Float32[np.ndarray, "tokens E"]:
    """As `Ratios.read`, with ratios that are fitted without the text that is read (FOLDS folds).

    The ratio of a rare n-gram would reveal the labels of the texts in which it occurs.
    """
    fold = np.random.default_rng(0).permutation(len(split)) % FOLDS
    of_token = np.repeat(fold, split.lengths)
    result = np.zeros((len(of_token), longest * ratio_columns(classes)), np.float32)
    for number in range(FOLDS):
        ratios = fit(split.take(fold != number, ""), words, classes, longest)
        result[of_token == number] = ratios.read(split.take(fold == number, ""))
    return result


def log_count_ratios(
    features: "csr_array", own: Bool[np.ndarray, " N"], smoothing: float
) -> Float[np.ndarray, " F"]:
    """The logarithm of each feature's frequency in the texts `own` over that in the others."""
    counts = [features[mask].sum(axis=0) + smoothing for mask in (own, ~own)]
    return np.subtract(*(np.log(each / each.sum()) for each in counts))


def matrix(
    texts: Texts,
    words: int,
    codes: Sequence[Codes] | None = None,
    *,
    longest: int = 0,
    fewest: int = 0,
) -> tuple[list[Codes], "csr_array"]:
    """The codes that `find` yields, and a [N, F] matrix of ones for the n-grams of each text."""
    from scipy.sparse import csr_array  # slow to import

    selected: list[Codes] = []
    rows, columns, size = [], [], 0
    orders = find(*concatenate(texts), words, codes, longest=longest, fewest=fewest)
    for of_order, text, index in orders:
        selected.append(of_order)
        rows.append(text[index >= 0])
        columns.append((size + index[index >= 0]).astype(np.int32))  # scikit-learn takes no int64
        size += len(of_order)
    entries = np.concatenate(rows), np.concatenate(columns)
    features = csr_array((np.ones(len(entries[0]), np.float32), entries), (len(texts), size))
    features.data[:] = 1  # csr_array adds up repeated entries
    return selected, features


def find(
    tokens: Int64[np.ndarray, " tokens"],
    lengths: Int32[np.ndarray, " N"],
    words: int,
    codes: Sequence[Codes] | None = None,
    *,
    longest: int = 0,
    fewest: int = 0,
) -> Iterator[tuple[Codes, Int32[np.ndarray, " tokens"], Int64[np.ndarray, " tokens"]]]:
    """For n = 1, 2 ...: the selected codes, and for each word followed by n - 1 words its text and
    the index among the codes of the n-gram that begins there, or -1.

    tokens, lengths: the texts (see `concatenate` in corpus.py).

    Selected are `codes`, by default the codes that occur in at least `fewest` texts, up to
    n = `longest`. The n-gram without its last word must be selected, too.
    """
    texts = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    index = tokens
    for n in range(1, (longest if codes is None else len(codes)) + 1):
        if n > 1:
            prefix, last = index[:-1], tokens[n - 1 :]
            text, same = texts[: len(last)], texts[: len(last)] == texts[n - 1 :]
            code = np.where((prefix >= 0) & (last >= 0) & same, prefix * words + last, -1)
        else:
            text, code = texts, tokens
        selected = _frequent(code, text, fewest) if codes is None else codes[n - 1]
        index = np.searchsorted(selected, code)
        known = index < len(selected)
        known[known] = selected[index[known]] == code[known]
        index = np.where(known, index, -1)
        yield selected, text, index


def _frequent(
    code: Int64[np.ndarray, " places"], texts: Int32[np.ndarray, " places"], fewest: int
) -> Codes:
    """The non-negative codes that occur in at least `fewest` texts."""
    code, texts = code[code >= 0], texts[code >= 0]
    order = np.argsort(code, kind="stable")  # the texts of a code stay in order
    code, texts = code[order], texts[order]
    is_first = (np.diff(code, prepend=-1) != 0) | (np.diff(texts, prepend=-1) != 0)
    distinct, count = np.unique(code[is_first], return_counts=True)
    return distinct[count >= fewest]


def problem_of(codes: Sequence[Codes], words: int) -> str:
    """Why these are no codes of n-grams of a vocabulary of `words`; empty if they are."""
    if not all((np.diff(each) > 0).all() for each in codes):
        return "expected ascending codes"
    prefixes = [1, *map(len, codes)]  # the number of possible prefixes for each n
    if any(
        len(each) and not 0 <= each[0] <= each[-1] < count * words
        for count, each in zip(prefixes, codes, strict=False)
    ):
        return "has codes of more words than vocabulary.txt has"
    return ""
