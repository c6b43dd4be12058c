"""What every reader of a vectors file hands its words to: keeps those of the vocabulary."""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

import numpy as np
from jaxtyping import Float, Int

from common.errors import InputError

# word2vec's own limit for a word is 100 bytes; gensim joins several words to one.
MAX_WORD = 4096
MAX_DIMENSION = 10_000
DTYPES = ("f2", "f4", "f8")
_BLOCK = 32 * 2**20  # bytes of a table that are read at once


class Found:
    """The vectors found so far of the words that are wanted.

    A word of the file stands for the word of the vocabulary that it spells exactly or, where the
    file has none, for the one that it spells in lower case; of several such ("Us", "US"), the first
    in the file is taken, which in most files is the most frequent one.
    """

    def __init__(self, vocabulary: Iterable[str], file: str) -> None:
        """Errors name the `file`, and the `unit` in which it is counted where a word is."""
        self._vocabulary = {word.encode() for word in vocabulary}
        self._places: dict[bytes, int] = {}  # of each word of the vocabulary that was found
        self._exact: set[bytes] = set()  # those that were found in their own spelling
        self._rows: dict[bytes, int] = {}
        self._file, self.unit = file, "word"
        self._numbers = bytearray()
        self.dimension = 0

    def set_dimension(self, dimension: int) -> None:
        """Say how many numbers a vector has; raises InputError for a number that makes no sense."""
        if not 1 <= dimension <= MAX_DIMENSION:
            expected = f"expected 1 to {MAX_DIMENSION:,}"
            raise InputError(f"{self._file}: vectors of {dimension:,} dimensions, {expected}")
        self.dimension = dimension

    def wanted(self, word: bytes, place: int) -> bytes | None:
        """The word of the vocabulary that this one stands for, if its vector is wanted.

        Raises InputError for a word of the vocabulary that occurs a second time.
        """
        if word in self._vocabulary:
            if word in self._exact:
                first = self._places[word]
                raise self.error(place, f"the word {word.decode()} is in {self.unit} {first:,} too")
            self._exact.add(word)
        else:
            ascii = word.isascii()  # where the lower() of bytes is right
            word = word.lower() if ascii else word.decode(errors="replace").lower().encode()
            if word in self._places or word not in self._vocabulary:
                return None
        self._places[word] = place
        return word

    def put(self, wanted: bytes, vector: Float[np.ndarray, " D"], place: int) -> None:
        """Keep the vector of what `wanted` returned. Raises InputError unless it is finite."""
        if not np.isfinite(vector).all():
            raise self.error(place, f"the vector of {wanted.decode()} is not finite in float32")
        numbers = np.asarray(vector, np.float32).tobytes()
        row = self._rows.setdefault(wanted, len(self._rows))
        # Over the vector of another spelling, if there has been one.
        self._numbers[row * len(numbers) : (row + 1) * len(numbers)] = numbers

    def put_table(
        self,
        table: str,
        shape: Sequence[int],
        dtype: str,
        rows: Callable[[Int[np.ndarray, " n"]], np.ndarray],
        words: Sequence[object],
    ) -> None:
        """Keep those rows of a table [V, D] whose words, which are elsewhere, are wanted.

        table, shape, dtype: its name, for errors; [V, D]; float32 is f4.
        rows: returns the rows of these numbers, which ascend. It opens the table anew: what a
        process has read of a mapped file counts as its memory for as long as it is mapped.

        Raises InputError unless there are floating-point numbers and as many rows as words.
        """
        if len(shape) != 2 or shape[0] != len(words):
            raise InputError(f"{table}: an array {list(shape)}, but there are {len(words):,} words")
        if dtype not in DTYPES:
            raise InputError(f"{table}: an array of {dtype}, expected float16, float32 or float64")
        self.set_dimension(shape[1])
        wanted = (
            (row, key)
            for row, word in enumerate(words)
            if isinstance(word, str)
            and (key := self.wanted(word.encode("utf-8", "surrogatepass"), row + 1)) is not None
        )
        step = max(_BLOCK // (8 * self.dimension), 1)
        for _, block in groupby(wanted, lambda place: place[0] // step):
            numbers, keys = zip(*block, strict=True)
            with np.errstate(over="ignore"):  # put tells
                vectors = rows(np.array(numbers)).astype(np.float32)
            for number, key, vector in zip(numbers, keys, vectors, strict=True):
                self.put(key, vector, number + 1)

    def error(self, place: int, message: str) -> InputError:
        """An InputError that names the file and this place in it."""
        return InputError(f"{self._file}: {self.unit} {place:,}: {message}")

    def result(self) -> tuple[list[str], Float[np.ndarray, "V D"]]:
        """The words that were found, and their vectors. Raises InputError where there are none."""
        if not self._rows:
            raise InputError(f"{self._file}: has no word of the data set's vocabulary")
        matrix = np.frombuffer(self._numbers, np.float32).reshape(-1, self.dimension)
        return [word.decode() for word in self._rows], matrix
