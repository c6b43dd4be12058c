"""An encoded data set: every text as vocabulary ids, memory-mapped from the cache.

Encoding streams the texts once and writes their ids to a file; in memory are the vocabulary and
about 40 bytes per text.
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

# Splits do not depend on a run's seed, so that all runs are tested on the same texts.
SPLIT_SEED = 0
LAYOUT_VERSION = 4  # part of the cache keys of everything that _write and renumber write
TOKENS = "tokens.int32"
_SPLITS = ("", "train", "test")
_BLOCK = 1 << 20  # tokens processed together
MAX_RESIDENT_BYTES = 2**26  # bytes: smaller mapped files stay in the memory of the process
MAX_CLASSES = 10_000
_MAX_CLASS_NAME_BYTES = 2**19  # bytes of all class names as JSON, to limit the size of metrics.json


@dataclass(frozen=True)
class EncodedSplit:
    """The texts of a split: a view of the tokens of all texts.

    tokens: vocabulary ids; text i is tokens[starts[i] : starts[i] + lengths[i]].
    labels, categories: index of the class and of the category, if the data set has categories.
    vocabulary_size: an upper bound of the ids, exclusive.
    name: identifies these texts in cache keys.
    ratios: `Ratios.read` in ngrams.py for each token.
    large: verify tokens and ratios that come from large files of the cache.
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
        """Tokens start to stop, after verifying them and their ratios.

        Raises InputError for a damaged cache file.
        """
        for blocks in self.large:
            blocks.verify(start, stop)
        return self.tokens[start:stop]

    def subset(self, size: int | None) -> "EncodedSplit":
        """`size` texts (None: all), stratified by `strata`; the choice is deterministic."""
        return self if size is None or size >= len(self) else self.hold_out(size)[1]

    def hold_out(self, size: int) -> "tuple[EncodedSplit, EncodedSplit]":
        """(all other texts, `size` held-out texts), stratified by `strata`."""
        if not size:  # the general case would copy memory-mapped columns
            rest = dataclasses.replace(self, name=f"{self.name}-but-0")
            return rest, self.take(np.zeros(0, int), f"{self.name}-0")
        order = np.random.default_rng(SPLIT_SEED).permutation(len(self))
        # The rank of each text within its stratum, relative to the size of the stratum: the texts
        # with the `size` smallest shares are the same fraction of every stratum.
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
        """The selected texts, under a new name."""
        return dataclasses.replace(
            self,
            starts=self.starts[texts],
            lengths=self.lengths[texts],
            labels=self.labels[texts],
            categories=None if self.categories is None else self.categories[texts],
            name=name,
        )

    def blocks(self) -> Iterator[tuple[slice, Int32[np.ndarray, " tokens"]]]:
        """Blocks of texts with about a million tokens: the slice of the texts, and their tokens."""
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
        """Unmap pages of a large token file from this process; the page cache may keep them.

        Linux may map 2 MiB around each page read. Pages of a small file stay mapped, because
        mapping them again for each batch takes as long as making the rest of the batch.
        """
        if self.tokens.nbytes > MAX_RESIDENT_BYTES:
            self._advise(mmap.MADV_DONTNEED)

    def _advise(self, advice: int) -> None:
        mapped = getattr(self.tokens.base, "obj", None)
        if isinstance(mapped, mmap.mmap):
            mapped.madvise(advice)

    def counts(self) -> Int64[np.ndarray, " V"]:
        """The number of occurrences of each word of the vocabulary; cached."""
        folder = cached(
            "counts",
            {"texts": self.name},
            lambda to: files.write_array(to / "counts.npy", self._count()),
        )
        return np.load(folder / "counts.npy")

    def _count(self) -> Int64[np.ndarray, " V"]:
        counts = np.zeros(self.vocabulary_size, np.int64)
        for _, tokens in self.blocks():
            counts += np.bincount(tokens, minlength=len(counts))
        return counts

    def renumber(self, new_ids: Int[np.ndarray, " V"]) -> "EncodedSplit":
        """The texts with id i replaced by new_ids[i], or dropped if that is negative.

        The result is memory-mapped from the cache.
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
    """An encoded data set. vocabulary[id] is a word; words frequent in training come first."""

    name: str
    classes: tuple[str, ...]
    categories: tuple[str, ...]
    vocabulary: list[str]
    train: EncodedSplit
    test: EncodedSplit
    left_out: dict[str, int] = field(default_factory=dict)
    """The number of unusable rows, by problem."""


Texts = EncodedSplit | Sequence[Int[np.ndarray, " words"]]
"""Texts as arrays of ids."""


def concatenate(
    texts: Texts,
) -> tuple[Int64[np.ndarray, " tokens"], Int32[np.ndarray, " N"]]:
    """The tokens of all texts, one text after the other, and the length of each text."""
    if isinstance(texts, EncodedSplit):
        parts, lengths = [tokens for _, tokens in texts.blocks()], texts.lengths
    else:
        parts, lengths = [*texts], np.array([len(text) for text in texts], np.int32)
    return np.concatenate([np.zeros(0, np.int64), *parts]), lengths


def join(texts: Sequence[np.ndarray], labels: np.ndarray) -> EncodedSplit:
    """An EncodedSplit of texts given as arrays of ids."""
    lengths = np.array([len(text) for text in texts], np.int32)
    tokens = np.concatenate([np.zeros(0, np.int32), *texts]).astype(np.int32, copy=False)
    size = int(tokens.max(initial=-1)) + 1
    name = hashlib.sha256(tokens.tobytes() + lengths.tobytes()).hexdigest()
    labels = np.asarray(labels, np.int32)
    return EncodedSplit(tokens, _offsets(lengths)[:-1], lengths, labels, size, name=name)


def load(
    spec: str, report: Callable[[str], None] = lambda line: None, skip_bad_rows: bool = False
) -> Corpus:
    """The encoded data set `spec`, memory-mapped from the cache.

    report receives a line of text before work that takes seconds, and about rows left out.
    Raises InputError as sources.load does.
    """

    def make() -> Dataset:
        report(f"reading and encoding {spec} (once; then cached)")
        return sources.load(spec)

    corpus = encoded(make, sources.fingerprint(spec), skip_bad_rows)
    if corpus.left_out:
        kinds = ", ".join(f"{kind} ({count:,})" for kind, count in corpus.left_out.items())
        total = sum(corpus.left_out.values())
        report(f"{spec}: {total:,} bad rows left out (--skip-bad-rows): {kinds}")
    return corpus


def encoded(
    make: Callable[[], Dataset], fingerprint: dict[str, str | int], skip_bad_rows: bool = False
) -> Corpus:
    """The data set that make() returns, encoded and cached under its fingerprint.

    skip_bad_rows: count rows that raise BadRow (sources/dataset.py), and leave them out.

    Raises InputError as Dataset.examples does, and for a data set that does not allow training and
    testing: no text, no word, fewer than two classes, an empty split, or too few texts to split.
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
    """Encoded texts before the words are sorted by frequency and the texts are split.

    words, labels, categories: the distinct values. columns: the length, label, category, split and
    hash of each text. Tokens, labels and categories are indices into the distinct values.
    """

    words: list[str]
    labels: list[str]
    categories: list[str]
    columns: dict[str, Any]


def _write(dataset: Dataset, raw: Raw, folder: Path, left_out: Counter[str] | None) -> None:
    """Write the files that `encoded` reads; renumber the tokens in the existing token file."""
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
    starts = _offsets(columns["lengths"])[:-1]
    texts = EncodedSplit(map_file(path, np.int32), starts, vocabulary_size=len(words), **columns)
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
    """Read a data set, and write the tokens to `path`."""
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
    arrays = {name: np.frombuffer(column, np.int32) for name, column in columns.items()}
    arrays["hashes"] = np.frombuffer(hashes, np.uint64)
    return Raw(list(words), list(labels), list(categories), arrays)


def _check_count(dataset: Dataset, labels: Collection[str]) -> None:
    """Raise InputError for more than MOST_CLASSES labels."""
    if len(labels) > MAX_CLASSES:
        raise InputError(f"{dataset.name}: more than {MAX_CLASSES:,} different labels")


def _classes(dataset: Dataset, labels: list[str]) -> list[str]:
    classes = list(dataset.classes) or _sorted(labels)
    _check_count(dataset, classes)
    known = set(classes)
    for label in labels:
        if label not in known:
            raise InputError(f"{dataset.name}: label {label!r} is none of {', '.join(classes)}")
    if len(json.dumps(classes)) > _MAX_CLASS_NAME_BYTES:
        raise InputError(
            f"{dataset.name}: the names of the {len(classes):,} classes are too long together: "
            f"more than {_MAX_CLASS_NAME_BYTES:,} bytes"
        )
    if len(labels) == 1:
        raise InputError(f"{dataset.name}: only one class, {labels[0]!r}; at least two are needed")
    return classes


def _sorted(labels: list[str]) -> list[str]:
    """Sorted numerically if all labels are finite numbers, else as text."""
    with suppress(ValueError):
        numbers = {label: float(label) for label in labels}
        if all(map(math.isfinite, numbers.values())):
            return sorted(labels, key=lambda label: (numbers[label], label))
    return sorted(labels)


def _positions(names: list[str], ordered: list[str]) -> Int32[np.ndarray, " names"]:
    position = {name: i for i, name in enumerate(ordered)}
    return np.array([position[name] for name in names], np.int32)


def _in_test(
    dataset: Dataset,
    texts: EncodedSplit,
    splits: Int32[np.ndarray, " N"],
    hashes: UInt64[np.ndarray, " N"],
    classes: list[str],
) -> Bool[np.ndarray, " N"]:
    """A mask of the test texts: those that the source declares or, if it declares none, a draw.

    The draw is deterministic and stratified by category and label. Only texts that occur once are
    drawn (equal texts have equal hashes), so no text is in both splits. A text that is alone in its
    stratum stays in training. Raises InputError if there are too few texts.
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
        reason = "; a text with copies stays in training, so that it is in one split only"
        raise InputError(
            f"{name}: cannot draw {size:,} test texts with every class "
            f"from the {len(single):,} of {total:,} that occur once{reason if repeated else ''}"
        ) from None
    return np.isin(np.arange(total), drawn)


def _offsets(lengths: Int32[np.ndarray, " N"]) -> Int64[np.ndarray, " N+1"]:
    """The start of each text in the concatenation of all texts, and the end of the last."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _column(path: Path) -> Any:
    """A memory-mapped column, whose pages all processes share."""
    return np.asarray(np.load(path, mmap_mode="r"))
