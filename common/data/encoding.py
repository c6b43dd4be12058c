"""Texts to numbers, in as many processes as there are cores.

A worker is a fresh interpreter that imports nothing but this file and the few that this file
imports: it starts in a few hundredths of a second, whatever the program around it has loaded
(multiprocessing would import the main module, and so a framework, in each). It ends when its
standard input does, so none outlives the program, and Ctrl-C does not reach it. loky, joblib's
pool, encodes as fast, but starts a second later (14 MB of reviews took 60 % longer), and leaves its
workers behind if it is killed.
"""

import hashlib
import pickle
import subprocess
import sys
from array import array
from collections import defaultdict, deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, count, islice
from typing import NamedTuple

from common.cores import cores
from common.data.text import clean, tokenize
from common.errors import InputError

CHUNK = 1 << 20  # characters that go to a worker at once
HASH_BYTES = 8  # that two of 5 million texts look alike by chance has a probability of 1e-6
_ALONE = 8  # so many chunks are encoded before it is worth starting processes
_MOST_WORKERS = 8  # one process that reads cannot feed more


class Encoded(NamedTuple):
    """Texts as numbers of words; the numbers hold within these texts only."""

    words: list[str]  # the distinct ones, in order of first sight: number i is words[i]
    tokens: array  # uint32: the words of all texts, one text after the other
    lengths: array  # int32: how many words each text has
    hashes: bytes  # HASH_BYTES for each text: equal for texts that are equal when cleaned


def numbering() -> defaultdict:
    """A dict that gives each key it is asked for the next number, from 0."""
    return defaultdict(count().__next__)


def encode(texts: Iterable[str]) -> Encoded:
    """Clean and tokenize texts, and number their words."""
    numbers = numbering()
    # To an array of signed numbers, each is handed over like the argument of a function: slowly.
    tokens, lengths, hashes = array("I"), array("i"), bytearray()
    for text in map(clean, texts):
        content = text.encode("utf-8", "surrogatepass")
        hashes += hashlib.blake2b(content, digest_size=HASH_BYTES).digest()
        words = tokenize(text)
        lengths.append(len(words))
        tokens.extend(map(numbers.__getitem__, words))
    return Encoded(list(numbers), tokens, lengths, bytes(hashes))


def encode_all(chunks: Iterable[list[str]]) -> Generator[Encoded, None, None]:
    """encode() of each chunk, in their order; after the first few in parallel processes.

    Close the iterator where it is not read to its end. Raises InputError where a process dies.
    """
    chunks = iter(chunks)
    yield from map(encode, islice(chunks, None if cores() == 1 else _ALONE))
    more = list(islice(chunks, 1))
    if not more:
        return
    with ExitStack() as stack:
        size = min(cores(), _MOST_WORKERS)
        busy: deque[_Worker] = deque()
        for chunk in chain(more, chunks):
            full = len(busy) == size
            worker = busy.popleft() if full else stack.enter_context(_Worker())
            done = [worker.take()] if full else []
            worker.give(chunk)
            busy.append(worker)
            yield from done
        yield from map(_Worker.take, busy)


class _Worker:
    """A process that encodes one chunk at a time."""

    def __enter__(self) -> "_Worker":
        program = f"import sys; sys.path[:] = {sys.path!r}; from common.data import encoding"
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{program}; encoding.work()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # Ctrl-C reaches this program alone, which then ends the worker
        )
        assert self.process.stdin and self.process.stdout
        self.input, self.output = self.process.stdin, self.process.stdout
        return self

    def give(self, texts: list[str]) -> None:
        with self._alive():
            pickle.dump(texts, self.input, pickle.HIGHEST_PROTOCOL)
            self.input.flush()

    def take(self) -> Encoded:
        with self._alive():
            return pickle.load(self.output)

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        with suppress(OSError):  # what was still to be written
            self.input.close()
        self.output.close()

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):
            ended = f"a worker process ended with status {self.process.wait()}"
            raise InputError(
                f"encoding stopped: {ended} (was it killed, or is the memory full?)"
            ) from None


def work() -> None:
    """The program of a worker: texts come on standard input, Encoded goes to standard output."""
    with suppress(EOFError, BrokenPipeError):
        while True:
            answer = encode(pickle.load(sys.stdin.buffer))
            pickle.dump(answer, sys.stdout.buffer, pickle.HIGHEST_PROTOCOL)
            sys.stdout.buffer.flush()
