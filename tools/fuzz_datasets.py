"""Damages valid files of each data source at random; the reader must raise only InputError.

This process itself reads the inputs, so a crash or a hang of the reader is visible.
"""

import csv
import gzip
import io
import json
import pickle
import pickletools
import random
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from common.data import sources
from common.errors import InputError
from tools.program import print_header, print_row, run_program

NAMES = ("text", "label", "category", "split")
ROWS = [
    ("A fine book; it's “long”", "positive", "books", "train"),
    ("Broke, after\none day", "negative", "toys", "test"),
    ("x" * 300, "5", "books", "train"),
]
OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
# Tokens that have a meaning for a reader, and extreme numbers.
TOKENS = [
    *(b"<review>\n", b"</review>\n", b"<review_text>\n", b"</review_text>\n", b'"', b"\n", b"\r"),
    *(b"{", b"[", b"\\ud800", b"\0", b"\xff", b",", b"\t", b"cos\nsystem\n", b"p99999999999\n"),
    *(b"\xff\xff\xff\x7f", b"\xff" * 8, b"1e999", b"NaN", b"r\xff\xff\xff\xff", b"\x8b\0\0\0\x7f"),
]


def mutated(data: bytes, rng: random.Random, tokens: Sequence[bytes] = TOKENS) -> bytes:
    """The data with one to six bit flips, deletions, repetitions or insertions, also of tokens."""
    mutant = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(mutant) + 1)
        end = min(place + rng.choice((1, 2, 8, 64)), len(mutant))
        kind = rng.randrange(7)
        if kind == 0 and mutant:
            mutant[place % len(mutant)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            mutant[place:end] = rng.randbytes(end - place)
        elif kind == 2:
            del mutant[place:end]
        elif kind == 3:
            mutant[place:place] = mutant[end : end + rng.choice((4, 40))] * rng.choice((1, 2, 50))
        elif kind == 4:
            mutant[place:place] = rng.choice(tokens)
        elif kind == 5:
            mutant[place:place] = rng.choice(OPCODES) + rng.randbytes(rng.randrange(5))
        elif rng.random() < 0.2:
            del mutant[place:]
    return bytes(mutant)


def _pickles() -> list[bytes]:
    positive = {"books": [["a", "fine", "book", "a"], ["naïve", "w" * 70]]}
    negative = {"books": [["bad"]], "toys": [["broke", "after", "a", "day"]]}
    # By default, pickle.dumps uses the name of set in Python 2.
    return [pickle.dumps((positive, negative, {"a", "b"}), protocol) for protocol in range(5)] + [
        b"((dp1\nS'books'\np2\n(lp3\n(lp4\nS'caf\\xe9'\np5\naS'it'\naas(dp6\n(lp7\nt.",
        b"\x80\x02}q\x01U\x05booksq\x02]q\x03]q\x04(U\x03badq\x05U\x04bookq\x06eas}q\x07"
        b"c__builtin__\nset\nq\x08]q\x09(h\x05h\x06e\x85q\nRq\x0b\x87q\x0c.",
    ]


def _csv() -> str:
    file = io.StringIO()
    csv.writer(file).writerows([NAMES, *ROWS])
    return file.getvalue()


def _tsv() -> bytes:
    lines = ("\t".join(row).replace("\n", " ") for row in [NAMES, *ROWS])
    return "\n".join(lines).encode()


def _json_lines() -> bytes:
    return "\n".join(json.dumps(dict(zip(NAMES, row, strict=True))) for row in ROWS).encode()


def _parquets() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = dict(zip(NAMES, zip(*ROWS * 20, strict=True), strict=True))
    contents = []
    for compression in ("none", "snappy", "zstd"):
        file = io.BytesIO()
        pq.write_table(pa.table(columns), file, compression=compression, row_group_size=30)
        contents.append(file.getvalue())
    return contents


def _saved() -> list[tuple[str, bytes]]:
    """The paths and the contents of the files of save_to_disk."""
    import datasets as hf

    columns = dict(zip(NAMES, zip(*ROWS, strict=True), strict=True))
    classes = hf.ClassLabel(names=sorted(columns["label"]))
    hf.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        table = hf.Dataset.from_dict(columns).cast_column("label", classes)
        hf.DatasetDict({"train": table, "test": table}).save_to_disk(name)
        files = sorted(path for path in Path(name).rglob("*") if path.is_file())
        return [(str(path.relative_to(name)), path.read_bytes()) for path in files]


def _hugging_face(folder: Path, rng: random.Random, valid: list[tuple[str, bytes]]) -> str:
    kind = rng.choice((".arrow", ".arrow", ".json"))
    damaged = rng.choice([name for name, _ in valid if name.endswith(kind)])
    for name, data in valid:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)  # the library may still map the file
        path.write_bytes(mutated(data, rng) if name == damaged else data)
    return f"hf:{folder}"


def _reviews() -> bytes:
    review = "<review>\n<title>\n{1}\n</title>\n<review_text>\n{0}\n</review_text>\n</review>\n"
    return ("<data>\n" + "".join(review.format(*row) for row in ROWS) + "</data>\n").encode()


def _dlstudio(folder: Path, rng: random.Random, valid: list[bytes]) -> str:
    packed = gzip.compress(rng.choice(valid), 1)
    (folder / "test").write_bytes(packed)
    if rng.random() < 0.2:
        packed = mutated(packed, rng)
    else:
        packed = gzip.compress(mutated(rng.choice(valid), rng), 1)
    (folder / "train").write_bytes(packed)
    return f"dlstudio:{folder}/train,{folder}/test"


def _files(spec: str, *names: str) -> Callable[[Path, random.Random, list[bytes]], str]:
    def write(folder: Path, rng: random.Random, valid: list[bytes]) -> str:
        for path in (folder / name for name in names):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(mutated(rng.choice(valid), rng))
        return spec.format(folder)

    return write


def _spec(folder: Path, rng: random.Random, valid: list[bytes]) -> str:
    (folder / "table").write_text(_csv(), newline="")
    spec = rng.choice(valid).decode().format(folder)
    return mutated(spec.encode(), rng).decode("utf-8", "replace")


# kind -> (a function that writes a damaged input and returns its specification, the valid files)
KINDS: dict[str, tuple[Callable[[Path, random.Random, list], str], Callable[[], list]]] = {
    "amazon": (_files("amazon:{}", "books/positive.review"), lambda: [_reviews()]),
    "dlstudio": (_dlstudio, _pickles),
    "csv": (_files("csv:{}/table", "table"), lambda: [_csv().encode()]),
    "csv?encoding": (
        _files("csv:{}/table?encoding=utf-16", "table"),
        lambda: [_csv().encode("utf-16")],
    ),
    "tsv": (_files("tsv:{}/table", "table"), lambda: [_tsv()]),
    "jsonl": (_files("jsonl:{}/table", "table"), lambda: [_json_lines()]),
    "parquet": (_files("parquet:{}/table", "table"), _parquets),
    "hf": (_hugging_face, _saved),
    "text": (
        _files("text:{}", "train/neg/0.txt", "test/neg/0.txt"),
        lambda: ["Ein Satz. 中文".encode() * 5],
    ),
    "spec": (_spec, lambda: [b"csv:{0}/table?text=text&label=label", b"tsv:{0}/table,{0}/table"]),
}


def fuzz(kind: str, inputs: int, seed: int = 0) -> tuple[int, float]:
    """Read damaged inputs; return the number of rejected inputs and the longest time in seconds."""
    rng = random.Random(f"{seed} {kind}")
    write, valid_files = KINDS[kind]
    valid = valid_files()
    rejected, slowest = 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(inputs):
            spec = write(Path(folder), rng, valid)
            start = time.perf_counter()
            try:
                sources.fingerprint(spec)
                for example in sources.load(spec).examples():
                    assert example.label and example.split in ("", "train", "test")
                    example.text.encode()
            except InputError as error:
                assert kind == "spec" or "\n" not in str(error), error
                rejected += 1
            except BaseException as error:
                error.add_note(f"kind {kind}, seed {seed}, input {number}: {spec}")
                raise
            slowest = max(slowest, time.perf_counter() - start)
    return rejected, slowest


def main(
    inputs: int = 20_000, seed: int = 0, kinds: tuple[Literal[tuple(KINDS)], ...] = tuple(KINDS)
) -> None:
    """Read the inputs and print a table.

    Args:
        inputs: The number of inputs of each kind.
        seed: The seed of the damages.
        kinds: The kinds to read.
    """
    print_header("kind", "inputs", "rejected", "s", "slowest, ms", "peak memory, MiB")
    for kind in kinds:
        start = time.perf_counter()
        rejected, slowest = fuzz(kind, inputs, seed)
        seconds = f"{time.perf_counter() - start:.0f}"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print_row(
            kind, f"{inputs:,}", f"{rejected:,}", seconds, f"{slowest * 1e3:.0f}", f"{peak:.0f}"
        )


if __name__ == "__main__":
    run_program(main)
