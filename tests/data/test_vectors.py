"""Word vectors: trained on the texts, random, and read from files of every format."""

import gzip
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gensim.models import KeyedVectors
from safetensors.numpy import save_file

from common.data import corpus, vectors
from common.data.vectors import files
from common.errors import InputError
from tools import fuzz_vectors


def quiet(line: str) -> None:
    pass


def test_word2vec_has_only_training_words_and_is_deterministic(
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
    result = vectors.load("random:12", texts, texts.train, quiet)
    assert result.matrix.shape == (len(result.words), 12)
    assert result.trained_with_model


@pytest.mark.parametrize(
    "spec", ["glove", "random", "random:", "random:0", "random:-3", "random:x"]
)
def test_unknown_vectors_are_refused(spec: str) -> None:
    with pytest.raises(InputError, match=spec):
        vectors.check(spec)


@pytest.mark.parametrize("spec", ["word2vec", "random:4"])
def test_texts_without_a_repeated_word_are_rejected(spec: str) -> None:
    texts = corpus.load("rt")
    with pytest.raises(InputError, match=f"--vectors {spec}: no word occurs 3 times in the 0 "):
        vectors.load(spec, texts, texts.train.subset(0), quiet)


WORDS = ["the", "cat", "naïve", "don't"]
MATRIX = np.random.default_rng(0).standard_normal((4, 5), np.float32)
VOCABULARY = ["don't", "cat", "dog", "naïve", "the"]


def lines(words: list[str], matrix: np.ndarray) -> str:
    return "".join(
        f"{word} {' '.join(map(str, row))}\n" for word, row in zip(words, matrix, strict=True)
    )


def written(
    format_: str, folder: Path, words: list[str] = WORDS, matrix: np.ndarray = MATRIX
) -> Path:
    """A file in this format, under a name without an extension."""
    path = folder / "file"
    keyed = KeyedVectors(matrix.shape[1])
    header = "{} {}\n".format(*matrix.shape)
    keyed.add_vectors(words, matrix)
    match format_:
        case "glove":
            path.write_text(lines(words, matrix), encoding="utf-8")
        case "fasttext":  # ends its lines with a space
            path.write_text(header + lines(words, matrix).replace("\n", " \n"), encoding="utf-8")
        case "word2vec text" | "word2vec binary":
            keyed.save_word2vec_format(str(path), binary=format_ == "word2vec binary")
        case "word2vec's own binary":  # ends a vector with a line feed, unlike gensim
            rows = zip(words, matrix, strict=True)
            path.write_bytes(
                header.encode() + b"".join(b"%b %b\n" % (w.encode(), v) for w, v in rows)
            )
        case "gensim":
            keyed.save(str(path))
        case "gensim, vectors apart":
            keyed.save(str(path), separately=["vectors"])
            assert path.with_name("file.vectors.npy").exists()
        case "safetensors":
            save_file({"vectors": matrix}, path)
            path.with_name("vocabulary.txt").write_text("".join(f"{w}\n" for w in words), "utf-8")
    return path


FORMATS = (
    *("glove", "fasttext", "word2vec text", "word2vec binary", "word2vec's own binary"),
    *("gensim", "gensim, vectors apart", "safetensors"),
)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("format_", FORMATS)
def test_every_format_is_detected_from_its_content(
    format_: str, compressed: bool, tmp_path: Path
) -> None:
    path = written(format_, tmp_path)
    if compressed:
        path = path.with_name("file.gz")
        path.write_bytes(gzip.compress(tmp_path.joinpath("file").read_bytes()))
    words, matrix = files.read(path, VOCABULARY)
    assert words == WORDS
    np.testing.assert_array_equal(matrix, MATRIX)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
def test_tables_of_other_floats_become_float32(dtype: str, tmp_path: Path) -> None:
    path = written("gensim, vectors apart", tmp_path)
    np.save(tmp_path / "file.vectors.npy", MATRIX.astype(dtype))
    _, matrix = files.read(path, VOCABULARY)
    np.testing.assert_array_equal(matrix, MATRIX.astype(dtype).astype(np.float32))


@pytest.mark.parametrize("format_", ["glove", "word2vec binary", "gensim"])
def test_exact_word_precedes_the_first_other_spelling(format_: str, tmp_path: Path) -> None:
    spellings = ["US", "Us", "Paris", "École", "us", "PARIS", "ÉCOLE"]
    matrix = np.arange(7 * 5, dtype=np.float32).reshape(7, 5)
    path = written(format_, tmp_path, spellings, matrix)
    words, result = files.read(path, ["école", "paris", "us"])
    expected = {"us": matrix[4], "paris": matrix[2], "école": matrix[3]}
    assert set(words) == set(expected)
    for word, vector in zip(words, result, strict=True):
        np.testing.assert_array_equal(vector, expected[word])


def test_words_with_spaces(tmp_path: Path) -> None:
    (tmp_path / "v").write_text("the 1 2\n. . . 3 4\nat name@domain.com 5 6\ncat 7 8\n")
    words, matrix = files.read(tmp_path / "v", ["cat", "the", "at"])
    assert words == ["the", "cat"]
    np.testing.assert_array_equal(matrix, [[1, 2], [7, 8]])


def test_fields_may_be_separated_by_any_white_space(tmp_path: Path) -> None:
    (tmp_path / "v").write_text("the 1 2\nat\t3\t4\ncat  5 6\n")
    words, matrix = files.read(tmp_path / "v", ["the", "at", "cat"])
    assert words == ["the", "at", "cat"]
    np.testing.assert_array_equal(matrix, [[1, 2], [3, 4], [5, 6]])


GLOVE = lines(WORDS, MATRIX).encode()
PACKED = MATRIX[:2].tobytes()
BAD_FILES = {
    "empty": (b"", "is empty"),
    "nothing but a header": (b"10 300\n", "byte 7: the file ends in word 1 of the 10"),
    "other words": (b"xyzzy 1 2 3\n", "no word of the data set's vocabulary"),
    "a number too few": (GLOVE + b"dog 1 2 3 4\n", "line 5: has 4 numbers, expected 5"),
    "a number too many": (GLOVE + b"dog 1 2 3 4 5 6\n", "line 5: has 6 numbers, expected 5"),
    "far down": (b"a 1 2\n" * 69_999 + b"the 1\n", "line 70,000: has 1 numbers, expected 2"),
    "an empty line": (b"a 1 2\n\nthe 1 2\n", "line 2: has 0 numbers"),
    "no number": (b"the 1 2\ncat 1 x2\n", "line 2: could not convert string to float"),
    "not finite": (b"the 1 2\ncat 1 nan\n", "line 2: the vector of cat is not finite"),
    "beyond float32": (b"the 1 1e39\n", "line 1: the vector of the is not finite"),
    "latin-1": (b"the 1 2\nna\xefve 1 2\n", "line 2: the word is not UTF-8"),
    "UTF-16": ("the 1 2\n".encode("utf-16"), "UTF-16"),
    "twice": (b"the 1 2\ncat 1 2\nthe 1 2\n", "line 3: the word the is in line 1 too"),
    "an endless line": (b"the " + b"1 " * 200_000, "line 1: longer than 324,096 bytes"),
    "dimensions": (b"5 99999999999\nthe 1 2\n", "vectors of 99,999,999,999 dimensions"),
    "words": (b"999999999999 2\nthe 1 2\n", "line 2: the file ends .* 999,999,999,999 words"),
    "more lines": (b"1 2\nthe 1 2\ncat 1 2\n", "line 3: the file ends .* 1 words"),
    "binary, cut": (b"2 5\nthe " + PACKED[:-1], "byte 47: the file ends in word 2 of the 2"),
    "binary, words": (
        b"999999999999 5\nthe " + PACKED[:20],
        "byte 39: the file ends in word 2 of the 9",
    ),
    "binary, no end": (
        b"2 5\nthe " + PACKED[:20] + b"x" * 5000,
        "byte 28: no space ends a word",
    ),
    "binary, more": (b"1 5\nthe " + PACKED, "byte 28: the file continues after the 1 words"),
    "binary, twice": (b"2 5\nthe %bthe %b" % (PACKED[:20], PACKED[20:]), "byte 28: .* byte 4 too"),
    "binary, inf": (b"1 1\nthe \x00\x00\x80\x7f", "byte 4: the vector of the is not finite"),
    "gzip, cut": (gzip.compress(GLOVE)[:-9], "truncated gzip"),
    "zip": (b"PK\x03\x04", "a zip archive: unpack it"),
    "pickle, harmful": (b"\x80\x02cos\nsystem\nU\x02lsR.", r"import os\.system"),
    "pickle, another": (b"\x80\x02}.", "not one of gensim's KeyedVectors"),
    "safetensors, cut": (b"\x60\0\0\0\0\0\0\0{", "vocabulary.txt: No such file"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_error_names_the_place_in_a_damaged_file(case: str, tmp_path: Path) -> None:
    content, complaint = BAD_FILES[case]
    (tmp_path / "v").write_bytes(content)
    with pytest.raises(InputError, match=complaint) as refused:
        files.read(tmp_path / "v", VOCABULARY)
    assert str(tmp_path) in str(refused.value)


BAD_TABLES = {
    "gone": ("gensim, vectors apart", "file.vectors.npy", None, "npy: missing"),
    "short": ("gensim, vectors apart", "file.vectors.npy", MATRIX[:3], r"\[3, 5\], but .* 4 words"),
    "ints": ("gensim, vectors apart", "file.vectors.npy", MATRIX.astype(int), "array of i8"),
    "objects": ("gensim, vectors apart", "file.vectors.npy", MATRIX.astype(object), "not a read"),
    "words": ("safetensors", "vocabulary.txt", b"the\ncat\n", r"\[4, 5\], but there are 2 words"),
    "UTF-8": ("safetensors", "vocabulary.txt", b"the\nna\xefve\n", "byte 6: not UTF-8"),
    "cut": ("safetensors", "file", b"\x60\0\0\0\0\0\0\0{", "not a safetensors file"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_tables_that_do_not_fit_their_words_are_refused(case: str, tmp_path: Path) -> None:
    format_, name, content, complaint = BAD_TABLES[case]
    path = written(format_, tmp_path)
    match content:
        case None:
            (tmp_path / name).unlink()
        case bytes():
            (tmp_path / name).write_bytes(content)
        case _:
            np.save(tmp_path / name, content)
    with pytest.raises(InputError, match=complaint):
        files.read(path, VOCABULARY)


@pytest.mark.parametrize("format_", ["word2vec binary", "gensim, vectors apart", "safetensors"])
def test_memory_does_not_grow_with_the_file(format_: str, tmp_path: Path) -> None:
    """Of a file of 48 MB, only the words remain in memory."""
    words = [f"w{number}" for number in range(20_000)]
    path = written(format_, tmp_path, words, np.ones((20_000, 600), np.float32))
    tracemalloc.start()
    try:
        files.read(path, words[::100])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 * 2**20


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_gensims_file_of_every_protocol_is_read(protocol: int, tmp_path: Path) -> None:
    words = [f"word{number}" for number in range(70_000)]  # numbers of one, two and four bytes
    keyed = KeyedVectors(1)
    keyed.add_vectors(words, np.arange(70_000, dtype=np.float32)[:, None])
    keyed.save(str(tmp_path / "v"), pickle_protocol=protocol)
    result, matrix = files.read(tmp_path / "v", words[::7])
    assert result == words[::7]
    assert matrix[:, 0].tolist() == list(range(0, 70_000, 7))


@pytest.mark.parametrize("count", [100, pytest.param(300, marks=pytest.mark.long)])
@pytest.mark.parametrize("format_", fuzz_vectors.formats())
def test_damaged_files_are_refused_and_nothing_else(
    format_: str, count: int, tmp_path: Path
) -> None:
    tracemalloc.start()
    try:
        outcome = fuzz_vectors.attack(format_, count, tmp_path, seed=1)
    finally:
        tracemalloc.stop()
    assert outcome["rejected"] > 0
    assert outcome["read"] > 0 or "gzip" in format_  # which has a checksum


def test_vectors_of_a_file_are_cached_until_the_file_changes(tmp_path: Path) -> None:
    texts = corpus.load("rt")
    path = tmp_path / "glove.txt"
    path.write_text("the 1 2\nfilm 3 4\nxyzzy 5 6\n")
    output: list[str] = []
    first = vectors.load(str(path), texts, texts.train, output.append)
    assert first.words == ["the", "film"]
    assert not first.trained_with_model
    again = vectors.load(str(path), texts, texts.train, output.append, train_with_model=True)
    np.testing.assert_array_equal(again.matrix, first.matrix)
    assert again.trained_with_model
    assert [line.startswith("reading") for line in output] == [True, False, False]

    ids = [texts.vocabulary.index(word) for word in first.words]
    counts = texts.train.counts()
    share = counts[ids].sum() / counts.sum()
    assert output[1] == (
        f"{path}: vectors for 2 of the {len(texts.vocabulary):,} words of rt (0.0%), "
        f"{share:.1%} of the training tokens"
    )
    assert 0.05 < share < 0.1

    path.write_text("the 1 2\nmovie 3 4\n")
    assert vectors.load(str(path), texts, texts.train, quiet).words == ["the", "movie"]


def test_a_bad_file_leaves_no_cache_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("GRU_TWINS_CACHE", str(cache))
    texts = corpus.load("rt")
    texts.train.counts()  # which are kept, too
    before = set(cache.iterdir())
    (tmp_path / "v").write_text("the 1 2\nfilm 1\n")
    with pytest.raises(InputError, match="line 2"):
        vectors.load(str(tmp_path / "v"), texts, texts.train, quiet)
    assert set(cache.iterdir()) == before


GLOVE_SAMPLE = Path("../shared/data/vectors/glove.6B.100d.top30k.txt.gz")


@pytest.mark.skipif(not GLOVE_SAMPLE.exists(), reason=f"{GLOVE_SAMPLE} is not there")
def test_glove_sample_is_read_quickly() -> None:
    texts = corpus.load("rt")
    started = time.perf_counter()
    result = vectors.load(str(GLOVE_SAMPLE), texts, texts.train, quiet)
    assert time.perf_counter() - started < 3
    assert result.matrix.shape == (len(result.words), 100)
    assert len(result.words) > 10_000
    the = result.matrix[result.words.index("the")]
    np.testing.assert_allclose(the[:3], [-0.0382, -0.2449, 0.7281])
