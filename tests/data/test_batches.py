import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data import corpus
from common.data.batches import MAX_SHAPES, Batch, Batches, Shape
from common.data.corpus import EncodedSplit, join
from common.params import NO_LABEL


def content(batch: Batch) -> dict[int, tuple[list[int], int]]:
    """Each review of a batch: its words and its label."""
    return {
        int(review): (
            batch.distinct[batch.tokens[: batch.lengths[column], column]].tolist(),
            int(batch.labels[column]),
        )
        for column, review in enumerate(batch.reviews)
        if review >= 0
    }


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=60),
    batch_size=st.integers(1, 9),
    max_length=st.none() | st.integers(1, 20),
    in_order=st.booleans(),
    seed=st.integers(0, 3),
)
def test_an_epoch_has_every_review_once_and_whole(
    lengths: list[int], batch_size: int, max_length: int | None, in_order: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    split = join([rng.integers(0, 50, n) for n in lengths], rng.integers(0, 3, len(lengths)))
    batches = Batches(split, batch_size, max_length=max_length, seed=seed, in_order=in_order)
    observed: dict[int, tuple[list[int], int]] = {}
    for batch in batches.epoch(seed):
        T, B = batch.tokens.shape
        assert batch.reviews.shape == batch.labels.shape == batch.lengths.shape == (B,)
        assert batch_size == B
        assert Shape(T, len(batch.distinct)) in batches.shapes
        assert (np.diff(batch.lengths) <= 0).all()
        assert ((batch.labels == NO_LABEL) == (batch.reviews < 0)).all()
        assert not content(batch).keys() & observed.keys()
        observed |= content(batch)
    limit = max_length or 1_000
    assert observed == {
        i: (split[i][-limit:].tolist(), int(split.labels[i])) for i in range(len(lengths))
    }
    assert len(batches.shapes) <= MAX_SHAPES


def same(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in vars(a))


def test_the_order_depends_on_seed_and_epoch_alone(texts: EncodedSplit) -> None:
    first, second = Batches(texts, 16, seed=3), Batches(texts, 16, seed=3)
    assert all(map(same, first.epoch(2), second.epoch(2)))
    assert not all(map(same, first.epoch(2), first.epoch(1)))
    assert not all(map(same, first.epoch(2), Batches(texts, 16, seed=4).epoch(2)))


def test_epoch_can_be_resumed_in_the_middle(texts: EncodedSplit) -> None:
    batches = Batches(texts, 16)
    assert all(map(same, list(batches.epoch(1))[7:], batches.epoch(1, start=7)))


def test_a_batch_with_unusually_many_distinct_words_still_fits() -> None:
    few = [np.zeros(20, int)] * 640
    many = [np.arange(i * 20, i * 20 + 20) for i in range(64)]
    batches = Batches(join(few + many, [0] * 704), 32)
    everything = batches.batch(np.arange(640, 672))
    assert len(np.unique(everything.distinct)) == 640
    assert len(batches.shapes) <= MAX_SHAPES


@pytest.mark.parametrize(("size", "max_length", "batch_size"), [(4_000, 200, 32), (None, 400, 32)])
def test_little_padding_on_real_reviews(size: int | None, max_length: int, batch_size: int) -> None:
    split = corpus.load("imdb").train.subset(size)
    batches = Batches(split, batch_size, max_length=max_length)
    steps = words = distinct = 0
    for batch in batches.epoch(1):
        steps += batch.tokens.size
        words += batch.words
        distinct += len(batch.distinct)
    assert 1 - words / steps <= 0.10
    assert distinct / words <= 0.40


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="memory is read from /proc")
def test_pages_of_a_large_file_are_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, a process that has read all texts would keep the whole file in memory."""
    monkeypatch.setattr(corpus, "MAX_RESIDENT_BYTES", 0)
    split = corpus.load("rt").train
    for batch in Batches(split, 64).epoch():
        assert batch.words
    result = re.findall(
        r"^(\w+)-(\w+) .*\n(?:\w+: .*\n)*?Rss: +(\d+)", Path("/proc/self/smaps").read_text(), re.M
    )
    address = split.tokens.ctypes.data
    (resident,) = [kb for low, high, kb in result if int(low, 16) <= address < int(high, 16)]
    assert resident == "0"


def test_a_large_plan_is_shared_and_the_same(
    texts: EncodedSplit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    batches = Batches(texts, 16, seed=3)
    expected = [batches.plan(epoch) for epoch in range(4)]
    monkeypatch.setattr("common.data.batches.LARGE", 1)
    monkeypatch.setenv("GRU_TWINS_CACHE", str(tmp_path))
    for epoch, plan in enumerate(expected):
        for _ in range(2):
            assert np.array_equal(batches.plan(epoch), plan)
    monkeypatch.setattr(Batches, "_plan", pytest.fail)
    assert np.array_equal(batches.plan(3), expected[3])
    assert len(list(tmp_path.glob("plan-*"))) == 2
