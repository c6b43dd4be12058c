"""A data set as numbers: every text as vocabulary ids, memory-mapped from the cache.

The texts are read once, as a stream, and their ids go to a file as they are found. What stays in
memory is the vocabulary and some 40 bytes for each text.
"""

import dataclasses
import hashlib
import json
import math
import mmap
import os
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Int64, UInt64

from common import files
from common.cache import Blocks, cached, in_blocks, map_file
from common.data import sources
from common.data.encoding import CHUNK, encode_all, numbering
from common.data.sources.dataset import Dataset
from common.data.text import TOKENIZER_VERSION
from common.errors import InputError

# The splits do not depend on the seed of a run: runs with different seeds are tested alike.
SPLIT_SEED = 0
LAYOUT_VERSION = 4  # part of the key of every cache that holds what _write or renumber write
TOKENS = "tokens.int32"
_SPLITS = ("", "train", "test")
_BLOCK = 1 << 20  # tokens that are looked at together, where all of them are
MAY_STAY = 2**26  # bytes of a mapped file that may stay in the memory of the process
MOST_CLASSES = 10_000
_LONGEST_NAMES = 2**19  # bytes of all class names as JSON: so that metrics.json can be read again


@dataclass(frozen=True)
class EncodedSplit:
    """The texts of a split: a view of the tokens of all texts.

    tokens: vocabulary ids; text i is tokens[starts[i] : starts[i] + lengths[i]].
    labels, categories: index of the class and, where there are categories, of the category.
    vocabulary_size: every id is smaller.
    name: other texts have another; part of the key of what is made from them and cached.
    ratios: of each token, what `Ratios.read` in ngrams.py says.
    large: verify tokens and ratios that come from large files of the cache; see `read`.
    """

    tokens: Int32[np.ndarray, " tokens"]
    starts: Int64[np.ndarray, " N"]
    lengths: Int32[np.ndarray, " N"]
    labels: Int32[np.ndarray, " N"]
    vocabulary_size: int
    categories: Int32[np.ndarray, " N"] | None = None
    name: str = ""
    ratios: Float32[np.ndarray, "tokens E"] | None = None
    large: tuple[Blocks, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, text: int) -> Int32[np.ndarray, " words"]:
        start = int(self.starts[text])
        return self.read(start, start + int(self.lengths[text]))

    def read(self, start: int, stop: int) -> Int32[np.ndarray, " words"]:
        """These tokens; they and their ratios are verified first.

        Raises InputError where a file of the cache is damaged.
        """
        for blocks in self.large:
            blocks.verify(start, stop)
        return self.tokens[start:stop]

    def subset(self, size: int | None) -> "EncodedSplit":
        """`size` of the texts, balanced as the split is, always the same ones (all: None)."""
        return self if size is None or size >= len(self) else self.hold_out(size)[1]

    def hold_out(self, size: int) -> "tuple[EncodedSplit, EncodedSplit]":
        """The texts but for `size` of them, and those, both balanced as the split is."""
        if not size:  # so that mapped columns stay mapped
            rest = dataclasses.replace(self, name=f"{self.name}-but-0")
            return rest, self.take(np.zeros(0, int), f"{self.name}-0")
        order = np.random.default_rng(SPLIT_SEED).permutation(len(self))
        # Each text's rank within its stratum, as a share of it: the `size` smallest shares take the
        # same part of every stratum.
        share = np.empty(len(self))
        strata = self.strata()
        order = order[np.argsort(strata[order], kind="stable")]
        for members in np.split(order, np.flatnonzero(np.diff(strata[order])) + 1):
            share[members] = np.arange(len(members)) / len(members)
        order = np.argsort(share, kind="stable")
        return (
            self.take(np.sort(order[size:]), f"{self.name}-but-{size}"),
            self.take(np.sort(order[:size]), f"{self.name}-{size}"),
        )

    def strata(self) -> Int32[np.ndarray, " N"]:
        """A number for each combination of category and label."""
        classes = self.labels.max(initial=0) + 1
        return self.labels + (0 if self.categories is None else self.categories * classes)

    def take(
        self, texts: Int[np.ndarray, " n"] | Bool[np.ndarray, " N"], name: str
    ) -> "EncodedSplit":
        """These texts alone, under a name of their own."""
        return dataclasses.replace(
            self,
            starts=self.starts[texts],
            lengths=self.lengths[texts],
            labels=self.labels[texts],
            categories=None if self.categories is None else self.categories[texts],
            name=name,
        )

    def blocks(self) -> Iterator[tuple[slice, Int32[np.ndarray, " tokens"]]]:
        """All texts, as many at a time as have about a million tokens: which, and their tokens."""
        ends = _offsets(self.lengths)[1:]
        edges = np.searchsorted(ends, np.arange(0, ends[-1:].sum(), _BLOCK))
        for first, last in pairwise([*np.unique(edges).tolist(), len(self)]):
            block = slice(first, last)
            self._advise(mmap.MADV_SEQUENTIAL)
            ranges = zip(self.starts[block].tolist(), self.lengths[block].tolist(), strict=True)
            yield block, np.concatenate([self.read(s, s + n) for s, n in ranges])
            self.release()
            self._advise(mmap.MADV_RANDOM)

    def release(self) -> None:
        """Take what was read of the file off this process's memory; the system may still have it.

        With the page that holds a text, Linux may map the 2 MiB around it. A small file stays: to
        map its pages again for each batch would take as long as the rest of making the batch.
        """
        if self.tokens.nbytes > MAY_STAY:
            self._advise(mmap.MADV_DONTNEED)

    def _advise(self, advice: int) -> None:
        mapped = getattr(self.tokens.base, "obj", None)
        if isinstance(mapped, mmap.mmap):
            mapped.madvise(advice)

    def counts(self) -> Int64[np.ndarray, " V"]:
        """How often each word of the vocabulary occurs; counted once, then kept in the cache."""
        folder = cached(
            "counts",
            {"texts": self.name},
            lambda to: files.write_array(to / "counts.npy", self._count()),
        )
        return np.load(folder / "counts.npy")

    def _count(self) -> Int64[np.ndarray, " V"]:
        found = np.zeros(self.vocabulary_size, np.int64)
        for _, tokens in self.blocks():
            found += np.bincount(tokens, minlength=len(found))
        return found

    def renumber(self, new_ids: Int[np.ndarray, " V"]) -> "EncodedSplit":
        """The same texts with id i replaced by new_ids[i], and dropped where that is negative.

        Written to the cache once, then memory-mapped.
        """
        new_ids = new_ids.astype(np.int32)

        def build(folder: Path) -> None:
            lengths = np.zeros(len(self), np.int32)
            with (folder / TOKENS).open("wb") as file:
                for block, old in self.blocks():
                    tokens = new_ids[old]
                    known = tokens >= 0
                    before = np.concatenate([[0], np.cumsum(known)])
                    lengths[block] = np.diff(before[_offsets(self.lengths[block])])
                    file.write(tokens[known].data)
            files.write_array(folder / "lengths.npy", lengths)
            files.write_array(folder / "starts.npy", _offsets(lengths)[:-1])

        numbers = hashlib.sha256(new_ids.tobytes()).hexdigest()
        key = {"texts": self.name, "numbers": numbers, "layout": LAYOUT_VERSION}
        folder = cached("tokens", key, build, (TOKENS,))
        tokens = map_file(folder / TOKENS, np.int32)
        return dataclasses.replace(
            self,
            tokens=tokens,
            large=in_blocks(folder / TOKENS, tokens),
            starts=_column(folder / "starts.npy"),
            lengths=_column(folder / "lengths.npy"),
            vocabulary_size=int(new_ids.max(initial=-1)) + 1,
            name=folder.name,
        )


@dataclass(frozen=True)
class Corpus:
    """A data set, encoded: vocabulary[id] is a word, the most frequent (in training) first."""

    name: str
    classes: tuple[str, ...]
    categories: tuple[str, ...]
    vocabulary: list[str]
    train: EncodedSplit
    test: EncodedSplit
    left_out: dict[str, int] = field(default_factory=dict)
    """How many rows could not be used, by what was wrong with them."""


def join(texts: Sequence[np.ndarray], labels: np.ndarray) -> EncodedSplit:
    """One EncodedSplit of texts that are given as arrays of ids."""
    lengths = np.array([len(text) for text in texts], np.int32)
    tokens = np.concatenate([np.zeros(0, np.int32), *texts]).astype(np.int32, copy=False)
    size = int(tokens.max(initial=-1)) + 1
    name = hashlib.sha256(tokens.tobytes() + lengths.tobytes()).hexdigest()
    labels = np.asarray(labels, np.int32)
    return EncodedSplit(tokens, _offsets(lengths)[:-1], lengths, labels, size, name=name)


def load(
    spec: str, report: Callable[[str], None] = lambda line: None, skip_bad_rows: bool = False
) -> Corpus:
    """The data set `spec`, encoded; computed once, then memory-mapped from the cache.

    report is told, in a line of text, of work that takes seconds, and of rows that were left out.
    Raises InputError as sources.load does.
    """

    def make() -> Dataset:
        report(f"reading and encoding {spec} (once; then cached)")
        return sources.load(spec)

    found = encoded(make, sources.fingerprint(spec), skip_bad_rows)
    if found.left_out:
        kinds = ", ".join(f"{kind} ({count:,})" for kind, count in found.left_out.items())
        total = sum(found.left_out.values())
        report(f"{spec}: {total:,} bad rows left out (--skip-bad-rows): {kinds}")
    return found


def encoded(
    make: Callable[[], Dataset], fingerprint: dict[str, str | int], skip_bad_rows: bool = False
) -> Corpus:
    """The data set that make() gives, encoded, and kept under its fingerprint.

    skip_bad_rows: leave out, and count, what BadRow in sources/dataset.py stands for.

    Raises InputError as its examples() does, and for a data set that cannot be trained and tested
    on: no text, no word, fewer than two classes, an empty split, or too few texts to split.
    """
    left_out = Counter[str]() if skip_bad_rows else None

    def build(folder: Path) -> None:
        dataset = make()
        raw = _read(dataset, folder / TOKENS, left_out)
        _write(dataset, raw, folder, left_out)

    key: dict[str, str | int] = {
        **fingerprint,
        "tokenizer": TOKENIZER_VERSION,
        "split": SPLIT_SEED,
        "layout": LAYOUT_VERSION,
    }
    if skip_bad_rows:
        key["skip_bad_rows"] = True
    folder = cached("corpus", key, build, (TOKENS,))
    about = json.loads((folder / "about.json").read_text())
    vocabulary = (folder / "vocabulary.txt").read_text(encoding="utf-8").split("\n")[:-1]
    tokens = map_file(folder / TOKENS, np.int32)
    large = in_blocks(folder / TOKENS, tokens)
    splits = []
    for split in ("train", "test"):
        paths = {path.name.split(".")[1]: path for path in folder.glob(f"{split}.*.npy")}
        columns: dict[str, Any] = {name: _column(path) for name, path in paths.items()}
        columns |= {"vocabulary_size": len(vocabulary), "name": f"{folder.name}-{split}"}
        columns["large"] = large
        splits.append(EncodedSplit(tokens, **columns))
    train, test = splits
    names = about["name"], tuple(about["classes"]), tuple(about["categories"])
    return Corpus(*names, vocabulary, train, test, about["left_out"])


@dataclass(frozen=True)
class Raw:
    """Texts as numbers, before it is known how often each word occurs and what is to test on.

    words, labels, categories: by their number. columns: of each text lengths, labels, categories,
    splits and hashes.
    """

    words: list[str]
    labels: list[str]
    categories: list[str]
    columns: dict[str, Any]


def _write(dataset: Dataset, raw: Raw, folder: Path, left_out: Counter[str] | None) -> None:
    """Write what `encoded` reads, beside the tokens, which are there and get their last numbers."""
    name, path = dataset.name, folder / TOKENS
    words, labels, categories, columns = raw.words, raw.labels, raw.categories, dict(raw.columns)
    hashes, splits = columns.pop("hashes"), columns.pop("splits")
    if not len(splits):
        raise InputError(f"{name}: no text at all")
    if not words:
        raise InputError(f"{name}: no text has a word")
    classes, names = _classes(dataset, labels), sorted(categories)
    columns["labels"] = _positions(labels, classes)[columns["labels"]]
    columns["categories"] = _positions(categories, names)[columns["categories"]]
    if names == [""]:  # no categories
        names = []
        del columns["categories"]
    texts = _texts(folder, len(words), columns)
    in_test = _in_test(dataset, texts, splits, hashes, classes)

    train, test = texts.take(~in_test, ""), texts.take(in_test, "")
    counts = train._count().tolist()
    if not any(counts):
        raise InputError(f"{name}: no text to train on has a word")
    by_word = sorted(range(len(words)), key=words.__getitem__)
    order = sorted(by_word, key=counts.__getitem__, reverse=True)
    new_ids = np.empty(len(words), np.int32)
    new_ids[order] = np.arange(len(words), dtype=np.int32)
    with path.open("r+b") as file:
        while content := file.read(4 * _BLOCK):
            file.seek(-len(content), os.SEEK_CUR)
            file.write(new_ids[np.frombuffer(content, np.int32)].data)
    with (folder / "vocabulary.txt").open("w", encoding="utf-8") as text:
        text.writelines(f"{words[i]}\n" for i in order)
    for split, of in (("train", train), ("test", test)):
        for column in ("starts", *columns):
            files.write_array(folder / f"{split}.{column}.npy", getattr(of, column))
    about: dict[str, Any] = {"name": name, "classes": classes, "categories": names}
    about["left_out"] = left_out or {}
    (folder / "about.json").write_text(json.dumps(about))


def _read(dataset: Dataset, path: Path, left_out: Counter[str] | None) -> Raw:
    """Read a data set, and write the words' numbers to `path`."""
    words, labels, categories = numbering(), numbering(), numbering()
    columns = {name: array("i") for name in ("labels", "categories", "splits", "lengths")}
    hashes = bytearray()

    def chunks() -> Iterator[list[str]]:
        texts, size = [], 0
        for text, label, category, split in dataset.examples(left_out):
            columns["labels"].append(labels[label])
            columns["categories"].append(categories[category])
            columns["splits"].append(_SPLITS.index(split))
            texts.append(text)
            size += len(text)
            if size >= CHUNK:
                _check_count(dataset, labels)
                yield texts
                texts, size = [], 0
        yield texts

    with path.open("wb") as file, closing(encode_all(chunks())) as encoded_chunks:
        for chunk in encoded_chunks:
            ids = np.fromiter(map(words.__getitem__, chunk.words), np.int32, len(chunk.words))
            file.write(ids[np.frombuffer(chunk.tokens, np.uint32)].data)
            columns["lengths"].extend(chunk.lengths)
            hashes += chunk.hashes
    found = {name: np.frombuffer(column, np.int32) for name, column in columns.items()}
    found["hashes"] = np.frombuffer(hashes, np.uint64)
    return Raw(list(words), list(labels), list(categories), found)


def _check_count(dataset: Dataset, labels: Collection[str]) -> None:
    """Raise InputError for more labels than a classifier can have classes."""
    if len(labels) > MOST_CLASSES:
        raise InputError(f"{dataset.name}: more than {MOST_CLASSES:,} different labels")


def _classes(dataset: Dataset, labels: list[str]) -> list[str]:
    classes = list(dataset.classes) or _sorted(labels)
    _check_count(dataset, classes)
    known = set(classes)
    for label in labels:
        if label not in known:
            raise InputError(f"{dataset.name}: label {label!r} is none of {', '.join(classes)}")
    if len(json.dumps(classes)) > _LONGEST_NAMES:
        raise InputError(
            f"{dataset.name}: the names of the {len(classes):,} classes are too long together: "
            f"more than {_LONGEST_NAMES:,} bytes"
        )
    if len(labels) == 1:
        raise InputError(f"{dataset.name}: only one class, {labels[0]!r}; two at least are needed")
    return classes


def _sorted(labels: list[str]) -> list[str]:
    """As numbers where all of them are, else as texts."""
    with suppress(ValueError):
        numbers = {label: float(label) for label in labels}
        if all(map(math.isfinite, numbers.values())):
            return sorted(labels, key=lambda label: (numbers[label], label))
    return sorted(labels)


def _positions(found: list[str], ordered: list[str]) -> Int32[np.ndarray, " found"]:
    place = {name: i for i, name in enumerate(ordered)}
    return np.array([place[name] for name in found], np.int32)


def _in_test(
    dataset: Dataset,
    texts: EncodedSplit,
    splits: Int32[np.ndarray, " N"],
    hashes: UInt64[np.ndarray, " N"],
    classes: list[str],
) -> Bool[np.ndarray, " N"]:
    """Which texts are to test on: those that the source says, else some that are drawn.

    These are stratified by category and label, and always the same. They are drawn from the texts
    that occur once (equal texts have equal hashes), so no text stands in both splits. A text that
    is alone in its stratum stays in training. Raises InputError where there are too few texts.
    """
    name, total = dataset.name, len(texts)
    drawn, train, test = np.bincount(splits, minlength=len(_SPLITS)).tolist()
    if drawn < total:
        if drawn:
            raise InputError(
                f"{name}: {drawn:,} of {total:,} texts are in neither split, train or test"
            )
        if not train or not test:
            raise InputError(f"{name}: the {'test' if train else 'train'} split is empty")
        return splits == _SPLITS.index("test")
    from sklearn.model_selection import train_test_split  # slow to import

    once = np.flatnonzero(np.bincount(texts.labels) == 1)
    if len(once):
        label = classes[once[0]]
        raise InputError(
            f"{name}: label {label!r} occurs once, too seldom to both train and test on"
        )
    size = dataset.test_size
    if isinstance(size, float):
        size = math.ceil(size * total)
    _, text, copies = np.unique(hashes, return_inverse=True, return_counts=True)
    single, strata = np.flatnonzero(copies[text] == 1), texts.strata()
    repeated = total - len(single)
    single = single[np.bincount(strata[single])[strata[single]] > 1]
    try:
        _, drawn = train_test_split(
            single, test_size=size, stratify=strata[single], random_state=SPLIT_SEED
        )
    except ValueError:
        why = "; a text with copies stays in training, so that none is both trained and tested on"
        raise InputError(
            f"{name}: cannot draw {size:,} texts to test on, some of each class, "
            f"from the {len(single):,} of {total:,} that occur once{why if repeated else ''}"
        ) from None
    return np.isin(np.arange(total), drawn)


def _texts(folder: Path, vocabulary_size: int, columns: dict[str, Any]) -> EncodedSplit:
    tokens, starts = map_file(folder / TOKENS, np.int32), _offsets(columns["lengths"])[:-1]
    return EncodedSplit(tokens, starts, vocabulary_size=vocabulary_size, **columns)


def _offsets(lengths: Int32[np.ndarray, " N"]) -> Int64[np.ndarray, " N+1"]:
    """Where each text starts, laid end to end, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _column(path: Path) -> Any:
    """A number of each text, mapped: processes on a machine share what they read of it."""
    return np.asarray(np.load(path, mmap_mode="r"))
