"""The interface of the readers of vector files, and the lookup of a vocabulary in their entries."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float

from common.errors import InputError

# Bytes. word2vec's limit for a word is 100 bytes; gensim joins several words to one.
MAX_WORD = 4096
MAX_DIMENSION = 10_000
DTYPES = ("f2", "f4", "f8")
_BLOCK = 16 * 2**20  # bytes of a table read at once

Entries = Iterator[tuple[int, bytes, Any]]
"""For each word of a file: its position (a number), the word and the source of its vector."""
ToVector = Callable[[Any], Any]
"""Converts the source to a vector, or to numbers that NumPy converts to an array [D]."""


@np.errstate(over="ignore")  # an overflow gives infinity, which is rejected below
def find(
    entries: Entries, to_vector: ToVector, vocabulary: Iterable[str], file: str, unit: str
) -> tuple[list[str], Float[np.ndarray, "V D"]]:
    """The words of the vocabulary that are in a file, in its order, and their vectors.

    A word of the vocabulary matches an identical word of the file or else the first word of the
    file that equals it in lower case ("Us", "US"), in most files the most frequent one. `unit` is
    the unit of the positions (line, byte). Raises InputError, with `file` and position, for a word
    of the vocabulary that occurs twice and a vector that is not finite; and if no word matches.
    """
    known = {word.encode() for word in vocabulary}
    positions: dict[bytes, int] = {}  # of each matched word of the vocabulary
    exact: set[bytes] = set()  # words with an identical word in the file
    rows: dict[bytes, int] = {}
    numbers = bytearray()
    for position, word, source in entries:
        if word in known:
            if word in exact:
                message = f"the word {word.decode()} is in {unit} {positions[word]:,} too"
                raise InputError(f"{file}: {unit} {position:,}: {message}")
            exact.add(word)
            match = word
        else:
            is_ascii = word.isascii()  # bytes.lower() handles ASCII only
            match = word.lower() if is_ascii else word.decode(errors="replace").lower().encode()
            if match in positions or match not in known:
                continue
        positions[match] = position
        try:
            vector = np.asarray(to_vector(source), np.float32)
            if not np.isfinite(vector).all():
                raise ValueError(f"the vector of {match.decode()} is not finite in float32")
        except ValueError as error:
            raise InputError(f"{file}: {unit} {position:,}: {error}") from None
        row = rows.setdefault(match, len(rows))
        # Overwrites the vector of another spelling.
        numbers[row * vector.nbytes : (row + 1) * vector.nbytes] = vector.tobytes()
    if not rows:
        raise InputError(f"{file}: has no word of the data set's vocabulary")
    matrix = np.frombuffer(numbers, np.float32).reshape(len(rows), -1)
    return [word.decode() for word in rows], matrix


def check_dimension(file: str, dimension: int) -> None:
    """Raise InputError unless the number of dimensions is in 1..MAX_DIMENSION."""
    if not 1 <= dimension <= MAX_DIMENSION:
        expected = f"expected 1 to {MAX_DIMENSION:,}"
        raise InputError(f"{file}: vectors of {dimension:,} dimensions, {expected}")


def read_table(
    table: str,
    shape: Sequence[int],
    dtype: str,
    rows: Callable[[slice], np.ndarray],
    words: Sequence[object],
) -> tuple[Entries, ToVector]:
    """The entries of a table [V, D] and a list of words; a position is the number of a word.

    table: the name of the table for errors. dtype: for example f4 for float32.
    rows: returns a slice of rows. For a mapped file, the function reopens the file at each call,
    because the pages that were read count as memory of the process while the file is mapped.

    Raises InputError unless the table has floating-point numbers and one row per word.
    """
    if len(shape) != 2 or shape[0] != len(words):
        raise InputError(f"{table}: an array {list(shape)}, but there are {len(words):,} words")
    if dtype not in DTYPES:
        raise InputError(f"{table}: an array of {dtype}, expected float16, float32 or float64")
    check_dimension(table, shape[1])
    step = max(_BLOCK // (8 * shape[1]), 1)

    @lru_cache(1)
    def block(number: int) -> np.ndarray:
        # A plain array, because indexing np.memmap is slower.
        return np.asarray(rows(slice(number * step, min((number + 1) * step, len(words)))))

    entries = (
        (row + 1, word.encode("utf-8", "surrogatepass"), row)
        for row, word in enumerate(words)
        if isinstance(word, str)
    )
    return entries, lambda row: block(row // step)[row % step]
