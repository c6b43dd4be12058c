"""Batches: the reviews of each training step, their order and their padded shape.

A batch is a pure function of (data, seed, epoch), the same for both twins. Batches group reviews of
similar length and have at most MAX_SHAPES padded shapes; this limits the padding and the number of
XLA compilations.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64

from common import files
from common.cache import cached, forget
from common.data.corpus import EncodedSplit
from common.params import NO_LABEL

MAX_SHAPES = 8
LARGE = 1_000_000  # reviews from which on processes share a plan through the cache
_POOL = 256  # batches sorted by length together: a larger pool means less padding
_MAPPED = 16  # texts read from a large file before their pages (2 MiB each) are released
_SAMPLE = 64  # batches sampled to estimate the number of distinct tokens of a batch


@dataclass(frozen=True)
class Inputs:
    """B texts of at most T words, in time-major order.

    distinct: the vocabulary ids that occur, each once, padded with zeros to a fixed size K.
    tokens: indices into distinct; 0 in the padding.
    lengths: words in each text, longest first; 0 is legal.
    ratios: log-count ratios of the n-grams that end at each word (common/data/ngrams.py); zeros in
        the padding and for an n-gram that begins before the words read of a text.
    """

    distinct: Int32[np.ndarray, " K"]
    tokens: Int32[np.ndarray, "T B"]
    lengths: Int32[np.ndarray, " B"]
    ratios: Float32[np.ndarray, "T B E"] | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Batch(Inputs):
    """Reviews of a split, with their labels.

    labels: index of the class, or NO_LABEL in a padding row.
    reviews: index of each review in its split, -1 in a padding row.
    share: number of the share if a batch is divided; a share may hold no review.
    """

    labels: Int32[np.ndarray, " B"]
    reviews: Int64[np.ndarray, " B"]
    share: int = 0

    @property
    def words(self) -> int:
        """The number of words, without padding."""
        return int(self.lengths.sum())

    @property
    def num_distinct(self) -> int:
        """The number of distinct ids, without padding; they come first in `distinct`."""
        return int(np.count_nonzero(self.distinct[1:])) + (self.words > 0)


@dataclass(frozen=True, order=True)
class Shape:
    """Padded sizes of a batch: time steps T and distinct tokens K."""

    steps: int
    distinct: int


class Batches:
    """The batches of a split, epoch by epoch, for training or (in_order=True) for evaluation.

    Only the last max_length words of a review are read. The shapes are chosen for this split unless
    `shapes` is given; its last shape must fit every review. With shares > 1, a batch is divided
    into shares, each a Batch; the shapes are then those of a share.
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
        """longest: a review length that the shapes must fit (the other split's longest). ngrams: N
        if the split has ratios of 1- to N-grams."""
        self.split = split
        self.batch_size, self.shares = batch_size, shares
        self.rows = math.ceil(batch_size / shares)  # rows of a share
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
        """The number of batches in an epoch."""
        return math.ceil(len(self.split) / self.batch_size)

    def plan(self, epoch: int) -> Int32[np.ndarray, "batches B"]:
        """The indices of the reviews in each batch of an epoch; -1 pads the last batch.

        Plans of a large split are memory-mapped from the cache, which keeps this epoch's plan and
        the previous one.
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
        except FileNotFoundError:  # removed by a process that is two epochs ahead
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
        """The batches of an epoch in order, from number `start`."""
        return map(self.batch, self.plan(epoch)[start:])

    def words(self, rows: Int[np.ndarray, " B"]) -> int:
        """The number of words read of these reviews."""
        return int(self.lengths[rows[rows >= 0]].sum())

    def share(self, rows: Int[np.ndarray, " B"], number: int) -> Batch:
        """A share of a batch; it takes every `shares`-th review, so lengths are alike in all."""
        members = rows[number :: self.shares]
        padding = np.full(self.rows - len(members), -1)
        return self.batch(np.append(members, padding), number)

    def batch(self, rows: Int[np.ndarray, " B"], share: int = 0) -> Batch:
        """The batch of these reviews (indices into the split; -1 for a padding row)."""
        rows = rows.astype(np.int64)
        distinct, tokens, lengths = pad(self._texts(rows), self.shapes, self._position)
        labels = np.where(rows >= 0, self.split.labels[rows], NO_LABEL).astype(np.int32)
        ratios = self._ratios(rows, len(tokens)) if self.ngrams else None
        return Batch(distinct, tokens, lengths, labels, rows, share, ratios=ratios)

    def _ranges(self, rows: Int64[np.ndarray, " B"]) -> list[tuple[int, int]]:
        """The token range read of each review; empty for a padding row."""
        ends = self.split.starts[rows] + self.split.lengths[rows]
        starts = ends - np.where(rows >= 0, self.lengths[rows], 0)
        return list(zip(starts.tolist(), ends.tolist(), strict=True))

    def _texts(self, rows: Int64[np.ndarray, " B"]) -> list[Int64[np.ndarray, " words"]]:
        # intp, because `batch` indexes with a text twice and NumPy would convert it each time.
        ranges, texts = self._ranges(rows), []
        for first in range(0, len(ranges), _MAPPED):
            part = ranges[first : first + _MAPPED]
            texts += [self.split.read(start, end).astype(np.intp) for start, end in part]
            self.split.release()
        return texts

    def _ratios(self, rows: Int64[np.ndarray, " B"], steps: int) -> Float32[np.ndarray, "T B E"]:
        assert self.split.ratios is not None
        ratios = np.zeros((steps, len(rows), self.split.ratios.shape[1]), np.float32)
        for column, (start, end) in enumerate(self._ranges(rows)):
            ratios[: end - start, column] = self.split.ratios[start:end]
        by_order = ratios.reshape(*ratios.shape[:2], self.ngrams, -1)
        for n in range(1, self.ngrams):
            by_order[:n, :, n] = 0  # n-grams that begin before the first word read
        return ratios

    def _choose_shapes(self, longest: int) -> list[Shape]:
        """At most MAX_SHAPES ascending shapes; the last fits any batch, the others typical ones."""
        longest = max(longest, int(self.lengths.max(initial=0)), 1)
        longest = min(longest, self.limit or longest)
        if self.rows == 1:  # few words repeat within one review
            return [Shape(edge, edge) for edge in _edges(self.lengths, longest, MAX_SHAPES)]
        largest = Shape(longest, longest * self.rows)
        edges = _edges(self.lengths, longest, MAX_SHAPES - 1)
        max_distinct = dict.fromkeys(edges, 1)
        plan = self.plan(0)
        for rows in plan[:: math.ceil(len(plan) / _SAMPLE) or 1, :: self.shares]:
            texts = self._texts(rows)
            edge = next(edge for edge in edges if edge >= max(map(len, texts)))
            max_distinct[edge] = max(max_distinct[edge], len(_distinct(texts)))
        shapes: list[Shape] = []
        for edge in edges:
            # 10 % above the sample, a multiple of 64; a longer shape never holds fewer tokens.
            margin = math.ceil(max_distinct[edge] * 1.1 / 64) * 64
            floor = shapes[-1].distinct if shapes else 1
            shapes.append(Shape(edge, min(max(margin, floor), edge * self.rows)))
        return [*shapes, largest] if largest != shapes[-1] else shapes


def pad(
    texts: Sequence[Int[np.ndarray, " words"]],
    shapes: Sequence[Shape],
    positions: Int32[np.ndarray, " V"],
) -> tuple[Int32[np.ndarray, " K"], Int32[np.ndarray, "T B"], Int32[np.ndarray, " B"]]:
    """The distinct, tokens and lengths of a batch, padded to the first shape that fits the texts.

    positions: scratch memory, which is overwritten.
    """
    distinct = _distinct(texts)
    lengths = np.array([len(text) for text in texts], np.int32)
    longest, K = lengths.max(initial=0), len(distinct)
    shape = next(s for s in shapes if s.steps >= longest and s.distinct >= K)
    positions[distinct] = np.arange(K, dtype=np.int32)
    tokens = np.zeros((shape.steps, len(texts)), np.int32)
    for column, text in enumerate(texts):
        tokens[: len(text), column] = positions[text]
    return np.append(distinct, np.zeros(shape.distinct - K, np.int32)), tokens, lengths


def _distinct(texts: Sequence[Int[np.ndarray, " words"]]) -> Int32[np.ndarray, " distinct"]:
    # np.unique is several times slower.
    ordered = np.sort(np.concatenate(texts))
    return ordered[np.diff(ordered, prepend=-1) > 0].astype(np.int32)


def _edges(lengths: Int32[np.ndarray, " N"], longest: int, max_edges: int) -> list[int]:
    """At most max_edges padded lengths, the last `longest`, that minimize the padding.

    Dynamic programming over at most 256 quantiles of the lengths: the optimal k edges up to a
    candidate extend the optimal k - 1 edges up to an earlier one.
    """
    # Quantiles by counting: sorting millions of lengths takes hundreds of MB.
    up_to = np.cumsum(np.bincount(np.maximum(lengths, 1), minlength=longest + 1))
    ranks = np.ceil(np.linspace(0, 1, 256) * (len(lengths) - 1))
    quantiles = np.searchsorted(up_to, ranks, side="right")
    candidates = np.unique(np.append(quantiles, longest))
    # Each review with a length in (candidate[i - 1], candidate[j]] costs candidate[j] steps.
    below = up_to[[0, *candidates]]
    cost = (below[None, 1:] - below[:-1, None]) * candidates[None, :].astype(float)
    cost[np.tril_indices(len(candidates), -1)] = np.inf
    best, back = cost[0], []
    for _ in range(min(max_edges, len(candidates)) - 1):
        # best[i - 1] is the cost of all lengths below candidate i; the next edge is j >= i.
        total = np.concatenate([[np.inf], best[:-1]])[:, None] + cost
        back.append(total.argmin(axis=0))
        best = total.min(axis=0)
    edges = [len(candidates) - 1]
    for start in reversed(back):
        edges.append(int(start[edges[-1]]) - 1)
    return candidates[edges[::-1]].tolist()
