"""A file a text, in folders, as the Large Movie Review Dataset (aclImdb; Maas et al. 2011) has it.

    text:DIR          DIR/{train,test}/CLASS/*.txt

The classes are what the folders are called; `unsup`, aclImdb's unlabelled reviews, is none.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from common.data.sources import files
from common.data.sources.dataset import Dataset, Example
from common.errors import InputError

_SPLITS: tuple[Literal["train", "test"], ...] = ("train", "test")


def fingerprint(spec: str) -> dict[str, str | int]:
    return files.fingerprint(
        spec, (path for _, _, folder in _class_folders(spec) for path in _text_files(folder))
    )


def load(spec: str) -> Dataset:
    """All texts, by split, class and file name."""
    folders = _class_folders(spec)

    def examples() -> Iterator[Example]:
        for split, label, folder in folders:
            for path in _text_files(folder):
                with files.open_file(path) as file:
                    text = files.decode(file.read(files.MAX_LINE))
                if not text or text.isspace():
                    raise InputError(f"{path}: no text in it")
                yield Example(text, label, split=split)

    return Dataset(spec, examples, tuple(sorted({label for _, label, _ in folders})))


def _class_folders(spec: str) -> list[tuple[Literal["train", "test"], str, Path]]:
    (root,) = files.parse(spec).paths
    folders = [
        (split, folder.name, folder)
        for split in _SPLITS
        for folder in sorted((root / split).glob("*/"))
        if folder.name != "unsup"
    ]
    for split in _SPLITS:
        if split not in {found for found, _, _ in folders}:
            raise InputError(f"{root}: expected {split}/CLASS/*.txt in it")
    return folders


def _text_files(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.txt"))
    if not found:
        raise InputError(f"{folder}: no .txt file in it")
    return found
