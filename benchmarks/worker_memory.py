"""The memory of each of two workers that train on a data set larger than that memory.

FOLDER is that of tools/large_corpus.py. The first training of each framework fills the cache and is
not measured.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from common.data import corpus
from tools import large_corpus
from tools.program import children_of, memory_of, run_program

WORDS, D = 100_000, 100


def peaks(framework: str, arguments: list[str], seconds: float) -> list[float]:
    """The peak memory (PSS, in MB) of each of two workers that train for this number of seconds."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    sizes: dict[int, float] = {}
    command = [*torchrun, f"{framework}_impl.train", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + seconds
        while time.monotonic() < end and process.poll() is None:
            for child in children_of(process.pid):
                size = memory_of(child, "smaps_rollup")["Pss"] / 1e6
                sizes[child] = max(sizes.get(child, 0), size)
            time.sleep(0.1)
        assert process.poll() is None, f"{framework}: training ended early"
        process.send_signal(signal.SIGTERM)
    return sorted(sizes.values())


def main(folder: Positional[Path], reviews: int = 5_000_000, seconds: float = 60) -> None:
    """Print the peak memory of each worker in both frameworks.

    Args:
        folder: The folder of the reviews, which are written unless they exist.
        reviews: The number of reviews.
        seconds: The duration of a training.
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
    options = ["--data", f"jsonl:{path}", "--vectors", str(vectors), "--preset", "full"]
    options += ["--batch-size", "256", "--epochs", "1000", "--restart"]
    for framework in ("torch", "jax"):
        arguments = [*options, "--out", str(folder / framework)]
        peaks(framework, arguments, seconds)  # caches the renumbered words and the vectors
        sizes = peaks(framework, arguments, seconds)
        print(f"{framework}: {' and '.join(f'{size:.0f}' for size in sizes)} MB", flush=True)


if __name__ == "__main__":
    run_program(main)
