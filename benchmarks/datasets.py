"""The reading speed of each data source, on one core, from files in the page cache."""

import csv
import gzip
import json
import pickle
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from common.data import sources
from tools.program import print_header, print_row, run_program

Rows = list[tuple[str, str]]
LABELS = ("positive", "negative")


def synthetic_rows(characters: int) -> Rows:
    """Texts of 1,300 characters on average, whose words have Zipf's frequencies, and labels."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlucmfw", k=rng.randint(2, 9))) for _ in range(30_000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    rows = []
    while characters > 0:
        text = " ".join(rng.choices(words, weights, k=rng.randint(30, 370)))
        rows.append((text, rng.choice(LABELS)))
        characters -= len(text)
    return rows


def amazon(folder: Path, rows: Rows) -> str:
    tags = ("unique_id", "asin", "product_name", "helpful", "rating", "title", "date", "reviewer")
    head = "<review>\n" + "".join(f"<{tag}>\nsomething\n</{tag}>\n" for tag in tags)
    (folder / "books").mkdir()
    for label in LABELS:
        with (folder / f"books/{label}.review").open("w") as file:
            for text in (text for text, text_label in rows if text_label == label):
                file.write(f"{head}<review_text>\n{text}\n</review_text>\n</review>\n")
    return f"amazon:{folder}"


def dlstudio(folder: Path, rows: Rows, *, protocol: int) -> str:
    reviews = [[text.split() for text, own in rows if own == label] for label in LABELS]
    (folder / "test").write_bytes(gzip.compress(pickle.dumps(({}, {}, []))))
    with gzip.open(folder / "train", "wb") as file:
        if protocol:  # the file contains every word once, and later its number in the memo
            pickle.dump(({"books": reviews[0]}, {"books": reviews[1]}, []), file, protocol)
        else:  # as Python 2 pickles words if each is an object of its own
            number = 0
            file.write(b"(")
            for some in reviews:
                file.write(b"(dS'books'\n(l")
                for words in some:
                    numbered = enumerate(words, start=number)
                    lines = "".join(f"S'{word}'\np{place}\na" for place, word in numbered)
                    file.write(f"(l{lines}a".encode())
                    number += len(words)
                file.write(b"s")
            file.write(b"(lt.")
    return f"dlstudio:{folder}/train,{folder}/test"


def delimited(folder: Path, rows: Rows, *, kind: str) -> str:
    with (folder / "table").open("w", newline="") as file:
        writer = csv.writer(
            file, delimiter="," if kind == "csv" else "\t", quoting=csv.QUOTE_MINIMAL
        )
        writer.writerows([("text", "label"), *rows])
    return f"{kind}:{folder}/table"


def json_lines(folder: Path, rows: Rows) -> str:
    with (folder / "table").open("w") as file:
        for text, label in rows:
            file.write(json.dumps({"text": text, "label": label}) + "\n")
    return f"jsonl:{folder}/table"


def parquet(folder: Path, rows: Rows) -> str:
    texts, labels = zip(*rows, strict=True)
    pq.write_table(pa.table({"text": texts, "label": labels}), folder / "table")
    return f"parquet:{folder}/table"


def text_files(folder: Path, rows: Rows) -> str:
    for split in ("train", "test"):
        for label in LABELS:
            (folder / split / label).mkdir(parents=True)
    for number, (text, label) in enumerate(rows):
        split = ("train", "test")[number % 2]
        (folder / split / label / f"{number}_5.txt").write_text(text)
    return f"text:{folder}"


def hugging_face(folder: Path, rows: Rows) -> str:
    import datasets as hf

    texts, labels = zip(*rows, strict=True)
    hf.disable_progress_bars()
    hf.Dataset.from_dict({"text": texts, "label": labels}).save_to_disk(folder / "saved")
    return f"hf:{folder}/saved"


SOURCES: dict[str, Callable[[Path, Rows], str]] = {
    "amazon": amazon,
    "dlstudio, protocol 0": lambda folder, rows: dlstudio(folder, rows, protocol=0),
    "dlstudio, protocol 2": lambda folder, rows: dlstudio(folder, rows, protocol=2),
    "csv": lambda folder, rows: delimited(folder, rows, kind="csv"),
    "tsv": lambda folder, rows: delimited(folder, rows, kind="tsv"),
    "jsonl": json_lines,
    "parquet": parquet,
    "text": text_files,
    "hf": hugging_face,
}


def main(megabytes: float = 50) -> None:
    rows = synthetic_rows(round(megabytes * 1e6))
    megabytes = sum(len(text) for text, _ in rows) / 1e6
    print(f"{len(rows):,} texts, {megabytes:.0f} MB\n")
    print_header("source", "s", "CPU s", "MB/s")
    for name, write in SOURCES.items():
        with tempfile.TemporaryDirectory() as folder:
            dataset = sources.load(write(Path(folder), rows))
            start, cpu_start = time.perf_counter(), time.process_time()
            count = sum(1 for _ in dataset.examples())
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        assert count == len(rows)
        print_row(name, f"{seconds:.2f}", f"{cpu:.2f}", f"{megabytes / cpu:.0f}")
    for name in ("imdb", "rt"):
        start = time.process_time()
        megabytes = sum(len(example.text) for example in sources.load(name).examples()) / 1e6
        cpu = time.process_time() - start
        print_row(f"{name} ({megabytes:.0f} MB)", "", f"{cpu:.2f}", f"{megabytes / cpu:.0f}")


if __name__ == "__main__":
    run_program(main)
