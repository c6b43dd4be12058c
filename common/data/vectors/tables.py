"""Formats with the words in one place and the vectors in a table [V, D] in another."""

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
from jaxtyping import Int

from common.data.vectors.found import Found
from common.errors import InputError

DTYPES = ("f2", "f4", "f8")
_BLOCK = 32 * 2**20  # bytes


def take(
    table: str,
    shape: Sequence[int],
    dtype: str,
    rows: Callable[[Int[np.ndarray, " n"]], np.ndarray],
    words: Sequence[object],
    found: Found,
) -> None:
    """Hand the words to `found`, with the rows of the table at their places.

    Of the table come its name, for errors, its shape, its dtype (f4) and a function that returns
    the rows of these numbers, which ascend. That should open the table anew: what a process has
    read of a mapped file counts as its memory for as long as it is mapped. Raises InputError
    unless it is a table of floating-point numbers with as many rows as there are words.
    """
    if len(shape) != 2 or shape[0] != len(words):
        raise InputError(f"{table}: an array {list(shape)}, but there are {len(words):,} words")
    if dtype not in DTYPES:
        raise InputError(f"{table}: an array of {dtype}, expected float16, float32 or float64")
    found.set_dimension(shape[1])
    wanted = (
        (row, key)
        for row, word in enumerate(words)
        if isinstance(word, str)
        and (key := found.wanted(word.encode("utf-8", "surrogatepass"), row + 1)) is not None
    )
    step = max(_BLOCK // (8 * found.dimension), 1)
    for _, block in groupby(wanted, lambda place: place[0] // step):
        numbers, keys = zip(*block, strict=True)
        with np.errstate(over="ignore"):  # put tells
            vectors = rows(np.array(numbers)).astype(np.float32)
        for number, key, vector in zip(numbers, keys, vectors, strict=True):
            found.put(key, vector, number + 1)
