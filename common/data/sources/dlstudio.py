"""The sentiment archives of DLStudio (Avinash Kak, Purdue), versions 2.2 to 2.5.

    dlstudio:TRAIN_ARCHIVE,TEST_ARCHIVE

The .tar.gz is not a tar but a gzipped pickle of Python 2: (positive, negative, vocabulary). The
first two are dicts from category to a list of reviews; a review is a list of words.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from isal import igzip  # three times as fast as gzip
from isal.igzip_lib import IsalError

from common.data.sources import files
from common.data.sources.dataset import Dataset, Example
from common.data.unpickle import restricted_loads
from common.errors import InputError

CLASSES = ("negative", "positive")

# Bytes of an archive, which is unpacked in memory. DLStudio's archives have fewer than 20,000
# reviews; those unpack to about 45 MB.
MAX_UNPACKED = 2**28


def load(spec: str) -> Dataset:
    """The reviews of the training archive, then of the test archive, in the archive's order."""
    paths, _ = files.parse(spec, most=2)
    if len(paths) != 2:
        raise InputError(f"--data {spec}: expected two archives, dlstudio:TRAIN,TEST")

    def examples() -> Iterator[Example]:
        for path, split in zip(paths, ("train", "test"), strict=True):
            yield from _examples(path, split)

    return Dataset(spec, examples, CLASSES, state=files.state(paths))


def _examples(path: Path, split: str) -> Iterator[Example]:
    # Words stay bytes; decoding each word instead of each review takes an eighth longer.
    content = restricted_loads(_unpacked(path), str(path), encoding="bytes")
    match content:
        case [dict(positive), dict(negative), *_]:
            pass
        case _:
            raise InputError(f"{path}: expected a pickle of (positive, negative, vocabulary)")
    # A pickle can reference a word or a review any number of times.
    characters_left = 4 * MAX_UNPACKED
    for label, categories in (("positive", positive), ("negative", negative)):
        for name, reviews in categories.items():
            if not isinstance(name, str | bytes) or not isinstance(reviews, list):
                raise InputError(f"{path}: {label}: expected a list of reviews for each category")
            category = _joined([name])
            for number, words in enumerate(reviews):
                try:
                    if not isinstance(words, list):
                        raise TypeError
                    characters_left -= 1 + sum(map(len, words)) + len(words)
                    if characters_left < 0:
                        limit = 4 * MAX_UNPACKED // 2**20
                        raise InputError(f"{path}: more than {limit:,} MiB of text")
                    yield Example(_joined(words), label, category, split)
                except TypeError:
                    raise InputError(
                        f"{path}: {label}, {category}, review {number:,}: expected a list of words"
                    ) from None


def _joined(words: list) -> str:
    """The words, str or bytes of any encoding, as a text."""
    with suppress(TypeError):  # in most archives, all words are bytes
        return files.decode(b" ".join(words))
    texts = [files.decode(word) if isinstance(word, bytes) else word for word in words]
    return files.without_surrogates(" ".join(texts))


def _unpacked(path: Path) -> bytes:
    with files.open_file(path, packed=True) as packed:
        try:
            with igzip.open(packed) as unpacked:
                data = unpacked.read(MAX_UNPACKED + 1)
        except EOFError:
            end = packed.tell()
            raise InputError(f"{path}: the archive is truncated at byte {end:,}") from None
        except (OSError, IsalError) as error:  # type: ignore[misc]  # wrong stubs
            raise InputError(f"{path}: before byte {packed.tell():,}: {error}") from None
    if len(data) > MAX_UNPACKED:
        raise InputError(f"{path}: unpacks to more than {MAX_UNPACKED // 2**20} MiB")
    return data
