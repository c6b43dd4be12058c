"""Tables of labelled texts: which column is which, and what becomes of a row.

    csv:FILE  tsv:FILE  jsonl:FILE  parquet:FILE         the split: a column, or else to be drawn
    csv:TRAIN_FILE,TEST_FILE                             the split: the two files

Options follow a question mark: csv:FILE?text=COLUMN&label=COLUMN. `text`, `label`, `split` and
`category` name columns; without them the usual names are looked for, and `split=`, `category=` say
that there is no such column. Rows for validation are tested on where there are none for testing,
else left out: nothing here is chosen by a validation score. The readers have options of their own.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Literal

from common.data.sources import delimited, files, json_lines, parquet
from common.data.sources.columns import OPTIONS, Row, choose
from common.data.sources.dataset import Dataset, Example
from common.errors import InputError

# kind -> (reader of rows, what it counts)
_READERS: Mapping[str, tuple[Callable, str]] = {
    "csv": (partial(delimited.rows, delimiter=","), "line"),
    "tsv": (partial(delimited.rows, delimiter="\t"), "line"),
    "jsonl": (json_lines.rows, "line"),
    "parquet": (parquet.rows, "row"),
}
KINDS = tuple(_READERS)

SPLITS: Mapping[str, Literal["train", "test", "validation"]] = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}


def load(spec: str) -> Dataset:
    """The rows of the table, or of the two tables."""
    kind = spec.partition(":")[0]
    reader, unit = _READERS[kind]
    of_its_own = delimited.OPTIONS if kind in ("csv", "tsv") else ()
    paths, options = files.parse(spec, (*OPTIONS, *of_its_own), most=2)
    delimited.check(spec, options)
    splits: tuple[Literal["train", "test", ""], ...] = ("train", "test") if paths[1:] else ("",)

    def examples() -> Iterator[Example]:
        for path, split in zip(paths, splits, strict=True):
            columns = partial(choose, options=options, place=str(path))
            yield from labelled(partial(reader, path, options, columns), f"{path}: {unit}", split)

    return Dataset(spec, examples, state=files.state(paths))


def labelled(
    rows: Callable[[], Iterator[Row]], where: str, given: Literal["train", "test", ""] = ""
) -> Iterator[Example]:
    """The examples in `rows()`; the split is `given`, or what their rows say.

    `where`, followed by the number of the row, is the place that errors name.
    """
    test_splits: set[str] = set() if given else _test_splits(rows(), where)
    for number, text, label, split_name, category in rows():
        if not isinstance(text, str) or not text or text.isspace():
            what = "no text" if text is None or isinstance(text, str) else "the text is no string"
            raise InputError(f"{where} {number:,}: {what}")
        label_name = _label(label)
        if not label_name:
            raise InputError(f"{where} {number:,}: no label")
        split: Literal["train", "test", ""] = given
        if not given and split_name is not None:
            found = _split(split_name, where, number)
            if found == "train":
                split = "train"
            elif found in test_splits:
                split = "test"
            else:
                continue
        yield Example(text, label_name, "" if category is None else str(category).strip(), split)


def _test_splits(rows: Iterator[Row], where: str) -> set[str]:
    """Which splits are tested on; validation only where there is no other."""
    for number, _, _, split, _ in rows:
        if split is None or _split(split, where, number) == "test":
            return {"test"}
    return {"validation"}


def _split(name: object, where: str, number: int) -> Literal["train", "test", "validation"]:
    try:
        return SPLITS[str(name).strip().lower()]
    except KeyError:
        raise InputError(
            f"{where} {number:,}: the split is {name!r}; expected one of {', '.join(SPLITS)}"
        ) from None


def _label(value: object) -> str:
    """A label as a string; empty: there is none."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else str(value) if value == value else ""
    return str(value) if isinstance(value, int) else ""
