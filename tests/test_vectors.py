import numpy as np
import pytest

from common import corpus, vectors
from common.errors import InputError


def quiet(line: str) -> None:
    pass


def test_word2vec_knows_the_training_words_alone_and_is_the_same_every_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    texts = corpus.load("rt")
    train = texts.train.subset(300)
    first = vectors.load("word2vec", texts, train, quiet)
    tokens = np.concatenate([train[text] for text in range(len(train))])
    counts = np.bincount(tokens, minlength=len(texts.vocabulary))
    frequent = {texts.vocabulary[i] for i in np.flatnonzero(counts >= 3)}
    assert set(first.words) == frequent
    assert first.matrix.shape == (len(frequent), 300)
    assert first.matrix.std() == pytest.approx(vectors.STANDARD_DEVIATION, rel=1e-3)
    assert not first.trained_with_model

    monkeypatch.setenv("GRU_TWINS_CACHE", str(tmp_path))  # trains it anew
    corpus_again = corpus.load("rt")
    second = vectors.load("word2vec", corpus_again, train, quiet)
    np.testing.assert_array_equal(first.matrix, second.matrix)


def test_other_training_texts_give_other_vectors() -> None:
    texts = corpus.load("rt")
    first = vectors.load("word2vec", texts, texts.train.subset(300), quiet)
    second = vectors.load("word2vec", texts, texts.train.subset(310), quiet)
    assert first.words != second.words


def test_random_vectors_are_trained_with_the_model() -> None:
    texts = corpus.load("rt")
    found = vectors.load("random:12", texts, texts.train, quiet)
    assert found.matrix.shape == (len(found.words), 12)
    assert found.trained_with_model


@pytest.mark.parametrize(
    "spec", ["glove", "random", "random:", "random:0", "random:-3", "random:x"]
)
def test_unknown_vectors_are_refused(spec: str) -> None:
    with pytest.raises(InputError, match=spec):
        vectors.check(spec)


@pytest.mark.parametrize("spec", ["word2vec", "random:4"])
def test_texts_without_a_word_that_recurs_are_refused(spec: str) -> None:
    texts = corpus.load("rt")
    with pytest.raises(InputError, match=f"--vectors {spec}: no word occurs 3 times in the 0 "):
        vectors.load(spec, texts, texts.train.subset(0), quiet)
