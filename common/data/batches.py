"""Batches: which reviews are trained on together, in which order, padded to which shape.

All of it is a pure function of (data, seed, epoch), the same for both twins. Reviews of about the
same length go together, and padded sizes come from at most MAX_SHAPES fixed shapes, so that XLA
compiles at most so many times and little of the work is padding.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64

from common import files
from common.cache import cached, forget
from common.data.corpus import EncodedSplit
from common.params import NO_LABEL

MAX_SHAPES = 8
LARGE = 1_000_000  # so many reviews have a plan that processes should share
_POOL = 256  # so many batches are sorted by length together: the larger, the less padding
_MAPPED = 16  # so many texts are read of a large file before their pages are let go: 2 MiB each
_SAMPLE = 64  # so many batches are looked at to foresee how many distinct tokens a batch has


@dataclass(frozen=True)
class Batch:
    """B reviews of at most T words, in time-major order, with each word's id named only once.

    distinct: the vocabulary ids that occur, padded with zeros to a fixed size K.
    tokens: indices into distinct; 0 in the padding.
    lengths: words in each review, longest first; 0 is legal.
    labels: index of the class, or NO_LABEL for a row that is no review.
    reviews: index of each review in its split, -1 for a row that is no review.
    ratios: of the n-grams that end at each word (common/data/ngrams.py), zeros in the padding; an
        n-gram that begins before what is read of a review has 0.
    share: which share of a batch these are; it may have no review at all.
    """

    distinct: Int32[np.ndarray, " K"]
    tokens: Int32[np.ndarray, "T B"]
    lengths: Int32[np.ndarray, " B"]
    labels: Int32[np.ndarray, " B"]
    reviews: Int64[np.ndarray, " B"]
    ratios: Float32[np.ndarray, "T B E"] | None = None
    share: int = 0

    @property
    def words(self) -> int:
        """How many words are in the batch, padding not counted."""
        return int(self.lengths.sum())

    @property
    def named(self) -> int:
        """How many of `distinct` are ids that occur, padding not counted: they come first."""
        return int(np.count_nonzero(self.distinct[1:])) + (self.words > 0)


@dataclass(frozen=True, order=True)
class Shape:
    """Padded sizes of a batch: time steps T and distinct tokens K."""

    steps: int
    distinct: int


class Batches:
    """The batches of a split, epoch by epoch, for training or (in_order=True) for evaluation.

    Only the last max_length words of a review are read. The shapes are those that suit this split,
    or the ones given, of which the last must fit every review. A batch may be cut into shares: each
    is then a Batch of its own, and the shapes are for these.
    """

    def __init__(
        self,
        split: EncodedSplit,
        batch_size: int,
        *,
        max_length: int | None = None,
        seed: int = 0,
        in_order: bool = False,
        shapes: Sequence[Shape] | None = None,
        longest: int = 0,
        ngrams: int = 0,
        shares: int = 1,
    ) -> None:
        """longest: the shapes shall fit reviews of up to so many words (the other split's). ngrams:
        up to how many words those are that the split has ratios of."""
        self.split = split
        self.batch_size, self.shares = batch_size, shares
        self.rows = math.ceil(batch_size / shares)  # of a share
        self.seed = seed
        self.in_order = in_order
        self.ngrams = ngrams
        self.limit = max_length
        self.lengths = split.lengths
        if max_length:
            self.lengths = np.minimum(split.lengths, np.int32(min(max_length, 2**31 - 1)))
        self._position = np.zeros(split.vocabulary_size, np.int32)
        self.shapes = list(shapes) if shapes else self._choose_shapes(longest)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return math.ceil(len(self.split) / self.batch_size)

    def plan(self, epoch: int) -> Int32[np.ndarray, "batches B"]:
        """Which reviews are in which batch of this epoch; the last is padded with -1.

        A large one is kept in the cache, this epoch's and the one's before, and mapped.
        """
        if len(self.split) < LARGE:
            return self._plan(epoch)
        split = {"texts": self.split.name, "batch_size": self.batch_size, "limit": self.limit}
        key = {**split, "in_order": self.in_order, "seed": self.seed}
        forget("plan", {**key, "epoch": epoch - 2})
        folder = cached(
            "plan",
            {**key, "epoch": epoch},
            lambda to: files.write_array(to / "plan.npy", self._plan(epoch)),
        )
        try:
            return np.asarray(np.load(folder / "plan.npy", mmap_mode="r"))
        except FileNotFoundError:  # a process that is two epochs ahead has just removed it
            return self._plan(epoch)

    def _plan(self, epoch: int) -> Int32[np.ndarray, "batches B"]:
        rows = np.full((len(self), self.batch_size), -1, np.int32)
        if self.in_order:
            order = np.argsort(-self.lengths, kind="stable")
            rows.flat[: len(order)] = order
            return rows
        rng = np.random.default_rng([self.seed, epoch])
        order = np.arange(len(self.split), dtype=np.int32)
        rng.shuffle(order)
        for pool in range(0, len(order), _POOL * self.batch_size):
            members = order[pool : pool + _POOL * self.batch_size]
            sorted_by_length = members[np.argsort(-self.lengths[members], kind="stable")]
            rows.flat[pool : pool + len(members)] = sorted_by_length
        return rows[rng.permutation(len(rows))]

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of this epoch in their order, from number `start` on."""
        return map(self.batch, self.plan(epoch)[start:])

    def words(self, rows: Int[np.ndarray, " B"]) -> int:
        """How many words are read of these reviews."""
        return int(self.lengths[rows[rows >= 0]].sum())

    def share(self, rows: Int[np.ndarray, " B"], number: int) -> Batch:
        """One share of the batch of these reviews: every so-manyth, since they go by length."""
        dealt = rows[number :: self.shares]
        padding = np.full(self.rows - len(dealt), -1)
        return self.batch(np.append(dealt, padding), number)

    def batch(self, rows: Int[np.ndarray, " B"], share: int = 0) -> Batch:
        """The batch of these reviews (indices into the split; -1: none)."""
        rows = rows.astype(np.int64)
        texts = self._texts(rows)
        distinct = _distinct(texts)
        lengths = np.array([len(text) for text in texts], np.int32)
        longest, K = lengths.max(initial=0), len(distinct)
        shape = next(it for it in self.shapes if it.steps >= longest and it.distinct >= K)
        self._position[distinct] = np.arange(K, dtype=np.int32)
        tokens = np.zeros((shape.steps, len(rows)), np.int32)
        for column, text in enumerate(texts):
            tokens[: len(text), column] = self._position[text]
        labels = np.where(rows >= 0, self.split.labels[rows], NO_LABEL)
        distinct = np.append(distinct, np.zeros(shape.distinct - K, np.int32))
        ratios = self._ratios(rows, shape.steps) if self.ngrams else None
        return Batch(distinct, tokens, lengths, labels.astype(np.int32), rows, ratios, share)

    def _ranges(self, rows: Int64[np.ndarray, " B"]) -> list[tuple[int, int]]:
        """What is read of each review; nothing where there is none."""
        ends = self.split.starts[rows] + self.split.lengths[rows]
        starts = ends - np.where(rows >= 0, self.lengths[rows], 0)
        return list(zip(starts.tolist(), ends.tolist(), strict=True))

    def _texts(self, rows: Int64[np.ndarray, " B"]) -> list[Int64[np.ndarray, " words"]]:
        # Twice they are used as indices, which NumPy would convert each time.
        ranges, texts = self._ranges(rows), []
        for some in range(0, len(ranges), _MAPPED):
            part = ranges[some : some + _MAPPED]
            texts += [self.split.read(start, end).astype(np.intp) for start, end in part]
            self.split.release()
        return texts

    def _ratios(self, rows: Int64[np.ndarray, " B"], steps: int) -> Float32[np.ndarray, "T B E"]:
        assert self.split.ratios is not None
        found = np.zeros((steps, len(rows), self.split.ratios.shape[1]), np.float32)
        for column, (start, end) in enumerate(self._ranges(rows)):
            found[: end - start, column] = self.split.ratios[start:end]
        by_order = found.reshape(*found.shape[:2], self.ngrams, -1)
        for n in range(1, self.ngrams):
            by_order[:n, :, n] = 0  # those that began before
        return found

    def _choose_shapes(self, longest: int) -> list[Shape]:
        """At most MAX_SHAPES, ascending: the last holds any batch, the others what is usual."""
        longest = max(longest, int(self.lengths.max(initial=0)), 1)
        longest = min(longest, self.limit or longest)
        if self.rows == 1:  # few words repeat within one review: nothing to foresee
            return [Shape(edge, edge) for edge in _edges(self.lengths, longest, MAX_SHAPES)]
        everything = Shape(longest, longest * self.rows)
        edges = _edges(self.lengths, longest, MAX_SHAPES - 1)
        most = dict.fromkeys(edges, 1)
        plan = self.plan(0)
        for rows in plan[:: math.ceil(len(plan) / _SAMPLE) or 1, :: self.shares]:
            texts = self._texts(rows)
            edge = next(edge for edge in edges if edge >= max(map(len, texts)))
            most[edge] = max(most[edge], len(_distinct(texts)))
        shapes: list[Shape] = []
        for edge in edges:
            # A tenth more than was seen, in steps of 64; a longer shape never holds fewer tokens.
            margin = math.ceil(most[edge] * 1.1 / 64) * 64
            floor = shapes[-1].distinct if shapes else 1
            shapes.append(Shape(edge, min(max(margin, floor), edge * self.rows)))
        return [*shapes, everything] if everything != shapes[-1] else shapes


def _distinct(texts: Sequence[Int64[np.ndarray, " words"]]) -> Int32[np.ndarray, " distinct"]:
    # As np.unique, which is several times slower.
    ordered = np.sort(np.concatenate(texts))
    return ordered[np.diff(ordered, prepend=-1) > 0].astype(np.int32)


def _edges(lengths: Int32[np.ndarray, " N"], longest: int, most: int) -> list[int]:
    """At most `most` padded lengths, the last `longest`, that waste the fewest steps on padding.

    Dynamic programming over the lengths that occur (at most 256 quantiles of them): the best way
    to cover the lengths up to a candidate with k edges extends the best way with k - 1.
    """
    # By counting: sorting what millions of reviews have takes hundreds of MB.
    up_to = np.cumsum(np.bincount(np.maximum(lengths, 1), minlength=longest + 1))
    ranks = np.ceil(np.linspace(0, 1, 256) * (len(lengths) - 1))
    quantiles = np.searchsorted(up_to, ranks, side="right")
    candidates = np.unique(np.append(quantiles, longest))
    # The reviews of (candidate[i - 1], candidate[j]] cost candidate[j] steps each.
    below = up_to[[0, *candidates]]
    cost = (below[None, 1:] - below[:-1, None]) * candidates[None, :].astype(float)
    cost[np.tril_indices(len(candidates), -1)] = np.inf
    best, back = cost[0], []
    for _ in range(min(most, len(candidates)) - 1):
        # best[i - 1] covers everything before candidate i; the next edge is candidate j >= i.
        total = np.concatenate([[np.inf], best[:-1]])[:, None] + cost
        back.append(total.argmin(axis=0))
        best = total.min(axis=0)
    edges = [len(candidates) - 1]
    for start in reversed(back):
        edges.append(int(start[edges[-1]]) - 1)
    return candidates[edges[::-1]].tolist()
