"""Vectors as text: GloVe, word2vec text and fastText .vec.

A word and its numbers a line, separated by spaces. word2vec and fastText have a first line with the
number of words and of dimensions, GloVe has not. In GloVe's largest files a few words have spaces
in them; such a line has more fields, and what comes before the last D is the word.
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
    """The entries of `file`, which has this `name`; their places are lines.

    Raises InputError, naming the line, for one that has more or fewer numbers than the first or is
    not UTF-8, or where there are not as many as the first line says.
    """

    def error(message: str) -> InputError:
        return InputError(f"{name}: line {number:,}: {message}")

    expected, D, number = None, 0, 0
    for number, whole in enumerate(iter(partial(file.readline, _MAX_LINE + 1), b""), 1):
        if len(whole) > _MAX_LINE:
            raise error(f"longer than {_MAX_LINE:,} bytes")
        line = whole.rstrip()
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
        raise error(f"is the last, but the first says there are {expected:,} words")


def to_vector(numbers: bytes) -> array:
    """Raises ValueError for what is no number."""
    return array("f", map(float, numbers.split(b" ")))
