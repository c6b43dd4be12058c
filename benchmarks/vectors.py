"""Time and memory that it takes to read word vectors of GoogleNews' size.

python -m benchmarks.vectors FOLDER        # writes 3,000,000 x 300: 3.6 GB, and a sparse file

A process of its own reads each file, and keeps every thirtieth of its words.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
from gensim.models import KeyedVectors

COUNT, D, EVERY = 3_000_000, 300, 30
READ = """
import sys, time
from pathlib import Path
from common.data.vectors import files
path = Path(sys.argv[1])
words = (path.parent / "words").read_text().split("\\n")
start = time.process_time()
found, matrix = files.read(path, words)
assert found == words
seconds = time.process_time() - start
# What getrusage says counts, too, what the parent had in memory.
status = Path("/proc/self/status").read_text()
peak = int(status.partition("VmHWM:")[2].split()[0])
print(f"| {path.name} | {seconds:.1f} | {peak / 1024:.0f} MiB |")
"""


def made_up_words(count: int) -> list[str]:
    """Of 13 characters on average, all in lower case."""
    return [
        f"{'word of a phrase'[: number % 17].replace(' ', '_')}{number}" for number in range(count)
    ]


def word2vec(path: Path, words: list[str]) -> None:
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(f"{len(words)} {D}\n".encode())
        for start in range(0, len(words), 10_000):
            some = words[start : start + 10_000]
            for word, row in zip(some, rng.random((len(some), D), np.float32), strict=True):
                file.write(b"%b %b" % (word.encode(), row))


def gensim(path: Path, words: list[str]) -> None:
    keyed = KeyedVectors(1)
    keyed.add_vectors(words, np.zeros((len(words), 1), np.float32))
    for number in range(len(words)):
        keyed.set_vecattr(words[number], "count", len(words) - number)
    keyed.save(str(path), separately=["vectors"])
    # Rows of zeros, which take no place on the disk.
    table = path.with_name(f"{path.name}.vectors.npy")
    np.lib.format.open_memmap(table, "w+", np.float32, (len(words), D)).flush()


def main() -> None:
    folder, words = Path(sys.argv[1]), made_up_words(COUNT)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "words").write_text("\n".join(words[::EVERY]))
    print("| file | CPU s | peak memory of the process |\n|---|---|---|", flush=True)
    for name, write in {"vectors.bin": word2vec, "vectors.kv": gensim}.items():
        path = folder / name
        if not path.exists():
            write(path, words)
        subprocess.run([sys.executable, "-c", READ, path], check=True)


if __name__ == "__main__":
    main()
