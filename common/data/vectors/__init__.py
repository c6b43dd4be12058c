"""Word vectors: read from a file, trained by word2vec on the training reviews, or random.

docs/vectors.md describes the file formats and how words of a file match the vocabulary.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file, save

from common.cache import cached
from common.data.corpus import Corpus, EncodedSplit
from common.data.vectors import files
from common.errors import InputError

WORD2VEC = dict(vector_size=300, window=10, min_count=3, sample=1e-4, alpha=0.1, epochs=10, seed=0)
# With a standard deviation of 1, a GRU learns far more slowly: 300 dimensions add up to large
# pre-activations.
STANDARD_DEVIATION = 0.2
RANDOM_MIN_COUNT = 3  # a vector learns too little from fewer occurrences
# Part of the cache key: raise it when files are read differently.
FILES_VERSION = 1


@dataclass(frozen=True)
class WordVectors:
    """matrix[i] is the vector of words[i]; trained_with_model: the matrix is a parameter."""

    words: list[str]
    matrix: Float[np.ndarray, "V D"]
    trained_with_model: bool


def check(spec: str) -> None:
    """Raise InputError for an invalid specification or a missing file."""
    name, _, dimension = spec.partition(":")
    if name == "random":
        if not dimension.isdecimal() or not 1 <= int(dimension) <= 10_000:
            raise InputError(f"--vectors {spec}: DIM must be a whole number from 1 to 10000")
    elif spec != "word2vec" and not Path(spec).is_file():
        raise InputError(f"--vectors {spec}: no such file; expected one, word2vec or random:DIM")


def load(
    spec: str,
    corpus: Corpus,
    train: EncodedSplit,
    report: Callable[[str], None],
    *,
    train_with_model: bool = False,
) -> WordVectors:
    """The vectors that `spec` selects, for words of `corpus`.

    word2vec is trained on the texts of `train` only. Random vectors are always trained with the
    model, others only if `train_with_model`. Raises InputError for an invalid spec or file.
    """
    check(spec)
    counts, vocabulary = train.counts(), corpus.vocabulary
    min_counts = {"word2vec": WORD2VEC["min_count"], "random": RANDOM_MIN_COUNT}
    if counts.max(initial=0) < (min_count := min_counts.get(spec.partition(":")[0], 0)):
        raise InputError(
            f"--vectors {spec}: no word occurs {min_count} times in the "
            f"{len(train)} training reviews of {corpus.name}"
        )
    if spec.startswith("random:"):
        words = [vocabulary[i] for i in np.flatnonzero(counts >= RANDOM_MIN_COUNT)]
        shape = (len(words), int(spec.partition(":")[2]))
        matrix = np.random.default_rng(0).standard_normal(shape, np.float32) * STANDARD_DEVIATION
        return WordVectors(words, matrix, trained_with_model=True)
    if spec == "word2vec":
        words, matrix = _word2vec(vocabulary, train, report)
    else:
        words, matrix = _from_file(Path(spec), vocabulary, report)
        known = set(words)
        tokens = counts[[word in known for word in vocabulary]].sum() / max(counts.sum(), 1)
        report(
            f"{spec}: vectors for {len(words):,} of the {len(vocabulary):,} words of {corpus.name} "
            f"({len(words) / len(vocabulary):.1%}), {tokens:.1%} of the training tokens"
        )
    return WordVectors(words, matrix, train_with_model)


Vectors = tuple[list[str], Float[np.ndarray, "V D"]]


def _from_file(path: Path, vocabulary: list[str], report: Callable[[str], None]) -> Vectors:
    def make() -> Vectors:
        report(f"reading {path} (once; then cached)")
        return files.read(path, vocabulary)

    key = {
        "path": str(path.resolve()),
        "files": files.dependencies(path),
        "vocabulary": hashlib.sha256("\n".join(vocabulary).encode()).hexdigest(),
        "version": FILES_VERSION,
    }
    return _cached("vectors", key, make)


def _word2vec(vocabulary: list[str], train: EncodedSplit, report: Callable[[str], None]) -> Vectors:
    class Sentences:
        def __iter__(self) -> Iterator[list[str]]:
            for text in range(len(train)):
                yield [vocabulary[token] for token in train[text].tolist()]

    def fit() -> Vectors:
        from gensim.models import Word2Vec  # slow to import

        report(f"training word2vec on {len(train):,} reviews (once; then cached)")
        # More than one worker would make the order of the updates, and the vectors, vary.
        vectors = Word2Vec(Sentences(), workers=1, **WORD2VEC).wv
        matrix = vectors.vectors * (STANDARD_DEVIATION / vectors.vectors.std())
        return vectors.index_to_key, matrix.astype(np.float32)

    return _cached("word2vec", {**WORD2VEC, "std": STANDARD_DEVIATION, "texts": train.name}, fit)


def _cached(kind: str, key: Mapping[str, object], make: Callable[[], Vectors]) -> Vectors:
    def build(folder: Path) -> None:
        words, matrix = make()
        (folder / "vectors.safetensors").write_bytes(save({"vectors": matrix}))
        lines = "".join(f"{word}\n" for word in words)
        (folder / "vocabulary.txt").write_text(lines, encoding="utf-8")

    folder = cached(kind, key, build)
    words = (folder / "vocabulary.txt").read_text(encoding="utf-8").split("\n")[:-1]
    return words, load_file(folder / "vectors.safetensors")["vectors"]
