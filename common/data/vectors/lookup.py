"""What every reader of a vectors file yields, and the words of a vocabulary looked up in it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float

from common.errors import InputError

# word2vec's own limit for a word is 100 bytes; gensim joins several words to one.
MAX_WORD = 4096
MAX_DIMENSION = 10_000
DTYPES = ("f2", "f4", "f8")
_BLOCK = 16 * 2**20  # bytes of a table that are read at once

Entries = Iterator[tuple[int, bytes, Any]]
"""Of each word of a file its place (a number), itself, and what its vector is to be made from."""
ToVector = Callable[[Any], Any]
"""Makes it: numbers that NumPy converts to an array [D]."""


@np.errstate(over="ignore")  # what is infinite in float32 is refused
def find(
    entries: Entries, to_vector: ToVector, vocabulary: Iterable[str], file: str, unit: str
) -> tuple[list[str], Float[np.ndarray, "V D"]]:
    """The words of the vocabulary that are in a file, in its order, and their vectors.

    A word of the file stands for the word of the vocabulary that it spells exactly or, where the
    file has none, for the one that it spells in lower case; of several such ("Us", "US"), the first
    in the file is taken, which in most files is the most frequent one. `unit` is what the places
    count (line, byte). Raises InputError, naming `file` and place, for a word of the vocabulary
    that occurs twice, and a vector that is not finite; and for a file with none of the words.
    """
    known = {word.encode() for word in vocabulary}
    places: dict[bytes, int] = {}  # of each word of the vocabulary that was found
    exact: set[bytes] = set()  # those that were found in their own spelling
    rows: dict[bytes, int] = {}
    numbers = bytearray()
    for place, word, source in entries:
        if word in known:
            if word in exact:
                twice = f"the word {word.decode()} is in {unit} {places[word]:,} too"
                raise InputError(f"{file}: {unit} {place:,}: {twice}")
            exact.add(word)
            wanted = word
        else:
            ascii = word.isascii()  # where the lower() of bytes is right
            wanted = word.lower() if ascii else word.decode(errors="replace").lower().encode()
            if wanted in places or wanted not in known:
                continue
        places[wanted] = place
        try:
            vector = np.asarray(to_vector(source), np.float32)
            if not np.isfinite(vector).all():
                raise ValueError(f"the vector of {wanted.decode()} is not finite in float32")
        except ValueError as error:
            raise InputError(f"{file}: {unit} {place:,}: {error}") from None
        row = rows.setdefault(wanted, len(rows))
        # Over the vector of another spelling, if there has been one.
        numbers[row * vector.nbytes : (row + 1) * vector.nbytes] = vector.tobytes()
    if not rows:
        raise InputError(f"{file}: has no word of the data set's vocabulary")
    matrix = np.frombuffer(numbers, np.float32).reshape(len(rows), -1)
    return [word.decode() for word in rows], matrix


def check_dimension(file: str, dimension: int) -> None:
    """Raise InputError for a number of dimensions that makes no sense."""
    if not 1 <= dimension <= MAX_DIMENSION:
        expected = f"expected 1 to {MAX_DIMENSION:,}"
        raise InputError(f"{file}: vectors of {dimension:,} dimensions, {expected}")


def of_table(
    table: str,
    shape: Sequence[int],
    dtype: str,
    rows: Callable[[slice], np.ndarray],
    words: Sequence[object],
) -> tuple[Entries, ToVector]:
    """The entries of a table [V, D] whose words are elsewhere; a place is the number of a word.

    table, shape, dtype: its name, for errors; [V, D]; float32 is f4.
    rows: returns these rows. It opens the table anew: what a process has read of a mapped file
    counts as its memory for as long as it is mapped.

    Raises InputError unless it has floating-point numbers and as many rows as there are words.
    """
    if len(shape) != 2 or shape[0] != len(words):
        raise InputError(f"{table}: an array {list(shape)}, but there are {len(words):,} words")
    if dtype not in DTYPES:
        raise InputError(f"{table}: an array of {dtype}, expected float16, float32 or float64")
    check_dimension(table, shape[1])
    step = max(_BLOCK // (8 * shape[1]), 1)

    @lru_cache(1)
    def block(number: int) -> np.ndarray:
        # A plain array: rows of np.memmap, an array class of its own, take longer.
        return np.asarray(rows(slice(number * step, min((number + 1) * step, len(words)))))

    entries = (
        (row + 1, word.encode("utf-8", "surrogatepass"), row)
        for row, word in enumerate(words)
        if isinstance(word, str)
    )
    return entries, lambda row: block(row // step)[row % step]
