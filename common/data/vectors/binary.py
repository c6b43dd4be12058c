"""word2vec's binary format, e.g. GoogleNews-vectors-negative300.bin.

A line with the number of words V and of dimensions D, then V times: the word, a space and D float32
numbers, little-endian, and in files of the original program a line feed. That program cuts long
words at a byte, so a word need not be UTF-8; such a word is in no vocabulary.
"""

from typing import BinaryIO

import numpy as np

from common.data.vectors.lookup import MAX_WORD, Entries, check_dimension
from common.data.vectors.text import HEADER
from common.errors import InputError

_BLOCK = 4 * 2**20


def looks_like(head: bytes) -> bool:
    """Whether a file that begins like this is binary, not text: bytes that no text has."""
    line, _, rest = head.partition(b"\n")
    header = HEADER.fullmatch(line)
    if header is None:
        return False
    _, _, numbers = rest.partition(b" ")
    numbers = numbers[: 4 * int(header[2])].split(b"\n")[0].strip()
    return not numbers or any(not 32 <= byte < 127 for byte in numbers.replace(b"\t", b" "))


def read(file: BinaryIO, name: str) -> Entries:
    """The entries of `file`, which has this `name`; their places are bytes.

    Raises InputError, naming the byte, where there are fewer or more words than the header says.
    """

    def error(place: int, message: str) -> InputError:
        return InputError(f"{name}: byte {place:,}: {message}")

    first = file.readline(2**16)  # looks_like has seen that it is a header
    V, D = map(int, first.split())
    check_dimension(name, D)
    data, start, before = b"", 0, len(first)  # `before` bytes of the file come before `data`
    for number in range(1, V + 1):
        space = data.find(b" ", start, start + MAX_WORD)
        end = space + 1 + 4 * D
        if space < 0 or end > len(data):
            before, data, start = before + start, data[start:] + file.read(_BLOCK), 0
            space = data.find(b" ", 0, MAX_WORD)
            end = space + 1 + 4 * D
            if len(data) > MAX_WORD > 0 > space:
                raise error(before, f"no space within {MAX_WORD:,} bytes, where a word ends")
            if space < 0 or end > len(data):
                cut = f"cut short in word {number:,} of the {V:,} of its header"
                raise error(before + len(data), cut)
        yield before + start, data[start:space].lstrip(b"\n"), (data, D, space + 1)
        start = end
    rest = data[start:] + file.read(2)
    if rest.strip(b"\n"):
        raise error(before + start, f"goes on after the {V:,} words of its header")


def to_vector(source: tuple[bytes, int, int]) -> np.ndarray:
    data, D, start = source
    return np.frombuffer(data, "<f4", D, start)
