"""Damage valid files of every source at random: nothing but InputError may come out.

    python -m tools.fuzz_datasets --inputs 20000          # of each kind; --seed, --kinds

Each input is read in this process, so a crash or a hang of the reader shows as one.
"""

import argparse
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

from common.data import sources
from common.errors import InputError

NAMES = ("text", "label", "category", "split")
ROWS = [
    ("A fine book; it's “long”", "positive", "books", "train"),
    ("Broke, after\none day", "negative", "toys", "test"),
    ("x" * 300, "5", "books", "train"),
]
OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
# What readers look for, and numbers at the edges.
TOKENS = [
    *(b"<review>\n", b"</review>\n", b"<review_text>\n", b"</review_text>\n", b'"', b"\n", b"\r"),
    *(b"{", b"[", b"\\ud800", b"\0", b"\xff", b",", b"\t", b"cos\nsystem\n", b"p99999999999\n"),
    *(b"\xff\xff\xff\x7f", b"\xff" * 8, b"1e999", b"NaN", b"r\xff\xff\xff\xff", b"\x8b\0\0\0\x7f"),
]


def mutated(data: bytes, rng: random.Random, tokens: Sequence[bytes] = TOKENS) -> bytes:
    """The data with one to six flips, cuts, repetitions or insertions, some of them of tokens."""
    mutant = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(mutant) + 1)
        end = min(place + rng.choice((1, 2, 8, 64)), len(mutant))
        what = rng.randrange(7)
        if what == 0 and mutant:
            mutant[place % len(mutant)] ^= 1 << rng.randrange(8)
        elif what == 1:
            mutant[place:end] = rng.randbytes(end - place)
        elif what == 2:
            del mutant[place:end]
        elif what == 3:
            mutant[place:place] = mutant[end : end + rng.choice((4, 40))] * rng.choice((1, 2, 50))
        elif what == 4:
            mutant[place:place] = rng.choice(tokens)
        elif what == 5:
            mutant[place:place] = rng.choice(OPCODES) + rng.randbytes(rng.randrange(5))
        elif rng.random() < 0.2:
            del mutant[place:]
    return bytes(mutant)


def _pickles() -> list[bytes]:
    positive = {"books": [["a", "fine", "book", "a"], ["naïve", "w" * 70]]}
    negative = {"books": [["bad"]], "toys": [["broke", "after", "a", "day"]]}
    # fix_imports: as Python 2 would name set.
    return [pickle.dumps((positive, negative, {"a", "b"}), protocol) for protocol in range(5)] + [
        b"((dp1\nS'books'\np2\n(lp3\n(lp4\nS'caf\\xe9'\np5\naS'it'\naas(dp6\n(lp7\nt.",
        b"\x80\x02}q\x01U\x05booksq\x02]q\x03]q\x04(U\x03badq\x05U\x04bookq\x06eas}q\x07"
        b"c__builtin__\nset\nq\x08]q\x09(h\x05h\x06e\x85q\nRq\x0b\x87q\x0c.",
    ]


def _csv(encoding: str = "utf-8") -> bytes:
    file = io.StringIO()
    csv.writer(file).writerows([NAMES, *ROWS])
    return file.getvalue().encode(encoding)


def _tsv() -> bytes:
    lines = ("\t".join(row).replace("\n", " ") for row in [NAMES, *ROWS])
    return "\n".join(lines).encode()


def _json_lines() -> bytes:
    return "\n".join(json.dumps(dict(zip(NAMES, row, strict=True))) for row in ROWS).encode()


def _parquets() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = dict(zip(NAMES, zip(*ROWS * 20, strict=True), strict=True))
    written = []
    for compression in ("none", "snappy", "zstd"):
        file = io.BytesIO()
        pq.write_table(pa.table(columns), file, compression=compression, row_group_size=30)
        written.append(file.getvalue())
    return written


def _saved() -> list[tuple[str, bytes]]:
    """The files, by their paths, that save_to_disk writes."""
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
        path.unlink(missing_ok=True)  # the library may still have it mapped
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


def _one_file(spec: str, name: str = "") -> Callable[[Path, random.Random, list[bytes]], str]:
    def write(folder: Path, rng: random.Random, valid: list[bytes]) -> str:
        path = folder / (name or "table")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(mutated(rng.choice(valid), rng))
        return spec.format(folder if name else path)

    return write


def _text_folder(folder: Path, rng: random.Random, valid: list[bytes]) -> str:
    for split in ("train", "test"):
        _one_file("", f"{split}/neg/0.txt")(folder, rng, valid)
    return f"text:{folder}"


def _spec(folder: Path, rng: random.Random, valid: list[bytes]) -> str:
    (folder / "table").write_bytes(_csv())
    spec = rng.choice(valid).decode().format(folder)
    return mutated(spec.encode(), rng).decode("utf-8", "replace")


# kind -> (how to write a damaged input and name it, the valid files it is made from)
KINDS: dict[str, tuple[Callable[[Path, random.Random, list], str], Callable[[], list]]] = {
    "amazon": (_one_file("amazon:{}", "books/positive.review"), lambda: [_reviews()]),
    "dlstudio": (_dlstudio, _pickles),
    "csv": (_one_file("csv:{}"), lambda: [_csv()]),
    "csv?encoding": (_one_file("csv:{}?encoding=utf-16"), lambda: [_csv("utf-16")]),
    "tsv": (_one_file("tsv:{}"), lambda: [_tsv()]),
    "jsonl": (_one_file("jsonl:{}"), lambda: [_json_lines()]),
    "parquet": (_one_file("parquet:{}"), _parquets),
    "hf": (_hugging_face, _saved),
    "text": (_text_folder, lambda: ["Ein Satz. 中文".encode() * 5]),
    "spec": (_spec, lambda: [b"csv:{0}/table?text=text&label=label", b"tsv:{0}/table,{0}/table"]),
}


def fuzz(kind: str, inputs: int, seed: int = 0) -> tuple[int, float]:
    """Read so many damaged inputs: (how many of them were refused, seconds for the slowest)."""
    rng = random.Random(f"{seed} {kind}")
    write, valid_files = KINDS[kind]
    valid = valid_files()
    refused, slowest = 0, 0.0
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
                refused += 1
            except BaseException as error:
                error.add_note(f"kind {kind}, seed {seed}, input {number}: {spec}")
                raise
            slowest = max(slowest, time.perf_counter() - start)
    return refused, slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    options = parser.parse_args()
    print("| kind | inputs | refused | s | slowest, ms | peak memory, MiB |")
    print("|---|---|---|---|---|---|")
    for kind in options.kinds:
        start = time.perf_counter()
        refused, slowest = fuzz(kind, options.inputs, options.seed)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"| {kind} | {options.inputs:,} | {refused:,} | {seconds:.0f} | "
            f"{slowest * 1e3:.0f} | {peak:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
