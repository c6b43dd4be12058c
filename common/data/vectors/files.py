"""Files of word vectors: which format one has is told from what is in it, compressed or not.

gensim reads these formats too, but every word of a file into memory, believes what a header
promises, and its errors name no place; its .kv files it unpickles, with whatever is in them.
"""

import io
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, cast

import numpy as np
from isal import igzip  # gzip, three times as fast
from isal.igzip_lib import IsalError
from jaxtyping import Float

from common.data.vectors import binary, keyed_vectors, tensors, text
from common.data.vectors.found import Found
from common.errors import InputError

# A larger pickle has its vectors inside; KeyedVectors.save puts them into a file of their own, and
# the 3,000,000 words of GoogleNews take a tenth of this.
MAX_PICKLE = 2**30  # bytes
MAX_UNPACKED = 16 * 2**30  # bytes of a compressed table, which is unpacked into a temporary file
_HEAD = 65_536
_OTHERS = {
    b"PK\x03\x04": "a zip archive: unpack it, and give the file inside",
    b"\x93NUMPY": "a .npy file, which has no words: give the .kv file that it belongs to",
    b"\xba\x16\x4f\x2f": "a fastText model: give the .vec file that comes with it",
    b"\x89HDF": "an HDF5 file, which is not read",
    b"BZh": "compressed with bzip2: unpack it, or compress it with gzip",
    b"\xfd7zXZ": "compressed with xz: unpack it, or compress it with gzip",
    b"\xff\xfe": "UTF-16, expected UTF-8",
    b"\xfe\xff": "UTF-16, expected UTF-8",
}


def read(path: Path, vocabulary: Iterable[str]) -> tuple[list[str], Float[np.ndarray, "V D"]]:
    """The words of the vocabulary that the file has, and their vectors, in the file's order.

    The file is read once, from beginning to end; memory is needed for the vectors that are found,
    and for the words of a table (.kv, .safetensors). Raises InputError, naming the file and the
    place in it, for a file that is damaged, of no known format, or has none of the words.
    """
    name = str(path)
    try:
        with _open(path) as file:
            head = file.read(_HEAD)
        if not head:
            raise InputError(f"{name}: is empty")
        for magic, what in _OTHERS.items():
            if head.startswith(magic):
                raise InputError(f"{name}: {what}")
        if tensors.looks_like(head):
            found = Found(vocabulary, name, "word")
            with _unpacked(path) as table:
                tensors.read(path, table, found)
        elif head[0] == 0x80:  # the opcode of protocol 2 and later that a pickle begins with
            found = Found(vocabulary, name, "word")
            data = io.BytesIO()
            with _open(path) as file:
                _copy(file, data, MAX_PICKLE, name)
            keyed_vectors.read(path, data.getvalue(), found)
        elif binary.looks_like(head):
            found = Found(vocabulary, name, "byte")
            with _open(path) as file:
                binary.read(file, found)
        else:
            found = Found(vocabulary, name, "line")
            with _open(path) as file:
                text.read(file, found)
    except (EOFError, IsalError, igzip.BadGzipFile) as error:  # type: ignore[misc]  # whose stubs are wrong
        raise InputError(f"{name}: a damaged or cut-short gzip file ({error})") from None
    except OSError as error:
        raise InputError(f"{name}: {error.strerror or error}") from None
    return found.result()


def dependencies(path: Path) -> dict[str, tuple[int, int]]:
    """The files that `read` may look at, with size and time of change: what a cache depends on."""
    beside = (path.name, f"{path.name.removesuffix('.gz')}.vectors.npy", "vocabulary.txt")
    found = {name: path.with_name(name) for name in beside}
    return {
        name: (file.stat().st_size, file.stat().st_mtime_ns)
        for name, file in found.items()
        if file.is_file()
    }


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    with path.open("rb") as file:
        if file.peek(2)[:2] == b"\x1f\x8b":
            with igzip.open(file) as unpacked, io.BufferedReader(unpacked, 2**20) as reader:
                yield cast(BinaryIO, reader)
        else:
            yield file


@contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """The file itself, or a temporary one with what it has compressed."""
    with path.open("rb") as file:
        if file.peek(2)[:2] != b"\x1f\x8b":
            yield path
            return
    with _open(path) as reader, tempfile.NamedTemporaryFile() as file:
        _copy(reader, file, MAX_UNPACKED, str(path))
        file.flush()
        yield Path(file.name)


def _copy(source: BinaryIO, target: IO[bytes], limit: int, name: str) -> None:
    copied = 0
    while block := source.read(2**20):
        copied += len(block)
        if copied > limit:
            raise InputError(f"{name}: a table of more than {limit:,} bytes")
        target.write(block)
