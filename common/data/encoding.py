"""Encodes texts as word numbers, in one process per core.

A worker is a fresh interpreter that imports only this module and its dependencies, so it starts in
a few hundredths of a second (multiprocessing would import the main module, with a framework, in
each). A worker exits at the end of its standard input, so it never outlives the program. loky,
joblib's pool, encodes as fast but starts a second later (14 MB of reviews took 60 % longer), and
its workers survive if the program is killed.
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

CHUNK = 1 << 20  # characters sent to a worker at once
HASH_BYTES = 8  # the probability of a collision among 5 million texts is 1e-6
_CHUNKS_BEFORE_WORKERS = 8  # chunks encoded in this process before workers start
_MAX_WORKERS = 8  # the process that reads texts cannot supply more workers


class Encoded(NamedTuple):
    """Texts as word numbers, which are valid within these texts only."""

    words: list[str]  # distinct words in order of first occurrence: number i is words[i]
    tokens: array  # uint32: the words of all texts, concatenated
    lengths: array  # int32: the number of words of each text
    hashes: bytes  # HASH_BYTES for each cleaned text


def numbering() -> defaultdict:
    """A dict that assigns the next number, from 0, to each new key."""
    return defaultdict(count().__next__)


def encode(texts: Iterable[str]) -> Encoded:
    """Clean and tokenize texts, and number their words."""
    numbers = numbering()
    # Appending to an array of unsigned numbers is faster: signed ones are parsed as arguments.
    tokens, lengths, hashes = array("I"), array("i"), bytearray()
    for text in map(clean, texts):
        content = text.encode("utf-8", "surrogatepass")
        hashes += hashlib.blake2b(content, digest_size=HASH_BYTES).digest()
        words = tokenize(text)
        lengths.append(len(words))
        tokens.extend(map(numbers.__getitem__, words))
    return Encoded(list(numbers), tokens, lengths, bytes(hashes))


def encode_all(chunks: Iterable[list[str]]) -> Generator[Encoded, None, None]:
    """encode() of each chunk in order, after the first chunks in parallel processes.

    Close an iterator that is not exhausted. Raises InputError if a process dies.
    """
    chunks = iter(chunks)
    yield from map(encode, islice(chunks, None if cores() == 1 else _CHUNKS_BEFORE_WORKERS))
    following = list(islice(chunks, 1))
    if not following:
        return
    with ExitStack() as stack:
        size = min(cores(), _MAX_WORKERS)
        busy: deque[_Worker] = deque()
        for chunk in chain(following, chunks):
            full = len(busy) == size
            worker = busy.popleft() if full else stack.enter_context(_Worker())
            results = [worker.receive()] if full else []
            worker.send(chunk)
            busy.append(worker)
            yield from results
        yield from map(_Worker.receive, busy)


class _Worker:
    """A process that encodes one chunk at a time."""

    def __enter__(self) -> "_Worker":
        program = f"import sys; sys.path[:] = {sys.path!r}; from common.data import encoding"
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{program}; encoding.work()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # Ctrl-C reaches only this program, which then ends the worker
        )
        assert self.process.stdin and self.process.stdout
        self.input, self.output = self.process.stdin, self.process.stdout
        return self

    def send(self, texts: list[str]) -> None:
        with self._death_as_error():
            pickle.dump(texts, self.input, pickle.HIGHEST_PROTOCOL)
            self.input.flush()

    def receive(self) -> Encoded:
        with self._death_as_error():
            return pickle.load(self.output)

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        with suppress(OSError):  # buffered data that cannot be written any more
            self.input.close()
        self.output.close()

    @contextmanager
    def _death_as_error(self) -> Iterator[None]:
        try:
            yield
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):
            ended = f"a worker process ended with status {self.process.wait()}"
            raise InputError(
                f"encoding stopped: {ended} (was it killed, or is the memory full?)"
            ) from None


def work() -> None:
    """A worker: reads texts from standard input and writes Encoded to standard output."""
    with suppress(EOFError, BrokenPipeError):
        while True:
            result = encode(pickle.load(sys.stdin.buffer))
            pickle.dump(result, sys.stdout.buffer, pickle.HIGHEST_PROTOCOL)
            sys.stdout.buffer.flush()
