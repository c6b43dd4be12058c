"""The binary format of word2vec, for example GoogleNews-vectors-negative300.bin.

A line with the number of words V and of dimensions D, then V times: the word, a space, D
little-endian float32 numbers and, in files of the original program, a line feed. That program
truncates long words at a byte, so a word may be invalid UTF-8; no vocabulary contains such a word.
"""

from typing import BinaryIO

import numpy as np

from common.data.vectors.lookup import MAX_WORD, Entries, check_dimension
from common.data.vectors.text import HEADER
from common.errors import InputError

_BLOCK = 4 * 2**20


def looks_like(head: bytes) -> bool:
    """Whether `head` begins a binary file: a header, and bytes that text does not contain."""
    line, _, rest = head.partition(b"\n")
    header = HEADER.fullmatch(line)
    if header is None:
        return False
    _, _, numbers = rest.partition(b" ")
    numbers = numbers[: 4 * int(header[2])].split(b"\n")[0].strip()
    return not numbers or any(not 32 <= byte < 127 for byte in numbers.replace(b"\t", b" "))


def read(file: BinaryIO, name: str) -> Entries:
    """The entries of `file`, located by byte; `name` is its name for errors.

    Raises InputError with the byte if the number of words is not that of the header.
    """

    def error(position: int, message: str) -> InputError:
        return InputError(f"{name}: byte {position:,}: {message}")

    first = file.readline(2**16)  # looks_like has validated this header
    V, D = map(int, first.split())
    check_dimension(name, D)
    data, start, before = b"", 0, len(first)  # before: the offset of `data` in the file
    for number in range(1, V + 1):
        space = data.find(b" ", start, start + MAX_WORD)
        end = space + 1 + 4 * D
        if space < 0 or end > len(data):
            before, data, start = before + start, data[start:] + file.read(_BLOCK), 0
            space = data.find(b" ", 0, MAX_WORD)
            end = space + 1 + 4 * D
            if len(data) > MAX_WORD > 0 > space:
                raise error(before, f"no space ends a word within {MAX_WORD:,} bytes")
            if space < 0 or end > len(data):
                message = f"the file ends in word {number:,} of the {V:,} of its header"
                raise error(before + len(data), message)
        yield before + start, data[start:space].lstrip(b"\n"), (data, D, space + 1)
        start = end
    rest = data[start:] + file.read(2)
    if rest.strip(b"\n"):
        raise error(before + start, f"the file continues after the {V:,} words of its header")


def to_vector(source: tuple[bytes, int, int]) -> np.ndarray:
    data, D, start = source
    return np.frombuffer(data, "<f4", D, start)
