"""Encode a data set in parts, by as many machines as there are: the result is that of one.

python -m common.data.encode part --data jsonl:reviews.jsonl --parts FOLDER --part 0 --of 8
python -m common.data.encode part --data jsonl:reviews.jsonl --parts FOLDER --part 1 --of 8
...
python -m common.data.encode merge --data jsonl:reviews.jsonl --parts FOLDER

What starts the parts is yours to choose: a Slurm array, Dask, a loop. FOLDER is of those that all
of them see, as is the cache that the last command writes (GRU_TWINS_CACHE). So is the source, or
its copies lie at the same path with the same time of change (`cp -p`): a part knows it by these.
Each part reads the whole source, ten times as fast as words are numbered, and encodes every
so-manyth piece of it.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import tyro
from safetensors.numpy import load_file

from common import files
from common.data import corpus, sources
from common.data.corpus import TOKENS, Corpus, Raw
from common.data.encoding import numbering
from common.data.sources.dataset import Dataset
from common.errors import InputError, exit_on_input_error

ABOUT, COLUMNS, WORDS = "about.json", "columns.safetensors", "vocabulary.txt"


@dataclass(frozen=True)
class Options:
    """Encode a data set in parts, and merge them; what is merged is in the cache, as if one machine
    had encoded it."""

    do: tyro.conf.Positional[Literal["part", "merge"]]
    """part or merge."""
    parts: Path
    """The folder of the parts."""
    data: str = "imdb"
    """The data set, as the trainings take it."""
    part: int = 0
    """Which part, from 0 on."""
    of: int = 1
    """How many parts there are."""
    skip_bad_rows: bool = False
    """Leave out the rows of a table that cannot be used, as the trainings do."""


def main() -> None:
    """The command line."""
    from common.training.options import parse_options

    with exit_on_input_error():
        options = parse_options(Options, "python -m common.data.encode")
        if options.do == "part":
            if options.of < 1:
                raise InputError(f"--of {options.of}: must be at least 1")
            if not 0 <= options.part < options.of:
                raise InputError(f"--part {options.part}: not from 0 to {options.of - 1}")
            folder = options.parts / str(options.part)
            number, of = options.part, options.of
            count = encode_part(options.data, folder, number, of, options.skip_bad_rows)
            print(f"{folder}: {count:,} texts")
        else:
            found = merge(options.data, options.parts, options.skip_bad_rows)
            count = len(found.train) + len(found.test)
            print(f"{options.data}: {count:,} texts, {len(found.vocabulary):,} words")


def encode_part(spec: str, folder: Path, part: int, of: int, skip_bad_rows: bool = False) -> int:
    """Write one part of so many to a folder, whole or not at all; how many texts it has.

    Raises InputError where that holds another part, and as corpus.load does.
    """
    about = {"key": corpus.key_of(sources.fingerprint(spec), skip_bad_rows), "part": part, "of": of}
    if _holds_another(folder, about):
        raise InputError(f"{folder}: holds another part: remove it, or take other --parts")
    left_out = Counter[str]() if skip_bad_rows else None
    with files.writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with files.aside(folder) as partial:
            partial.mkdir()
            raw = corpus.read(sources.load(spec), partial / TOKENS, left_out, part, of)
            words = "".join(f"{word}\n" for word in raw.words)
            (partial / WORDS).write_text(words, encoding="utf-8")
            (partial / COLUMNS).write_bytes(files.to_tensors(raw.columns))
            about |= {name: getattr(raw, name) for name in ("labels", "categories", "chunks")}
            about["left_out"] = left_out or {}
            about["sums"] = {name: _sum(partial / name) for name in (TOKENS, COLUMNS, WORDS)}
            (partial / ABOUT).write_text(json.dumps(about))
            files.remove(folder)
    return len(raw.columns["labels"])


def _holds_another(folder: Path, about: dict[str, Any]) -> bool:
    """Whether there is a part in a folder that says otherwise of itself, and is not damaged."""
    try:
        known = files.read_json(folder / ABOUT)
        return bool(json.loads(json.dumps(about)) != {name: known[name] for name in about})
    except (InputError, KeyError, TypeError):
        return False


def merge(spec: str, folder: Path, skip_bad_rows: bool = False) -> Corpus:
    """The data set of the parts in a folder, which is in the cache then.

    Raises InputError for parts that are missing, or of another data set, and as corpus.load does.
    """
    fingerprint = sources.fingerprint(spec)
    key = corpus.key_of(fingerprint, skip_bad_rows)
    abouts = [_about(folder, 0, 1, key)]
    of = abouts[0]["of"]
    abouts += [_about(folder, part, of, key) for part in range(1, of)]
    folders = [folder / str(part) for part in range(len(abouts))]

    def join(dataset: Dataset, path: Path, left_out: Counter[str] | None) -> Raw:
        if left_out is not None:
            left_out.update(abouts[0]["left_out"])  # each has read all rows
        return _join(folders, abouts, path)

    return corpus.encoded(lambda: sources.load(spec), fingerprint, skip_bad_rows, join)


def _about(parts: Path, part: int, of: int, key: dict[str, Any]) -> dict[str, Any]:
    """What a part says of itself, after it was found to be that part, and undamaged."""
    folder = parts / str(part)
    if not folder.exists():
        raise InputError(f"{folder}: part {part}{f' of {of}' if part else ''} is missing")
    about = files.read_json(folder / ABOUT)
    try:
        if about["key"] != json.loads(json.dumps(key)):
            other = "another state of it (path, size, time of change)"
            raise InputError(
                f"{folder}: is of another data set, {other}, or with another --skip-bad-rows"
            )
        if about["part"] != part or (part and about["of"] != of):
            raise InputError(f"{folder}: is part {about['part']} of {about['of']}")
        sums = about["sums"]
    except (KeyError, TypeError):
        raise InputError(f"{folder / ABOUT}: not what it should hold") from None
    for name in (TOKENS, COLUMNS, WORDS):
        if _sum(folder / name) != sums[name]:
            raise InputError(f"{folder / name}: damaged (its SHA-256 is not that in {ABOUT})")
    return about


def _sum(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _join(folders: list[Path], abouts: list[dict[str, Any]], path: Path) -> Raw:
    """All parts as one, their pieces in the order of the source, and their tokens in one file."""
    numbers = {name: numbering() for name in ("words", "labels", "categories")}
    whole: dict[str, list[np.ndarray]] = {}
    parts = [_Part(*each, numbers) for each in zip(folders, abouts, strict=True)]
    with path.open("wb") as file:
        # Of the pieces of the source, each part has every so-manyth.
        for piece in range(sum(len(about["chunks"]) for about in abouts)):
            for name, column in parts[piece % len(parts)].take(file).items():
                whole.setdefault(name, []).append(column)
    lists = {name: list(found) for name, found in numbers.items()}
    return Raw(**lists, columns={n: np.concatenate(them) for n, them in whole.items()}, chunks=[])


class _Part:
    """A part that is read piece by piece, its numbers those that all parts have in common."""

    def __init__(self, folder: Path, about: dict[str, Any], numbers: dict[str, Any]) -> None:
        self.new = {}
        words = (folder / WORDS).read_text(encoding="utf-8").split("\n")[:-1]
        for name, number in numbers.items():
            values = words if name == "words" else about[name]
            found = map(number.__getitem__, values)
            self.new[name] = np.fromiter(found, np.int32, len(values))
        self.columns = load_file(folder / COLUMNS)
        for name in ("labels", "categories"):
            self.columns[name] = self.new[name][self.columns[name]]
        self.sizes, self.start, self.read = iter(about["chunks"]), 0, 0
        self.tokens = folder / TOKENS

    def take(self, file: BinaryIO) -> dict[str, np.ndarray]:
        """The columns of the next piece; its tokens go to the file."""
        texts = slice(self.start, self.start + next(self.sizes))
        found = {name: column[texts] for name, column in self.columns.items()}
        count = int(found["lengths"].sum())
        old = np.fromfile(self.tokens, np.int32, count, offset=4 * self.read)
        file.write(self.new["words"][old].data)
        self.start, self.read = texts.stop, self.read + count
        return found


if __name__ == "__main__":
    main()
