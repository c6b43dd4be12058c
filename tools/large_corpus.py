"""Writes a data set larger than memory, encodes it and draws batches from it.

Prints the time and the memory that this takes. The first run writes FOLDER/reviews-5000000.jsonl
(500 million words, 2.3 GB) and encodes it; a second run measures the start from the cache.
"""

import json
import os
import resource
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from common import files
from common.data import corpus
from common.data.batches import Batches
from common.data.encoding import encode
from common.data.sources.dataset import Dataset, Example
from tools.program import children_of, memory_of, run_program

VOCABULARY = 1_000_000
EXPONENT, OFFSET = 1.3, 10  # of the Zipf-Mandelbrot law, fitted to English
SYLLABLES = [c + v for c in "bcdfghjklmnprstvwxyz" for v in "aeiou"]
_BLOCK = 10_000  # reviews that are drawn at once


def write(path: Path, reviews: int) -> None:
    """Write reviews of 100 words on average as lines of JSON, in two classes."""
    rng = np.random.default_rng(0)
    words = [_word(rank) for rank in range(VOCABULARY)]
    with files.aside(path) as partial, partial.open("w", encoding="ascii") as file:
        for start in range(0, reviews, _BLOCK):
            ends = np.cumsum(rng.integers(10, 181, min(_BLOCK, reviews - start)))
            # The distribution function of the rank is 1 - (1 + rank / OFFSET) ** (1 - EXPONENT).
            rest = 1 - rng.random(ends[-1]) * (1 - (1 + VOCABULARY / OFFSET) ** (1 - EXPONENT))
            ranks = (OFFSET * (rest ** (1 / (1 - EXPONENT)) - 1)).astype(int)
            text, begin = [words[rank] for rank in ranks.tolist()], 0
            for label, end in zip(
                rng.integers(0, 2, len(ends)).tolist(), ends.tolist(), strict=True
            ):
                middle = (begin + end) // 2
                first, second = " ".join(text[begin:middle]), " ".join(text[middle:end])
                mood = "wonderful" if label else "dreadful"
                review = f"{first}. It's {mood}!<br /><br />{second} &amp; so on."
                file.write(f'{{"label": "{label}", "text": "{review}"}}\n')
                begin = end


def _word(rank: int) -> str:
    syllables = [SYLLABLES[rank % 100]]
    while rank := rank // 100:
        syllables.append(SYLLABLES[rank % 100])
    return "".join(syllables)


def dataset(path: Path) -> Dataset:
    """The data set in a file of `write`."""

    def examples() -> Iterator[Example]:
        with path.open(encoding="ascii") as file:
            for line in file:
                review = json.loads(line)
                yield Example(review["text"], review["label"])

    return Dataset("synthetic", examples)


def measure(path: Path) -> dict[str, float]:
    """Encode the reviews and draw batches from them; return the figures.

    Raises AssertionError if the order of an epoch is not a permutation or not reproducible.
    """
    figures = Figures()
    with PeakMemory() as memory:
        sample = [example.text for example in islice(dataset(path).examples(), 30_000)]
        started = time.process_time()
        for first in range(0, len(sample), 2_000):  # about corpus.CHUNK characters
            encode(sample[first : first + 2_000])
        figures["encode_mb_per_core_second"] = (
            sum(map(len, sample)) / 1e6 / (time.process_time() - started)
        )
        del sample

        started, cpu = time.perf_counter(), _cpu()
        fingerprint: dict[str, str | int] = {"data": str(path), "bytes": path.stat().st_size}
        texts = corpus.encoded(lambda: dataset(path), fingerprint)
        figures["corpus_seconds"] = time.perf_counter() - started
        figures["corpus_core_seconds"] = _cpu() - cpu
        counts = texts.train.counts()
        known = (counts >= 3).cumsum() - 1
        train = texts.train.renumber(np.where(counts >= 3, known, -1))
        batches = Batches(train, 32, max_length=200)
        next(batches.epoch(0))
        figures["first_batch_seconds"] = time.perf_counter() - started

        started = time.perf_counter()
        middle = next(batches.epoch(1, len(batches) // 2))
        figures["resume_seconds"] = time.perf_counter() - started
        order = batches.plan(1)
        assert np.array_equal(middle.reviews, order[len(batches) // 2])
        assert np.array_equal(order, Batches(train, 32, max_length=200).plan(1))
        assert np.array_equal(np.sort(order[order >= 0]), np.arange(len(train)))
        assert not np.array_equal(order, batches.plan(2))

        started = time.perf_counter()
        drawn = sum(1 for _ in islice(batches.epoch(1), 2_000))
        figures["batch_seconds"] = (time.perf_counter() - started) / drawn
        figures["reviews"] = len(texts.train) + len(texts.test)
        figures["words"] = len(texts.train.tokens)
        figures["vocabulary"] = len(texts.vocabulary)
    figures["peak_rss_bytes"], figures["peak_private_bytes"] = memory.peak, memory.peak_private
    return figures


class Figures(dict[str, float]):
    """Seconds, MB/s, bytes and counts; prints each figure when it is set."""

    def __setitem__(self, name: str, value: float) -> None:
        super().__setitem__(name, value)
        print(f"{name:28} {value:,.{0 if value > 1000 else 4}f}", flush=True)


class PeakMemory:
    """The peak resident memory of this process and its children together, sampled every 50 ms.

    `peak` includes the pages of mapped files, `peak_private` excludes them.
    """

    peak = peak_private = 0

    def __enter__(self) -> "PeakMemory":
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            sizes = [memory_of(each) for each in (os.getpid(), *children_of(os.getpid()))]
            self.peak = max(self.peak, sum(size["VmRSS"] for size in sizes))
            self.peak_private = max(self.peak_private, sum(size["RssAnon"] for size in sizes))


def _cpu() -> float:
    """The processor time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main(folder: Positional[Path], reviews: int = 5_000_000) -> None:
    """Write the reviews unless they exist, and measure.

    Args:
        folder: The folder of the reviews.
        reviews: The number of reviews.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = Figures()
    path = folder / f"reviews-{reviews}.jsonl"
    if not path.exists():
        started = time.perf_counter()
        write(path, reviews)
        figures["write_seconds"] = time.perf_counter() - started
    figures["file_megabytes"] = path.stat().st_size / 1e6
    measure(path)


if __name__ == "__main__":
    run_program(main)
