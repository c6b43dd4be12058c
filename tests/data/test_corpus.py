import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data import corpus, sources
from common.data.corpus import Corpus, EncodedSplit, join
from common.data.sources.dataset import Dataset, Example
from common.data.text import clean, tokenize
from common.errors import InputError

Encode = Callable[..., Corpus]


@pytest.fixture
def encode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Encode:
    """Encode a list of examples, in a cache of its own."""
    monkeypatch.setenv("GRU_TWINS_CACHE", str(tmp_path / "cache"))

    def run(examples: list[Example], **options: object) -> Corpus:
        dataset = Dataset("mine", lambda: iter(examples), **options)  # type: ignore[arg-type]
        return corpus.encoded(lambda: dataset, {"examples": repr((examples, options))})

    return run


def texts_of(encoded: Corpus, split: EncodedSplit) -> list[str]:
    return [" ".join(encoded.vocabulary[token] for token in split[i]) for i in range(len(split))]


def test_encoding_can_be_read_back() -> None:
    encoded = corpus.load("rt")
    result = Counter()
    for split in (encoded.train, encoded.test):
        labels = [encoded.classes[label] for label in split.labels]
        result.update(zip(texts_of(encoded, split), labels, strict=True))
    assert result == Counter(
        (" ".join(tokenize(clean(text))), label)
        for text, label, *_ in sources.load("rt").examples()
    )


def test_a_second_start_reads_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus.load("imdb")
    monkeypatch.setattr(sources, "load", lambda spec: pytest.fail("the cache was not used"))
    started = time.perf_counter()
    again = corpus.load("imdb")
    assert time.perf_counter() - started < 2
    # The tokens are mapped, and splits and subsets are views of them.
    assert again.train.tokens is again.test.subset(10).tokens
    assert not again.train.tokens.flags.owndata


def test_a_build_that_fails_leaves_nothing_in_the_cache(encode: Encode, tmp_path: Path) -> None:
    def fails() -> Iterator[Example]:
        yield Example("a text", "a")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        corpus.encoded(lambda: Dataset("mine", fails), {})
    assert not list((tmp_path / "cache").iterdir())


def test_vocabulary_is_sorted_by_frequency_in_training() -> None:
    encoded = corpus.load("rt")
    assert (np.diff(encoded.train.counts()) <= 0).all()


# Sizes, and CRC-32 of the texts' lengths as commit f5ace5b split them.
@pytest.mark.parametrize(
    ("spec", "sizes", "checksums"),
    [
        ("imdb", (20_000, 5_000), (1965580554, 2634733182)),
        ("rt", (6_824, 1_706), (1264890093, 2095861806)),
    ],
)
def test_splits_are_stratified_share_no_text_and_are_those_of_before(
    spec: str, sizes: tuple[int, int], checksums: tuple[int, int]
) -> None:
    encoded = corpus.load(spec)
    splits = (encoded.train, encoded.test)
    assert tuple(map(len, splits)) == sizes
    assert tuple(zlib.crc32(split.lengths.tobytes()) for split in splits) == checksums
    for split in splits:
        assert abs(split.labels.mean() - 0.5) < 0.005


def test_a_text_that_occurs_twice_is_in_training(encode: Encode) -> None:
    once = [Example(f"text {i}", "ab"[i % 2]) for i in range(40)]
    twice = [Example(text, "a") for text in ("again <i>and</i>", "again  and", "again", "again\n")]
    encoded = encode(once + twice * 3, test_size=10)
    assert len(encoded.test) == 10
    assert not any("again" in text for text in texts_of(encoded, encoded.test))
    assert not set(texts_of(encoded, encoded.train)) & set(texts_of(encoded, encoded.test))


def test_splits_and_subsets_are_stratified_by_category_and_label(encode: Encode) -> None:
    kinds = [("books", "bad"), ("books", "good"), ("dvd", "bad"), ("dvd", "good")]
    sizes = [400, 40, 80, 200]
    examples = [
        Example(f"{category} {label} {i}", label, category)
        for (category, label), size in zip(kinds, sizes, strict=True)
        for i in range(size)
    ]
    encoded = encode([*examples, Example("alone", "good", "toys")])
    assert encoded.categories == ("books", "dvd", "toys")
    for split, share in ((encoded.test, 5), (encoded.train.subset(288), 2.5)):
        assert split.categories is not None
        result = Counter(
            (encoded.categories[c], encoded.classes[y])
            for c, y in zip(split.categories, split.labels, strict=True)
        )
        for kind, size in zip(kinds, sizes, strict=True):
            assert abs(result[kind] - size / share) <= 1
    assert "alone" in texts_of(encoded, encoded.train)


def test_the_split_of_the_source_is_taken(encode: Encode) -> None:
    encoded = encode(
        [Example(f"word{i}", str(i % 3), "", "test" if i % 4 == 1 else "train") for i in range(24)]
    )
    assert texts_of(encoded, encoded.test) == [f"word{i}" for i in range(1, 24, 4)]
    assert encoded.classes == ("0", "1", "2")
    assert encoded.categories == () and encoded.train.categories is None


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["10", "9", "-1.5"], ("-1.5", "9", "10")),
        (["10", "9", "b"], ("10", "9", "b")),
        (["1", "nan"], ("1", "nan")),
    ],
)
def test_classes_are_sorted(labels: list[str], classes: tuple[str, ...], encode: Encode) -> None:
    examples = [Example(f"{label} {i}", label) for label in labels for i in range(10)]
    encoded = encode(examples)
    assert encoded.classes == classes
    for text, label in zip(texts_of(encoded, encoded.train), encoded.train.labels, strict=True):
        assert text.split()[0] == tokenize(classes[label])[0]


def some(count: int, label: str, split: str = "") -> list[Example]:
    return [Example(f"{label} {split} {i}", label, "", split) for i in range(count)]  # type: ignore[arg-type]


UNUSABLE = {
    "no text": ([], {}, "no text at all"),
    "no word": ([Example("?", "a"), Example("", "b")], {}, "no text has a word"),
    "one class": (some(20, "a"), {}, "only one class, 'a'"),
    "a label once": (some(20, "a") + some(20, "b") + some(1, "c"), {}, "label 'c' occurs once"),
    "unknown label": (some(9, "a") + some(9, "c"), {"classes": ("a", "b")}, "label 'c' is none of"),
    "no test": (some(5, "a", "train") + some(5, "b", "train"), {}, "the test split is empty"),
    "no train": (some(5, "a", "test") + some(5, "b", "test"), {}, "the train split is empty"),
    "half split": (some(5, "a", "train") + some(5, "b"), {}, "5 of 10 texts are in neither"),
    "too few": (some(5, "a") + some(5, "b"), {"test_size": 10}, "the 10 of 10 that occur once$"),
    "all the same": (
        [Example("same", "ab"[i % 2]) for i in range(9)],
        {},
        "from the 0 of 9 that occur once; a text with copies stays in training",
    ),
    "no word to train on": (
        [Example("?", "a", "", "train"), Example("word", "b", "", "test")],
        {},
        "no text to train on has a word",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_data_gets_one_clear_line(case: str, encode: Encode, tmp_path: Path) -> None:
    examples, options, message = UNUSABLE[case]
    with pytest.raises(InputError, match=f"^mine: .*{message}") as caught:
        encode(examples, **options)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").iterdir())


def test_a_subset_is_balanced_and_always_the_same(texts: EncodedSplit) -> None:
    subset = texts.subset(60)
    assert len(subset) == 60
    assert abs(subset.labels.mean() - texts.labels.mean()) < 0.02
    np.testing.assert_array_equal(subset.starts, texts.subset(60).starts)
    assert texts.subset(None) is texts
    assert len({texts.name, subset.name, texts.subset(61).name}) == 3
    originals = {(tuple(texts[i]), texts.labels[i]) for i in range(len(texts))}
    assert all((tuple(subset[i]), subset.labels[i]) in originals for i in range(60))


@settings(max_examples=40, deadline=None)
@given(
    words=st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=12),
    block=st.integers(1, 20),
    new_ids=st.lists(st.integers(-1, 5), min_size=10, max_size=10),
)
def test_renumber_and_counts_go_over_all_texts_block_by_block(
    words: list[list[int]], block: int, new_ids: list[int]
) -> None:
    split = join([np.array(text, int) for text in words], [0] * len(words))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_BLOCK", block)
        # The hypothesis examples share a cache: what an earlier block size gave would be found.
        patch.setattr(corpus, "cached", lambda kind, key, build, by_block=(): uncached(build))
        renumbered, counts = split.renumber(np.array(new_ids)), split.counts()
    expected = [[new_ids[word] for word in text if new_ids[word] >= 0] for text in words]
    assert [renumbered[i].tolist() for i in range(len(words))] == expected
    assert renumbered.vocabulary_size == max(new_ids) + 1
    flat = np.array([word for text in words for word in text], int)
    assert counts.tolist() == np.bincount(flat, minlength=split.vocabulary_size).tolist()


def uncached(build: Callable[[Path], None]) -> Path:
    import tempfile

    folder = Path(tempfile.mkdtemp())
    build(folder)
    return folder


def test_renumbered_texts_come_from_the_cache_the_second_time(
    texts: EncodedSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_ids = np.arange(texts.vocabulary_size) - 5
    first = texts.renumber(new_ids)
    monkeypatch.setattr(EncodedSplit, "blocks", lambda self: pytest.fail("read again"))
    second = texts.renumber(new_ids)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    np.testing.assert_array_equal(first.starts, second.starts)
