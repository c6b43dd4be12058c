"""Reads damaged files of word vectors; the reader must raise only InputError, and quickly.

Each input is a small valid file with a few random changes; the seed determines the inputs.
"""

import gzip
import random
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
from gensim.models import KeyedVectors
from safetensors.numpy import save
from tyro.conf import Positional

from common.data.vectors import files
from common.errors import InputError
from tools.fuzz_datasets import mutated
from tools.program import run_program

WORDS = ["the", "cat", "sat", "naïve", "Don't", "of", "a", "mat"]
D = 6
MATRIX = np.random.default_rng(0).standard_normal((len(WORDS), D), np.float32)
SECONDS, BYTES = 2.0, 32 * 2**20  # the limits for a damaged file of a kilobyte
# Tokens that have a meaning for a parser.
TOKENS = (
    *(b"999999999999", b"0", b"-1", b"4294967296", b"nan", b"1e999", b"\n", b" ", b"\x00", b"the"),
    *(b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"F64", b"f8", b"|O", b"[", b"'", b"cos\nsystem\n"),
    *(b"R.", b"\x85R", b"\x81", b"b.", b"(", b"}", b"]", b")", b"\x93"),
)


def formats() -> dict[str, dict[str, bytes]]:
    """Format -> its files by name; the first file is damaged."""
    vectors = KeyedVectors(D)
    vectors.add_vectors(WORDS, MATRIX)
    vectors.lifecycle_events = None  # contains the time
    lines = [f"{w} {' '.join(f'{x:.4f}' for x in v)}\n" for w, v in zip(WORDS, MATRIX, strict=True)]
    glove = "".join(lines).encode()
    header = f"{len(WORDS)} {D}\n".encode()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vectors.save_word2vec_format(str(folder / "bin"), binary=True)
        vectors.save(str(folder / "inside"))
        vectors.save(str(folder / "v"), separately=["vectors"])
        saved = {path.name: path.read_bytes() for path in folder.iterdir()}
    separate = {name: saved[name] for name in ("v", "v.vectors.npy")}
    vocabulary = "".join(f"{word}\n" for word in WORDS).encode()
    tensors = save({"vectors": MATRIX})
    return {
        "glove": {"v": glove},
        "word2vec text": {"v": header + glove},
        "word2vec binary": {"v": saved["bin"]},
        "gensim": {"v": saved["inside"]},
        "gensim, separate vectors": separate,
        "gensim, its npy": dict(reversed(separate.items())),
        "safetensors": {"v": tensors, "vocabulary.txt": vocabulary},
        "safetensors, its words": {"vocabulary.txt": vocabulary, "v": tensors},
        "glove, gzip": {"v": gzip.compress(glove, mtime=0)},
        "safetensors, gzip": {"v": gzip.compress(tensors, mtime=0), "vocabulary.txt": vocabulary},
    }


def attack(name: str, inputs: int, folder: Path, seed: int = 0) -> Counter[str]:
    """Read damaged files of a format; return the numbers of files that were read and rejected.

    Raises AssertionError if a file takes too much time or memory, and any exception of the reader
    other than InputError.
    """
    parts, outcome = formats()[name], Counter[str]()
    for file, content in parts.items():
        (folder / file).write_bytes(content)
    target = next(iter(parts))
    rng = random.Random(seed)
    for number in range(inputs):
        damaged = mutated(parts[target], rng, TOKENS)
        (folder / target).write_bytes(damaged)
        started = time.perf_counter()
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            words, matrix = files.read(folder / "v", WORDS)
            assert set(words) <= set(WORDS)
            assert len(words) == len(matrix) > 0
            assert matrix.dtype == np.float32
            assert np.isfinite(matrix).all()
            outcome["read"] += 1
        except InputError as error:
            assert str(folder) in str(error), f"{name} {number}: {error}"
            outcome["rejected"] += 1
        except Exception as error:
            error.add_note(f"{name}, input {number} of seed {seed}: {damaged!r}")
            raise
        received = time.perf_counter() - started, tracemalloc.get_traced_memory()[1] - before
        assert received < (SECONDS, BYTES) and received[1] < BYTES, (
            f"{name} {number}: {received} {damaged!r}"
        )
    return outcome


def main(inputs: Positional[int] = 20_000) -> None:
    """Read this number of inputs of each format and print the outcomes."""
    tracemalloc.start()
    for name in formats():
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            outcome = attack(name, inputs, Path(folder))
        seconds = time.perf_counter() - started
        print(
            f"{name}: {outcome['read']:,} read, {outcome['rejected']:,} rejected, {seconds:.0f} s"
        )


if __name__ == "__main__":
    run_program(main)
