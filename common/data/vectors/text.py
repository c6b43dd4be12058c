"""Reads text files of vectors: GloVe, word2vec text and fastText .vec.

Each line has a word and its numbers, separated by spaces. In word2vec and fastText, the first line
has the number of words and of dimensions. A few words in the largest files of GloVe contain spaces;
the last D fields of a line are always the numbers.
"""

import re
from array import array
from functools import partial
from typing import BinaryIO

from common.data.vectors.lookup import MAX_DIMENSION, MAX_WORD, Entries, check_dimension
from common.errors import InputError

HEADER = re.compile(rb"\s*(\d{1,18})\s+(\d{1,18})\s*\n?")
_MAX_LINE = MAX_WORD + 32 * MAX_DIMENSION
_NUMBER = re.compile(rb"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|[-+]?(?:nan|inf)", re.IGNORECASE)


def read(file: BinaryIO, name: str) -> Entries:
    """The entries of `file`, located by line; `name` is its name for errors.

    Raises InputError with the line for a wrong number of numbers or invalid UTF-8, and if the
    number of words is not that of the header.
    """

    def error(message: str) -> InputError:
        return InputError(f"{name}: line {number:,}: {message}")

    expected, D, number = None, 0, 0
    for number, content in enumerate(iter(partial(file.readline, _MAX_LINE + 1), b""), 1):
        if len(content) > _MAX_LINE:
            raise error(f"longer than {_MAX_LINE:,} bytes")
        line = content.rstrip()
        if number == 1:
            header = HEADER.fullmatch(line)
            D = int(header[2]) if header else len(line.split()) - 1
            check_dimension(name, D)
            if header:
                expected = int(header[1])
                continue
        word, _, numbers = line.partition(b" ")
        if numbers.count(b" ") != D - 1 or not word:
            fields = line.split()
            if len(fields) <= D or (
                len(fields) > D + 1 and all(map(_NUMBER.fullmatch, fields[1:]))
            ):
                raise error(f"has {max(len(fields) - 1, 0)} numbers, expected {D}")
            word, numbers = b" ".join(fields[:-D]), b" ".join(fields[-D:])
        try:
            word.decode()
        except UnicodeDecodeError:
            raise error("the word is not UTF-8") from None
        yield number, word, numbers
    if expected not in (None, number - 1):
        raise error(f"the file ends here; its header promises {expected:,} words")


def to_vector(numbers: bytes) -> array:
    """Raises ValueError for a field that is not a number."""
    return array("f", map(float, numbers.split(b" ")))
