"""The time and the memory of reading word vectors, as many as GoogleNews has (3,000,000 x 300).

Writes a file of word2vec (3.6 GB) and a sparse file of gensim. A child process reads each file and
keeps every thirtieth word.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
from gensim.models import KeyedVectors
from tyro.conf import Positional

from tools.program import print_header, run_program

COUNT, D, EVERY = 3_000_000, 300, 30
READ = """
import os, sys, time
from pathlib import Path
from common.data.vectors import files
from tools.program import memory_of, print_row
path = Path(sys.argv[1])
words = (path.parent / "words").read_text().split("\\n")
start = time.process_time()
kept, matrix = files.read(path, words)
assert kept == words
seconds = time.process_time() - start
# getrusage would include the memory of the parent before exec.
print_row(path.name, f"{seconds:.1f}", f"{memory_of(os.getpid())['VmHWM'] / 2**20:.0f} MiB")
"""


def synthetic_words(count: int) -> list[str]:
    """Distinct lower-case words of 13 characters on average."""
    return [
        f"{'word of a phrase'[: number % 17].replace(' ', '_')}{number}" for number in range(count)
    ]


def write_word2vec(path: Path, words: list[str]) -> None:
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(f"{len(words)} {D}\n".encode())
        for start in range(0, len(words), 10_000):
            some = words[start : start + 10_000]
            for word, row in zip(some, rng.random((len(some), D), np.float32), strict=True):
                file.write(b"%b %b" % (word.encode(), row))


def write_gensim(path: Path, words: list[str]) -> None:
    keyed = KeyedVectors(1)
    keyed.add_vectors(words, np.zeros((len(words), 1), np.float32))
    for number in range(len(words)):
        keyed.set_vecattr(words[number], "count", len(words) - number)
    keyed.save(str(path), separately=["vectors"])
    # A sparse file of zeros, which occupies no space on the disk.
    table = path.with_name(f"{path.name}.vectors.npy")
    np.lib.format.open_memmap(table, "w+", np.float32, (len(words), D)).flush()


def main(folder: Positional[Path], count: int = COUNT) -> None:
    """Measure and print.

    Args:
        folder: The folder of the files, which are written unless they exist.
        count: The number of words.
    """
    words = synthetic_words(count)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "words").write_text("\n".join(words[::EVERY]))
    print_header("file", "CPU s", "peak memory of the process")
    for name, write in {"vectors.bin": write_word2vec, "vectors.kv": write_gensim}.items():
        path = folder / name
        if not path.exists():
            write(path, words)
        subprocess.run([sys.executable, "-c", READ, path], check=True)


if __name__ == "__main__":
    run_program(main)
