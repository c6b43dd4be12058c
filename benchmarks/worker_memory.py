"""The memory that each of two workers needs to train on a data set larger than that.

python -m benchmarks.worker_memory FOLDER                      5 million reviews
python -m benchmarks.worker_memory FOLDER --reviews 100000

FOLDER is that of tools/large_corpus.py. The first minutes encode what is not in the cache, and are
not measured.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tyro

from common.data import corpus
from tools import large_corpus

WORDS, D = 100_000, 100


def measure(framework: str, arguments: list[str], seconds: float) -> list[float]:
    """Train by two workers, for so many seconds; the most MB (PSS) that each has had."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    peaks: dict[str, float] = {}
    command = [*torchrun, f"{framework}_impl.train", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + seconds
        while time.monotonic() < end and process.poll() is None:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            for child in children.split():
                try:
                    lines = Path(f"/proc/{child}/smaps_rollup").read_text().splitlines()
                except OSError:  # it has just ended
                    continue
                kib = next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
                peaks[child] = max(peaks.get(child, 0), kib * 1024 / 1e6)
            time.sleep(0.1)
        assert process.poll() is None, f"{framework}: training ended before its time"
        process.send_signal(signal.SIGTERM)
    return sorted(peaks.values())


def main(folder: tyro.conf.Positional[Path], reviews: int = 5_000_000, seconds: float = 60) -> None:
    """Print the most memory that each worker has had, in both frameworks.

    folder: where the reviews are, or will be written. reviews: how many. seconds: of training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, vectors = folder / f"reviews-{reviews}.jsonl", folder / f"vectors-{reviews}.vec"
    if not path.exists():
        large_corpus.write(path, reviews)
    words = corpus.load(f"jsonl:{path}", print).vocabulary[:WORDS]
    rng = np.random.default_rng(0)
    with vectors.open("w") as file:
        file.write(f"{len(words)} {D}\n")
        for word in words:
            file.write(f"{word} {' '.join(f'{x:.3f}' for x in rng.standard_normal(D))}\n")
    same = ["--data", f"jsonl:{path}", "--vectors", str(vectors), "--preset", "full"]
    same += ["--batch-size", "256", "--epochs", "1000", "--restart"]
    for framework in ("torch", "jax"):
        arguments = [*same, "--out", str(folder / framework)]
        measure(framework, arguments, seconds)  # caches the renumbered words and the vectors
        found = measure(framework, arguments, seconds)
        print(f"{framework}: {' and '.join(f'{peak:.0f}' for peak in found)} MB", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
