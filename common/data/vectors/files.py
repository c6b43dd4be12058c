"""Reads files of word vectors; the format is detected from the content, compressed or not.

gensim reads these formats too, but it loads every word into memory, trusts headers, does not locate
errors, and unpickles .kv files without restrictions.
"""

import io
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
from isal import igzip  # three times as fast as gzip
from isal.igzip_lib import IsalError
from jaxtyping import Float

from common.data.vectors import binary, keyed_vectors, tensors, text
from common.data.vectors.lookup import find
from common.errors import InputError

# Bytes of a pickle. KeyedVectors.save writes large vectors to another file; the pickle of the
# 3,000,000 words of GoogleNews is a tenth of this.
MAX_PICKLE = 2**30
MAX_UNPACKED = 16 * 2**30  # bytes of a compressed table, which is unpacked to a temporary file
_HEAD = 65_536
_UNSUPPORTED = {
    b"PK\x03\x04": "a zip archive: unpack it, and name the file inside",
    b"\x93NUMPY": "a .npy file, which has no words: name the .kv file that it belongs to",
    b"\xba\x16\x4f\x2f": "a fastText model: name the .vec file that comes with it",
    b"\x89HDF": "an HDF5 file, which is not supported",
    b"BZh": "compressed with bzip2: unpack it, or compress it with gzip",
    b"\xfd7zXZ": "compressed with xz: unpack it, or compress it with gzip",
    b"\xff\xfe": "UTF-16, expected UTF-8",
    b"\xfe\xff": "UTF-16, expected UTF-8",
}


def read(path: Path, vocabulary: Iterable[str]) -> tuple[list[str], Float[np.ndarray, "V D"]]:
    """The words of the vocabulary in the file, and their vectors, in the file's order.

    The file is read once, as a stream; in memory are only matching vectors, and the words of a
    table (.kv, .safetensors). Raises InputError, with the file and the position, for a file that is
    damaged, of unknown format, or without a word of the vocabulary.
    """
    name = str(path)
    try:
        with _open(path) as file:
            head = file.read(_HEAD)
            file.seek(0)
            if not head:
                raise InputError(f"{path}: is empty")
            for magic, message in _UNSUPPORTED.items():
                if head.startswith(magic):
                    raise InputError(f"{path}: {message}")
            if tensors.looks_like(head):
                with tempfile.NamedTemporaryFile() as unpacked:
                    if compressed := not isinstance(file.raw, io.FileIO):
                        _copy(file, unpacked, MAX_UNPACKED, path)
                    table = tensors.read(path, Path(unpacked.name) if compressed else path)
                    return find(*table, vocabulary, name, "word")
            if head[0] == 0x80:  # the first opcode of a pickle of protocol 2 or later
                data = io.BytesIO()
                _copy(file, data, MAX_PICKLE, path)
                table = keyed_vectors.read(path, data.getvalue())
                return find(*table, vocabulary, name, "word")
            if binary.looks_like(head):
                return find(binary.read(file, name), binary.to_vector, vocabulary, name, "byte")
            return find(text.read(file, name), text.to_vector, vocabulary, name, "line")
    except (EOFError, IsalError, igzip.BadGzipFile) as error:  # type: ignore[misc]  # wrong stubs
        raise InputError(f"{path}: a damaged or truncated gzip file ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def dependencies(path: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of the files that `read` may open, for a cache key."""
    names = (path.name, f"{path.name.removesuffix('.gz')}.vectors.npy", "vocabulary.txt")
    existing = [file for name in names if (file := path.with_name(name)).is_file()]
    return {file.name: (file.stat().st_size, file.stat().st_mtime_ns) for file in existing}


@contextmanager
def _open(path: Path) -> Iterator[io.BufferedReader]:
    with path.open("rb") as file:
        if file.peek(2)[:2] == b"\x1f\x8b":
            with igzip.open(file) as unpacked, io.BufferedReader(unpacked, 2**20) as reader:
                yield reader
        else:
            yield file


def _copy(source: BinaryIO, target: IO[bytes], limit: int, path: Path) -> None:
    while block := source.read(2**20):
        target.write(block)
        if target.tell() > limit:
            raise InputError(f"{path}: a table of more than {limit:,} bytes")
    target.flush()
