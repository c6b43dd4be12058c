"""One file per text, in the layout of the Large Movie Review Dataset (aclImdb; Maas et al. 2011).

    text:DIR          DIR/{train,test}/CLASS/*.txt

The classes are the names of the folders, without `unsup`, the unlabelled reviews of aclImdb.
"""

from collections.abc import Iterator
from pathlib import Path

from common.data.sources import files
from common.data.sources.dataset import Dataset, Example
from common.errors import InputError


def load(spec: str) -> Dataset:
    """All texts, by split, class and file name."""
    (root,), _ = files.parse(spec)
    paths: list[Path] = []
    for split in ("train", "test"):
        folders = [path for path in sorted((root / split).glob("*/")) if path.name != "unsup"]
        if not folders:
            raise InputError(f"{root}: expected {split}/CLASS/*.txt in it")
        for folder in folders:
            if not (texts := sorted(folder.glob("*.txt"))):
                raise InputError(f"{folder}: no .txt file in it")
            paths += texts

    def examples() -> Iterator[Example]:
        for path in paths:
            with files.open_file(path) as file:
                text = files.decode(file.read(files.MAX_LINE))
            if not text or text.isspace():
                raise InputError(f"{path}: no text in it")
            yield Example(text, path.parent.name, split=path.parent.parent.name)

    classes = tuple(sorted({path.parent.name for path in paths}))
    return Dataset(spec, examples, classes, state=files.state(paths))
