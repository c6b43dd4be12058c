"""A data set larger than memory: write one, encode it, and draw batches from it.

python -m tools.large_corpus FOLDER                      5 million reviews, 500 million words
python -m tools.large_corpus FOLDER --reviews 100000

The first run writes FOLDER/reviews-5000000.jsonl (2.3 GB; the number is that of the reviews) and
encodes it; run again, it shows a second start.
"""

import dataclasses
import json
import os
import resource
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import tyro

from common import files
from common.data import corpus
from common.data.batches import Batches
from common.data.encoding import encode
from common.data.sources.dataset import Dataset, Example
from common.errors import exit_on_input_error
from common.training.options import parse_options

VOCABULARY = 1_000_000
EXPONENT, OFFSET = 1.3, 10  # of the law of Zipf and Mandelbrot, as it suits English
SYLLABLES = [c + v for c in "bcdfghjklmnprstvwxyz" for v in "aeiou"]
_BLOCK = 10_000  # reviews that are made at once


@dataclasses.dataclass(frozen=True)
class Options:
    """Encode synthetic reviews and draw batches from them; print time and memory that it takes."""

    folder: tyro.conf.Positional[Path]
    """Where the reviews are, or will be written."""
    reviews: int = 5_000_000
    """How many, of 100 words on average."""


def write(path: Path, reviews: int) -> None:
    """Write reviews in two classes, a JSON object a line; the words follow Zipf's law."""
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
    """The reviews that write() wrote."""

    def examples() -> Iterator[Example]:
        with path.open(encoding="ascii") as file:
            for line in file:
                review = json.loads(line)
                yield Example(review["text"], review["label"])

    return Dataset("synthetic", examples)


def measure(path: Path) -> dict[str, float]:
    """Encode, start and draw batches; returns seconds, MB/s and bytes, and raises if an order is
    no permutation or differs the second time."""
    found = Figures()
    with PeakMemory() as memory:
        sample = [example.text for example in islice(dataset(path).examples(), 30_000)]
        started = time.process_time()
        for first in range(0, len(sample), 2_000):  # about corpus.CHUNK characters
            encode(sample[first : first + 2_000])
        found["encode_mb_per_core_second"] = (
            sum(map(len, sample)) / 1e6 / (time.process_time() - started)
        )
        del sample

        started, cpu = time.perf_counter(), _cpu()
        fingerprint: dict[str, str | int] = {"data": str(path), "bytes": path.stat().st_size}
        texts = corpus.encoded(lambda: dataset(path), fingerprint)
        found["corpus_seconds"] = time.perf_counter() - started
        found["corpus_core_seconds"] = _cpu() - cpu
        counts = texts.train.counts()
        known = (counts >= 3).cumsum() - 1
        train = texts.train.renumber(np.where(counts >= 3, known, -1))
        batches = Batches(train, 32, max_length=200)
        next(batches.epoch(0))
        found["first_batch_seconds"] = time.perf_counter() - started

        started = time.perf_counter()
        middle = next(batches.epoch(1, len(batches) // 2))
        found["resume_seconds"] = time.perf_counter() - started
        order = batches.plan(1)
        assert np.array_equal(middle.reviews, order[len(batches) // 2])
        assert np.array_equal(order, Batches(train, 32, max_length=200).plan(1))
        assert np.array_equal(np.sort(order[order >= 0]), np.arange(len(train)))
        assert not np.array_equal(order, batches.plan(2))

        started = time.perf_counter()
        drawn = sum(1 for _ in islice(batches.epoch(1), 2_000))
        found["batch_seconds"] = (time.perf_counter() - started) / drawn
        found["reviews"] = len(texts.train) + len(texts.test)
        found["words"] = len(texts.train.tokens)
        found["vocabulary"] = len(texts.vocabulary)
    found["peak_rss_bytes"], found["peak_private_bytes"] = memory.peak, memory.peak_private
    return found


class Figures(dict[str, float]):
    """Prints each figure as it is found."""

    def __setitem__(self, name: str, value: float) -> None:
        super().__setitem__(name, value)
        print(f"{name:28} {value:,.{0 if value > 1000 else 4}f}", flush=True)


class PeakMemory:
    """The largest resident size of this process and its children together, every 50 ms.

    peak counts all pages, those of mapped files too; peak_private those that are of no file.
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
            processes = [str(os.getpid())]
            for thread in Path("/proc/self/task").iterdir():
                processes += (thread / "children").read_text().split()
            sizes = [resident(process) for process in processes]
            self.peak = max(self.peak, sum(every for every, _ in sizes))
            self.peak_private = max(self.peak_private, sum(private for _, private in sizes))


def resident(process: str) -> tuple[int, int]:
    """Bytes of memory of a process: all that is resident, and what is of no file."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return 0, 0
    kib = {line.partition(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
    return int(kib.get("VmRSS", 0)) * 1024, int(kib.get("RssAnon", 0)) * 1024


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main() -> None:
    with exit_on_input_error():
        options = parse_options(Options, "python -m tools.large_corpus")
        options.folder.mkdir(parents=True, exist_ok=True)
        figures = Figures()
        path = options.folder / f"reviews-{options.reviews}.jsonl"
        if not path.exists():
            started = time.perf_counter()
            write(path, options.reviews)
            figures["write_seconds"] = time.perf_counter() - started
        figures["file_megabytes"] = path.stat().st_size / 1e6
        measure(path)


if __name__ == "__main__":
    main()
