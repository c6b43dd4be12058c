"""A data set as numbers: every text as vocabulary ids, memory-mapped from the cache."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from jaxtyping import Int

from common import datasets
from common.cache import cached
from common.datasets.dataset import SPLIT_SEED, Split
from common.text import TOKENIZER_VERSION, tokenize


@dataclass(frozen=True)
class EncodedSplit:
    """The texts of a split, one after the other.

    tokens: vocabulary ids; text i is tokens[offsets[i] : offsets[i + 1]]. labels: index of class.
    """

    tokens: Int[np.ndarray, " tokens"]
    offsets: Int[np.ndarray, " N+1"]
    labels: Int[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, text: int) -> Int[np.ndarray, " words"]:
        return self.tokens[self.offsets[text] : self.offsets[text + 1]]

    @property
    def lengths(self) -> Int[np.ndarray, " N"]:
        return np.diff(self.offsets)

    def subset(self, size: int | None) -> "EncodedSplit":
        """`size` of the texts, balanced as the split is, always the same ones (all: None)."""
        if size is None or size >= len(self):
            return self
        return self._take(np.sort(self._balanced()[:size]))

    def hold_out(self, size: int) -> "tuple[EncodedSplit, EncodedSplit]":
        """The texts but for `size` of them, and those, both balanced as the split is."""
        order = self._balanced()
        return self._take(np.sort(order[size:])), self._take(np.sort(order[:size]))

    def _balanced(self) -> Int[np.ndarray, " N"]:
        """The texts in an order, always the same, of which every beginning is balanced."""
        order = np.random.default_rng(SPLIT_SEED).permutation(len(self))
        # Each text's rank within its class, as a share of the class: the `size` smallest shares
        # take the same part of every class.
        share = np.empty(len(self))
        for label in np.unique(self.labels):
            members = order[self.labels[order] == label]
            share[members] = np.arange(len(members)) / len(members)
        return np.argsort(share, kind="stable")

    def _take(self, texts: Int[np.ndarray, " n"]) -> "EncodedSplit":
        parts = [self[text] for text in texts]
        return join(parts, self.labels[texts])

    def renumber(self, new_ids: Int[np.ndarray, " V"]) -> "EncodedSplit":
        """The same texts with id i replaced by new_ids[i], and dropped where that is negative."""
        tokens = new_ids[self.tokens]
        known = tokens >= 0
        before = np.concatenate([[0], np.cumsum(known)])
        return EncodedSplit(tokens[known], before[self.offsets], self.labels)


@dataclass(frozen=True)
class Corpus:
    """A data set, encoded: vocabulary[id] is a word, the most frequent (in training) first."""

    name: str
    classes: tuple[str, ...]
    vocabulary: list[str]
    train: EncodedSplit
    test: EncodedSplit


def join(texts: Sequence[np.ndarray], labels: np.ndarray) -> EncodedSplit:
    """One EncodedSplit of texts that are given as arrays of ids."""
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64)
    tokens = np.concatenate([np.zeros(0, np.int32), *texts]).astype(np.int32, copy=False)
    return EncodedSplit(tokens, offsets, np.asarray(labels, np.int32))


def load(spec: str, report: Callable[[str], None] = lambda line: None) -> Corpus:
    """The data set `spec`, encoded; computed once, then memory-mapped from the cache.

    report is told, in a line of text, of work that takes seconds. Raises InputError as
    datasets.load does.
    """

    def build(folder: Path) -> None:
        report(f"reading and encoding {spec} (once; then cached)")
        _write(datasets.load(spec), folder)

    key = {**datasets.fingerprint(spec), "tokenizer": TOKENIZER_VERSION, "split": SPLIT_SEED}
    folder = cached("corpus", key, build)
    about = json.loads((folder / "about.json").read_text())
    vocabulary = (folder / "vocabulary.txt").read_text(encoding="utf-8").split("\n")[:-1]
    return Corpus(
        about["name"],
        tuple(about["classes"]),
        vocabulary,
        _read(folder, "train"),
        _read(folder, "test"),
    )


def _read(folder: Path, split: str) -> EncodedSplit:
    return EncodedSplit(
        *(
            np.load(folder / f"{split}-{part}.npy", mmap_mode="r")
            for part in ("tokens", "offsets", "labels")
        )
    )


def _write(dataset: datasets.Dataset, folder: Path) -> None:
    words = {"train": _words(dataset.train), "test": _words(dataset.test)}
    in_train = Counter(chain.from_iterable(words["train"]))
    in_test = Counter(chain.from_iterable(words["test"]))
    vocabulary = sorted(in_train | in_test, key=lambda word: (-in_train[word], word))
    ids = {word: number for number, word in enumerate(vocabulary)}
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        encoded = join(
            [np.array([ids[w] for w in text], np.int32) for text in words[name]], split.labels
        )
        np.save(folder / f"{name}-tokens.npy", encoded.tokens)
        np.save(folder / f"{name}-offsets.npy", encoded.offsets)
        np.save(folder / f"{name}-labels.npy", encoded.labels)
    (folder / "vocabulary.txt").write_text("".join(f"{w}\n" for w in vocabulary), encoding="utf-8")
    (folder / "about.json").write_text(
        json.dumps({"name": dataset.name, "classes": dataset.classes})
    )


def _words(split: Split) -> list[list[str]]:
    return [tokenize(text) for text in split.texts]
