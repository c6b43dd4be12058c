"""The sentiment archives of DLStudio (Avinash Kak, Purdue), versions 2.2 to 2.5.

    dlstudio:TRAIN_ARCHIVE,TEST_ARCHIVE

A .tar.gz that holds no tar: a gzipped pickle, written by Python 2, of (positive, negative,
vocabulary), the first two category -> list of reviews, a review a list of words.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from isal import igzip  # gzip, three times as fast
from isal.igzip_lib import IsalError

from common.data.sources import files
from common.data.sources.dataset import Dataset, Example
from common.data.unpickle import restricted_loads
from common.errors import InputError

CLASSES = ("negative", "positive")

# An archive is in memory as a whole. 20,000 reviews, more than any of DLStudio's archives has,
# unpack to about 45 MB; what unpacks to more than this is not one of them.
MAX_UNPACKED = 2**28


def load(spec: str) -> Dataset:
    """The training archive's reviews, then the test archive's, each class as the archive has it."""
    paths, _ = files.parse(spec, most=2)
    if len(paths) != 2:
        raise InputError(f"--data {spec}: expected two archives, dlstudio:TRAIN,TEST")

    def examples() -> Iterator[Example]:
        for path, split in zip(paths, ("train", "test"), strict=True):
            yield from _examples(path, split)

    return Dataset(spec, examples, CLASSES, state=files.state(paths))


def _examples(path: Path, split: str) -> Iterator[Example]:
    # Decoding each word, not each review, would take an eighth longer.
    content = restricted_loads(_unpacked(path), str(path), encoding="bytes")
    match content:
        case [dict(positive), dict(negative), *_]:
            pass
        case _:
            raise InputError(f"{path}: expected a pickle of (positive, negative, vocabulary)")
    # A pickle can refer to one word, or to one review, any number of times.
    characters_left = 4 * MAX_UNPACKED
    for label, categories in (("positive", positive), ("negative", negative)):
        for name, reviews in categories.items():
            if not isinstance(name, str | bytes) or not isinstance(reviews, list):
                raise InputError(
                    f"{path}: {label}: expected a list of reviews for each name of a category"
                )
            category = _joined([name])
            for number, words in enumerate(reviews):
                try:
                    if not isinstance(words, list):
                        raise TypeError
                    characters_left -= 1 + sum(map(len, words)) + len(words)
                    if characters_left < 0:
                        most = 4 * MAX_UNPACKED // 2**20
                        raise InputError(f"{path}: more than {most:,} MiB of text")
                    yield Example(_joined(words), label, category, split)
                except TypeError:
                    raise InputError(
                        f"{path}: {label}, {category}, review {number:,}: expected a list of words"
                    ) from None


def _joined(words: list) -> str:
    """The words as a text; Python 2's are bytes in whatever encoding, or some of them are."""
    with suppress(TypeError):  # as they all are in most archives
        return files.decode(b" ".join(words))
    texts = [files.decode(word) if isinstance(word, bytes) else word for word in words]
    return files.without_surrogates(" ".join(texts))


def _unpacked(path: Path) -> bytes:
    with files.open_file(path) as packed:
        try:
            with igzip.open(packed) as unpacked:
                data = unpacked.read(MAX_UNPACKED + 1)
        except EOFError:
            cut = f"the archive is cut short: it ends at byte {packed.tell():,}"
            raise InputError(f"{path}: {cut}") from None
        except (OSError, IsalError) as error:  # type: ignore[misc]  # whose stubs are wrong
            raise InputError(f"{path}: before byte {packed.tell():,}: {error}") from None
    if len(data) > MAX_UNPACKED:
        raise InputError(f"{path}: unpacks to more than {MAX_UNPACKED // 2**20} MiB")
    return data
