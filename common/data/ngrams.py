"""Word n-grams, and how much each speaks for a class: their log-count ratios.

Wang and Manning (2012), Baselines and Bigrams: an n-gram counts as much as the logarithm of how
much more frequent it is in the texts of a class than in all others. Here they are what the linear
model weighs, and what a GRU with --ngrams reads beside the vector of each word.

scikit-learn's CountVectorizer makes a str of every n-gram, which takes longer than all else here;
so n-grams are numbers: a word is its id in the vocabulary, V words long; a longer n-gram has the
code p V + i, where i is its last word and p the place of what comes before among those that count.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, Int64

from common.data.corpus import EncodedSplit
from common.params import ratio_columns

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Codes = Int64[np.ndarray, " codes"]
FEWEST = 2  # texts that have an n-gram, at least
FOLDS = 5
# Ratios are mostly between -3 and 3; the elements of word vectors have a standard deviation of 0.2.
SCALE = 0.3


@dataclass(frozen=True)
class Ratios:
    """The n-grams of a data set of V words, and their ratios, scaled."""

    words: int
    """V."""
    codes: list[Codes]
    """Those of the words that count, of the pairs of them, and so on; ascending."""
    ratios: list[Float32[np.ndarray, "codes C"]]

    def beside(self, split: EncodedSplit) -> EncodedSplit:
        """The texts, which lie end to end, each word with what `read` says."""
        assert np.array_equal(np.cumsum(split.lengths)[:-1], split.starts[1:])
        return dataclasses.replace(split, ratios=self.read(split))

    def read(self, split: EncodedSplit) -> Float32[np.ndarray, "tokens E"]:
        """At each word of the texts, one after the other: the ratios of the n-grams that end there.

        First those of one word, then of two, and so on; zero for an n-gram that does not count.
        """
        total, width = int(split.lengths.sum()), self.ratios[0].shape[1]
        found = np.zeros((total, len(self.codes), width), np.float32)
        for n, (_, _, place) in enumerate(find(split, self.words, self.codes)):
            begins = np.flatnonzero(place >= 0)
            found[begins + n, n] = self.ratios[n][place[begins]]
        return found.reshape(total, len(self.codes) * width)

    def problem(self) -> str:
        """What is wrong with numbers from a file, if something is."""
        if [*map(len, self.codes)] != [*map(len, self.ratios)]:
            return "expected ratios for each code"
        return problem_of(self.codes, self.words)

    def tensors(self) -> dict[str, np.ndarray]:
        """By the names that they have in a file."""
        named = {f"codes.{n}": each for n, each in enumerate(self.codes, 1)}
        return named | {f"ratios.{n}": each for n, each in enumerate(self.ratios, 1)}

    @classmethod
    def of(cls, words: int, tensors: Mapping[str, np.ndarray]) -> "Ratios":
        """From what `tensors` once returned."""
        orders = range(1, 1 + sum(name.startswith("codes.") for name in tensors))
        return cls(
            words, *([tensors[f"{what}.{n}"] for n in orders] for what in ("codes", "ratios"))
        )


def fit(split: EncodedSplit, words: int, classes: int, longest: int) -> Ratios:
    """Of the n-grams of up to `longest` words in the texts of a split."""
    codes, features = matrix(split, words, longest=longest, fewest=FEWEST)
    labels = range(1, 2) if classes == 2 else range(classes)
    found = [SCALE * log_count_ratios(features, split.labels == label, 1) for label in labels]
    ends = np.cumsum([0, *map(len, codes)])
    stacked = np.stack(found, axis=1).astype(np.float32)
    return Ratios(words, codes, [stacked[start:end] for start, end in pairwise(ends)])


def read_out_of_fold(
    split: EncodedSplit, words: int, classes: int, longest: int
) -> Float32[np.ndarray, "tokens E"]:
    """What `Ratios.read` returns, but for each text by ratios in which that text has no part.

    Those of an n-gram that only few texts have would give away these texts' own labels.
    """
    fold = np.random.default_rng(0).permutation(len(split)) % FOLDS
    of_token = np.repeat(fold, split.lengths)
    found = np.zeros((len(of_token), longest * ratio_columns(classes)), np.float32)
    for number in range(FOLDS):
        ratios = fit(split.take(fold != number, ""), words, classes, longest)
        found[of_token == number] = ratios.read(split.take(fold == number, ""))
    return found


def log_count_ratios(
    features: "csr_array", own: Bool[np.ndarray, " N"], smoothing: float
) -> Float[np.ndarray, " F"]:
    """How much more frequent each feature is in the texts that are `own` than in the others."""
    counts = [features[of].sum(axis=0) + smoothing for of in (own, ~own)]
    return np.subtract(*(np.log(each / each.sum()) for each in counts))


def matrix(
    split: EncodedSplit,
    words: int,
    codes: Sequence[Codes] | None = None,
    *,
    longest: int = 0,
    fewest: int = 0,
) -> tuple[list[Codes], "csr_array"]:
    """Which n-grams the texts have, ones in [N, F]: see `find`."""
    from scipy.sparse import csr_array  # slow to import

    found: list[Codes] = []
    rows, numbers, size = [], [], 0
    for each, texts, place in find(split, words, codes, longest=longest, fewest=fewest):
        found.append(each)
        rows.append(texts[place >= 0])
        numbers.append((size + place[place >= 0]).astype(np.int32))  # scikit-learn takes no int64
        size += len(each)
    where = np.concatenate(rows), np.concatenate(numbers)
    features = csr_array((np.ones(len(where[0]), np.float32), where), (len(split), size))
    features.data[:] = 1  # however often a text has it
    return found, features


def find(
    split: EncodedSplit,
    words: int,
    codes: Sequence[Codes] | None = None,
    *,
    longest: int = 0,
    fewest: int = 0,
) -> Iterator[tuple[Codes, Int32[np.ndarray, " tokens"], Int64[np.ndarray, " tokens"]]]:
    """For n = 1, 2 ...: the codes of n-grams, and for each word with n - 1 after it, its text and
    the place among them of the n-gram that begins there, or -1.

    The codes are those given; without, those that `fewest` texts have, up to n = `longest`. An
    n-gram counts where its first words do, too.
    """
    tokens = np.concatenate([np.zeros(0, np.int64), *(tokens for _, tokens in split.blocks())])
    texts = np.repeat(np.arange(len(split), dtype=np.int32), split.lengths)
    place = tokens  # of what begins at each word
    for n in range(1, (longest if codes is None else len(codes)) + 1):
        if n > 1:
            before, last = place[:-1], tokens[n - 1 :]
            of, same = texts[: len(last)], texts[: len(last)] == texts[n - 1 :]
            code = np.where((before >= 0) & (last >= 0) & same, before * words + last, -1)
        else:
            of, code = texts, tokens
        found = _frequent(code, of, fewest) if codes is None else codes[n - 1]
        place = np.searchsorted(found, code)
        known = place < len(found)
        known[known] = found[place[known]] == code[known]
        place = np.where(known, place, -1)
        yield found, of, place


def _frequent(
    code: Int64[np.ndarray, " places"], texts: Int32[np.ndarray, " places"], fewest: int
) -> Codes:
    """The codes, but for those below 0, that at least so many texts have."""
    code, texts = code[code >= 0], texts[code >= 0]
    order = np.argsort(code, kind="stable")  # so a code's texts come in their order
    code, texts = code[order], texts[order]
    another = (np.diff(code, prepend=-1) != 0) | (np.diff(texts, prepend=-1) != 0)
    found, count = np.unique(code[another], return_counts=True)
    return found[count >= fewest]


def problem_of(codes: Sequence[Codes], words: int) -> str:
    """Why these cannot be the codes of n-grams of so many words, if they cannot."""
    if not all((np.diff(each) > 0).all() for each in codes):
        return "expected ascending codes"
    before = [1, *map(len, codes)]  # places that what comes before the last word can have
    if any(
        len(each) and not 0 <= each[0] <= each[-1] < places * words
        for places, each in zip(before, codes, strict=False)
    ):
        return "has codes of more words than vocabulary.txt has"
    return ""
