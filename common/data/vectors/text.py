"""Vectors as text: GloVe, word2vec text and fastText .vec.

A word and its numbers a line, separated by spaces. word2vec and fastText have a first line with the
number of words and of dimensions, GloVe has not. In GloVe's largest files a few words have spaces
in them; such a line has more fields, and what comes before the last D is the word.
"""

import re
from array import array
from functools import partial
from typing import BinaryIO

import numpy as np

from common.data.vectors.found import MAX_DIMENSION, MAX_WORD, Found

HEADER = re.compile(rb"\s*(\d{1,18})\s+(\d{1,18})\s*\n?")
_MAX_LINE = MAX_WORD + 32 * MAX_DIMENSION


def read(file: BinaryIO, found: Found) -> None:
    """Hand the words of `file` to `found`.

    Raises InputError, naming the line, for one that has more or fewer numbers than the first, is
    not UTF-8 or has what is no number, or where there are not as many as the first line says.
    """
    lines = iter(partial(file.readline, _MAX_LINE + 1), b"")
    expected, D, number = None, 0, 0
    found.unit = "line"
    for number, whole in enumerate(lines, 1):
        if len(whole) > _MAX_LINE:
            raise found.error(number, f"longer than {_MAX_LINE:,} bytes")
        line = whole.rstrip()
        if number == 1 and (header := HEADER.fullmatch(line)):
            expected, D = int(header[1]), int(header[2])
            found.set_dimension(D)
            continue
        if not D:
            D = len(line.split()) - 1
            found.set_dimension(D)
        word, _, numbers = line.partition(b" ")
        if numbers.count(b" ") != D - 1 or not word:
            fields = line.split()
            if len(fields) <= D or (len(fields) > D + 1 and all(map(_is_number, fields[1:]))):
                raise found.error(number, f"has {max(len(fields) - 1, 0)} numbers, expected {D}")
            word, numbers = b" ".join(fields[:-D]), b" ".join(fields[-D:])
        try:
            word.decode()
        except UnicodeDecodeError:
            raise found.error(number, "the word is not UTF-8") from None
        if (wanted := found.wanted(word, number)) is None:
            continue
        try:
            vector = array("f", map(float, numbers.split(b" ")))
        except ValueError as error:
            raise found.error(number, f"{error}") from None
        found.put(wanted, np.frombuffer(vector, np.float32), number)
    if expected not in (None, number - 1):
        raise found.error(number, f"is the last, but the first says there are {expected:,} words")


def _is_number(field: bytes) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True
