import time

import numpy as np
import pytest

from common import corpus, datasets
from common.corpus import EncodedSplit, join
from common.text import tokenize


def test_encoding_can_be_read_back() -> None:
    data, encoded = datasets.load("rt"), corpus.load("rt")
    assert len(encoded.test) == len(data.test.texts)
    for row in range(0, len(encoded.test), 100):
        words = [encoded.vocabulary[token] for token in encoded.test[row]]
        assert words == tokenize(data.test.texts[row])


def test_a_second_start_reads_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus.load("imdb")
    monkeypatch.setattr(datasets, "load", lambda spec: pytest.fail("the cache was not used"))
    started = time.perf_counter()
    again = corpus.load("imdb")
    assert time.perf_counter() - started < 2
    assert isinstance(again.train.tokens, np.memmap)


def test_a_build_that_fails_leaves_nothing_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("GRU_TWINS_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets, "load", lambda spec: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        corpus.load("rt")
    assert not list(tmp_path.iterdir())  # type: ignore[attr-defined]


def test_vocabulary_is_sorted_by_frequency_in_training() -> None:
    encoded = corpus.load("rt")
    counts = np.bincount(encoded.train.tokens, minlength=len(encoded.vocabulary))
    assert (np.diff(counts) <= 0).all()


def test_a_subset_is_balanced_and_always_the_same(texts: EncodedSplit) -> None:
    subset = texts.subset(60)
    assert len(subset) == 60
    assert abs(subset.labels.mean() - texts.labels.mean()) < 0.02
    np.testing.assert_array_equal(subset.tokens, texts.subset(60).tokens)
    assert texts.subset(None) is texts
    originals = {(tuple(texts[i]), texts.labels[i]) for i in range(len(texts))}
    assert all((tuple(subset[i]), subset.labels[i]) in originals for i in range(60))


def test_renumber_drops_what_has_no_number() -> None:
    split = join([np.array([0, 1, 2]), np.array([1]), np.array([], int), np.array([2, 2])], [0] * 4)
    renumbered = split.renumber(np.array([7, -1, 3]))
    assert [renumbered[i].tolist() for i in range(4)] == [[7, 3], [], [], [3, 3]]
