"""Damaged files of word vectors, by the thousand: nothing but InputError may come out, and soon.

    python -m tools.fuzz_vectors [INPUTS_A_FORMAT]

Each input is a small valid file with a few random changes; the same seed makes the same inputs.
"""

import gzip
import random
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
from gensim.models import KeyedVectors
from safetensors.numpy import save

from common.data.vectors import files
from common.errors import InputError
from tools.fuzz_datasets import mutated

WORDS = ["the", "cat", "sat", "naïve", "Don't", "of", "a", "mat"]
D = 6
MATRIX = np.random.default_rng(0).standard_normal((len(WORDS), D), np.float32)
SECONDS, BYTES = 2.0, 32 * 2**20  # what a damaged file of a kilobyte may take at most
# What means something to one of the parsers.
TOKENS = (
    *(b"999999999999", b"0", b"-1", b"4294967296", b"nan", b"1e999", b"\n", b" ", b"\x00", b"the"),
    *(b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"F64", b"f8", b"|O", b"[", b"'", b"cos\nsystem\n"),
    *(b"R.", b"\x85R", b"\x81", b"b.", b"(", b"}", b"]", b")", b"\x93"),
)


def formats() -> dict[str, dict[str, bytes]]:
    """Format -> its files by name, the one to be damaged first."""
    vectors = KeyedVectors(D)
    vectors.add_vectors(WORDS, MATRIX)
    vectors.lifecycle_events = None  # it has the time in it
    lines = [f"{w} {' '.join(f'{x:.4f}' for x in v)}\n" for w, v in zip(WORDS, MATRIX, strict=True)]
    glove = "".join(lines).encode()
    header = f"{len(WORDS)} {D}\n".encode()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vectors.save_word2vec_format(str(folder / "bin"), binary=True)
        vectors.save(str(folder / "inside"))
        vectors.save(str(folder / "v"), separately=["vectors"])
        read = {path.name: path.read_bytes() for path in folder.iterdir()}
    apart = {"v": read["v"], "v.vectors.npy": read["v.vectors.npy"]}
    vocabulary = "".join(f"{word}\n" for word in WORDS).encode()
    tensors = save({"vectors": MATRIX})
    return {
        "glove": {"v": glove},
        "word2vec text": {"v": header + glove},
        "word2vec binary": {"v": read["bin"]},
        "gensim": {"v": read["inside"]},
        "gensim, vectors apart": apart,
        "gensim, its npy": dict(reversed(apart.items())),
        "safetensors": {"v": tensors, "vocabulary.txt": vocabulary},
        "safetensors, its words": {"vocabulary.txt": vocabulary, "v": tensors},
        "glove, gzip": {"v": gzip.compress(glove, mtime=0)},
        "safetensors, gzip": {"v": gzip.compress(tensors, mtime=0), "vocabulary.txt": vocabulary},
    }


def attack(name: str, inputs: int, folder: Path, seed: int = 0) -> Counter[str]:
    """Read so many damaged files of the format; returns how many were read and how many refused.

    Raises AssertionError for one that takes too long or too much memory, and whatever else than
    InputError comes out.
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
            outcome["refused"] += 1
        except Exception as error:
            error.add_note(f"{name}, input {number} of seed {seed}: {damaged!r}")
            raise
        taken = time.perf_counter() - started, tracemalloc.get_traced_memory()[1] - before
        assert taken < (SECONDS, BYTES) and taken[1] < BYTES, (
            f"{name} {number}: {taken} {damaged!r}"
        )
    return outcome


def main() -> None:
    inputs = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    tracemalloc.start()
    for name in formats():
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            outcome = attack(name, inputs, Path(folder))
        seconds = time.perf_counter() - started
        print(f"{name}: {outcome['read']:,} read, {outcome['refused']:,} refused, {seconds:.0f} s")


if __name__ == "__main__":
    main()
