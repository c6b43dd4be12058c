"""Word vectors: word2vec trained on the training reviews, or random ones to be trained."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file, save_file

from common.cache import cached
from common.corpus import Corpus, EncodedSplit
from common.errors import InputError

WORD2VEC = {
    "vector_size": 300,
    "window": 10,
    "min_count": 3,
    "sample": 1e-4,
    "alpha": 0.1,
    "epochs": 10,
    "seed": 0,
}
# With unit vectors a GRU learns far slower: 300 of them add up to large pre-activations.
STANDARD_DEVIATION = 0.2
RANDOM_MIN_COUNT = 3  # a word seen less often than this teaches its vector nothing


@dataclass(frozen=True)
class WordVectors:
    """matrix[i] is the vector of words[i]; `trained_with_model` says whether it is a parameter."""

    words: list[str]
    matrix: Float[np.ndarray, "V D"]
    trained_with_model: bool


def check(spec: str) -> None:
    """Raise InputError unless load could read this specification."""
    name, _, dimension = spec.partition(":")
    if spec == "word2vec":
        return
    if name != "random":
        raise InputError(f"--vectors {spec}: no such vectors; expected word2vec or random:DIM")
    if not dimension.isdecimal() or not 1 <= int(dimension) <= 10_000:
        raise InputError(f"--vectors {spec}: DIM must be a whole number from 1 to 10000")


def load(
    spec: str, corpus: Corpus, train: EncodedSplit, report: Callable[[str], None]
) -> WordVectors:
    """The vectors that `spec` asks for, for words of `corpus`, scaled to one standard deviation.

    Word2vec is trained on the texts of `train` alone. Raises InputError for an unknown spec.
    """
    check(spec)
    counts = train.counts()
    if spec.startswith("random:"):
        words = [corpus.vocabulary[i] for i in np.flatnonzero(counts >= RANDOM_MIN_COUNT)]
        shape = (len(words), int(spec.partition(":")[2]))
        matrix = np.random.default_rng(0).standard_normal(shape, np.float32) * STANDARD_DEVIATION
        return WordVectors(words, matrix, trained_with_model=True)
    if counts.max(initial=0) < WORD2VEC["min_count"]:
        raise InputError(
            f"--vectors word2vec: no word occurs {WORD2VEC['min_count']} times in the "
            f"{len(train)} training reviews of {corpus.name}"
        )
    folder = _word2vec(corpus, train, report)
    words = (folder / "vocabulary.txt").read_text(encoding="utf-8").split("\n")[:-1]
    return WordVectors(words, load_file(folder / "vectors.safetensors")["vectors"], False)


def _word2vec(corpus: Corpus, train: EncodedSplit, report: Callable[[str], None]) -> Path:
    class Sentences:
        def __iter__(self) -> Iterator[list[str]]:
            for text in range(len(train)):
                yield [corpus.vocabulary[token] for token in train[text].tolist()]

    def build(folder: Path) -> None:
        from gensim.models import Word2Vec  # slow to import

        report(f"training word2vec on {len(train):,} reviews (once; then cached)")
        # One worker: with more, the order of the updates and so the vectors would vary.
        vectors = Word2Vec(Sentences(), workers=1, **WORD2VEC).wv
        matrix = vectors.vectors * (STANDARD_DEVIATION / vectors.vectors.std())
        save_file({"vectors": matrix.astype(np.float32)}, folder / "vectors.safetensors")
        lines = "".join(f"{word}\n" for word in vectors.index_to_key)
        (folder / "vocabulary.txt").write_text(lines, encoding="utf-8")

    return cached("word2vec", {**WORD2VEC, "std": STANDARD_DEVIATION, "texts": train.name}, build)
