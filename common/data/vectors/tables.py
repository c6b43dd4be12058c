"""Formats with the words in one place and the vectors in a table [V, D] in another."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import numpy as np

from common.data.vectors.found import Found

_BLOCK = 32 * 2**20  # bytes

Rows = Callable[[int, int], np.ndarray]


def take(
    words: Iterable[object], open_table: Callable[[], AbstractContextManager[Rows]], found: Found
) -> None:
    """Hand the words to `found`, with the rows of the table at their places.

    open_table yields a function of two row numbers, which returns the rows from the one up to the
    other. It is opened anew for each stretch of the table: what a process has read of a mapped file
    counts as its memory for as long as it is mapped.
    """
    wanted = [
        (row, key)
        for row, word in enumerate(words)
        if isinstance(word, str)
        and (key := found.wanted(word.encode("utf-8", "surrogatepass"), row + 1)) is not None
    ]
    step = max(_BLOCK // (8 * found.dimension), 1)
    while wanted:
        start = wanted[0][0]
        inside = next((i for i, (row, _) in enumerate(wanted) if row >= start + step), len(wanted))
        with open_table() as rows:
            block = rows(start, wanted[inside - 1][0] + 1)
            for row, key in wanted[:inside]:
                with np.errstate(over="ignore"):  # put tells
                    vector = block[row - start].astype(np.float32)
                found.put(key, vector, row + 1)
            del block
        del wanted[:inside]
