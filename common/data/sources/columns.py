"""Tables of labelled texts: which column is which, and what becomes of a row."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from common.data.sources.dataset import BadRow, Example
from common.errors import InputError

# The usual names, the most telling first; case, blanks, - and _ do not matter.
_USUAL = {
    "text": "text review reviewtext reviewbody sentence content body comment document tweet",
    "label": "label labels sentiment class target polarity stars rating score emotion topic",
    "split": "split partition subset",
    "category": "category domain",
}
OPTIONS = tuple(_USUAL)

Columns = Sequence[str]
"""The names of the columns for text, label, split and category; empty where there is none."""
Choose = Callable[[Sequence[str]], Columns]
"""Chooses them from the names of all."""
Row = tuple[Any, ...]
"""What these columns have, None where there is no column, and the number of the line or row."""

# What splits are called. Nothing here is chosen by a score on validation: it may stand for test.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}


def choose(
    names: Sequence[str], options: Mapping[str, str], place: str, needs_label: bool = True
) -> Columns:
    """The columns that the options name, or else those with usual names.

    Raises InputError, naming `place` and the columns there are.
    """
    # Of two alike, the first.
    plain = {re.sub("[ _-]", "", name.lower()): name for name in reversed(names)}
    there = f"there are: {', '.join(names)}"
    chosen: list[str] = []
    for use, usual in _USUAL.items():
        guesses = (plain[guess] for guess in usual.split() if guess in plain)
        name = options.get(use, next((guess for guess in guesses if guess not in chosen), ""))
        if name and names.count(name) != 1:
            found = "no column" if name not in names else "more than one column"
            raise InputError(f"{place}: {found} {name}; {there}")
        if not name and (use == "text" or (use == "label" and needs_label)):
            raise InputError(
                f"{place}: no column for the {use}: name it with ?{use}=COLUMN; {there}"
            )
        chosen.append(name)
    return chosen


def labelled(
    rows: Callable[[], Iterator[Row | BadRow]],
    where: object,
    unit: str,
    given: str = "",
    needs_label: bool = True,
) -> Iterator[Example | BadRow]:
    """The examples in `rows()`; the split is `given`, or what their rows say.

    Without needs_label, a row without a label is an example whose label is empty.

    `where`, and the number of the unit (row or line), is the place that errors name.
    """
    tested = "test" if given else _tested(rows())
    for row in rows():
        if isinstance(row, BadRow):
            yield row
            continue
        text, label_value, split_value, category, number = row
        kind = ""
        label = _label(label_value)
        split = given if given or split_value is None else _split(split_value)
        if not isinstance(text, str):
            problem = "no text" if text is None else "the text is no string"
        elif not text or text.isspace():
            problem = "no text"
        elif needs_label and not label:
            problem = "no label"
        elif split is None:
            problem = f"the split is {split_value!r}; expected one of {', '.join(SPLITS)}"
            kind = "an unknown split"
        else:
            if split in ("", "train", tested):
                split = "test" if split == tested else split
                yield Example(text, label, "" if category is None else str(category).strip(), split)
            continue
        yield BadRow(where, f"{unit} {number:,}", problem, kind)


def _tested(rows: Iterator[Row | BadRow]) -> str:
    """Which split is tested on: the one for validation only where there is no other."""
    splits = (row[2] for row in rows if not isinstance(row, BadRow))
    found = any(split is None or _split(split) == "test" for split in splits)
    return "test" if found else "validation"


def _split(value: object) -> str | None:
    return SPLITS.get(str(value).strip().lower())


def _label(value: object) -> str:
    """A label as a string; empty: there is none."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else str(value) if value == value else ""
    return str(value) if isinstance(value, int) else ""
