"""The data of a run: the data set and the word vectors that its options name, as batches."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from common import files
from common.cache import cached, in_blocks, map_file
from common.data import corpus, ngrams, sources, vectors
from common.data.batches import Batches
from common.data.corpus import LAYOUT_VERSION, EncodedSplit
from common.data.ngrams import Ratios
from common.errors import InputError
from common.params import ratio_columns
from common.training.options import DataConfig, TrainConfig

TRAIN = "train.float32"
EXAMPLE, EXAMPLE_CHARACTERS = 20, 500


@dataclass(frozen=True)
class Data:
    """The data of a run."""

    name: str
    classes: tuple[str, ...]
    categories: tuple[str, ...]
    vectors: vectors.WordVectors
    train: Batches
    test: Batches
    validation: Batches | None = None
    ratios: Ratios | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    example: str = ""


def load_data(options: TrainConfig, report: Callable[[str], None]) -> Data:
    """The data set and word vectors that the options name, as batches, divided into --shares.

    report: is called with a line of text before work that takes seconds. Raises InputError.
    """
    texts, train, test, validation = load_texts(options, report)
    example_text = example(texts.vocabulary, train, test)
    word_vectors = vectors.load(
        options.vectors, texts, train, report, train_with_model=options.train_vectors
    )
    ids = {word: number for number, word in enumerate(word_vectors.words)}
    new_ids = np.array([ids.get(word, -1) for word in texts.vocabulary], np.int32)
    train, test, validation = (split.renumber(new_ids) for split in (train, test, validation))
    ratios = None
    if options.ngrams:
        size = len(word_vectors.words), len(texts.classes), options.ngrams
        ratios, train = _with_ratios(train, size, report)
        test, validation = ratios.attach(test), ratios.attach(validation)
    batches = partial(Batches, max_length=options.max_length, ngrams=options.ngrams)
    longest = int(max(split.lengths.max(initial=0) for split in (test, validation)))
    shares = options.shares or 1
    to_train = batches(
        train, batch_size=options.batch_size, shares=shares, seed=options.seed, longest=longest
    )
    in_order = partial(batches, batch_size=to_train.rows, in_order=True, shapes=to_train.shapes)
    held_out = in_order(validation) if options.validation_size else None
    names = texts.name, texts.classes, texts.categories
    splits = to_train, in_order(test), held_out
    return Data(*names, word_vectors, *splits, ratios, texts.left_out, example_text)


def example(vocabulary: Sequence[str], train: EncodedSplit, test: EncodedSplit) -> str:
    """The words of the test text (without test texts, training text) of the length closest to
    EXAMPLE words, or their first EXAMPLE_CHARACTERS."""
    split = test if len(test) else train
    closest = int(np.abs(split.lengths.astype(np.int64) - EXAMPLE).argmin())
    return " ".join(vocabulary[word] for word in split[closest])[:EXAMPLE_CHARACTERS]


def _with_ratios(
    train: EncodedSplit, size: tuple[int, int, int], report: Callable[[str], None]
) -> tuple[Ratios, EncodedSplit]:
    """The log-count ratios of n-grams, and the training reviews with their out-of-fold ratios.

    size: the numbers of words and classes, and the largest order of n-grams. The result is cached.
    """

    def build(folder: Path) -> None:
        report(f"counting the n-grams of {len(train):,} reviews; the result is cached")
        tensors = ngrams.fit(train, *size).tensors()
        (folder / "ratios.safetensors").write_bytes(files.to_tensors(tensors))
        (folder / TRAIN).write_bytes(ngrams.read_out_of_fold(train, *size).data)

    constants = {"fewest": ngrams.FEWEST, "folds": ngrams.FOLDS, "scale": ngrams.SCALE}
    key = {"texts": train.name, "size": size, "layout": LAYOUT_VERSION, **constants}
    folder = cached("ratios", key, build, (TRAIN,))
    ratios = Ratios.of(size[0], load_file(folder / "ratios.safetensors"))
    width = size[2] * ratio_columns(size[1])
    of_train = map_file(folder / TRAIN, np.float32)
    large = train.large + in_blocks(folder / TRAIN, of_train, width)
    return ratios, replace(train, ratios=of_train.reshape(-1, width), large=large)


def load_texts(
    options: DataConfig, report: Callable[[str], None]
) -> tuple[corpus.Corpus, EncodedSplit, EncodedSplit, EncodedSplit]:
    """The data set, and its training, test and validation splits. Raises InputError.

    report: is also called if the options leave reviews out.
    """
    texts = corpus.load(options.data, report, options.skip_bad_rows)
    if unprintable := [name for name in texts.classes if not name.isprintable()]:
        problem = f"the class {unprintable[0]!r} has a character that cannot be printed"
        raise InputError(f"--data {options.data}: {problem}")
    train, test = texts.train.subset(options.train_size), texts.test.subset(options.test_size)
    if less := [
        f"{len(part):,} of {len(whole):,} reviews to {use} on (--{use}-size None for all)"
        for use, part, whole in (("train", train, texts.train), ("test", test, texts.test))
        if len(part) < len(whole)
    ]:
        report(f"{texts.name}: {', '.join(less)}")
    if options.validation_size >= len(train):
        raise InputError(
            f"--validation-size {options.validation_size}: leaves nothing of {len(train)} reviews"
        )
    train, validation = train.hold_out(options.validation_size)
    return texts, train, test, validation


def fingerprint_of(options: TrainConfig, data: Data) -> str:
    """The fingerprint of data and word vectors: a checkpoint resumes only with the same ones."""
    digest = hashlib.sha256(json.dumps(sources.fingerprint(options.data)).encode())
    digest.update("\n".join(data.vectors.words).encode())
    digest.update(np.ascontiguousarray(data.vectors.matrix).data)
    block = 1 << 20  # the conversion to 64 bits takes place block by block, to save memory
    for start in range(0, len(data.train.lengths), block):
        digest.update(data.train.lengths[start : start + block].astype(np.int64).data)
    digest.update(np.ascontiguousarray(data.train.split.labels).data)
    return digest.hexdigest()
