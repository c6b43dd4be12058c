"""Chooses the columns of a table of labelled texts, and converts its rows to examples."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from common.data.sources.dataset import BadRow, Example
from common.errors import InputError

# Names of columns in order of preference; case, spaces, - and _ are ignored.
_USUAL_NAMES = {
    "text": "text review reviewtext reviewbody sentence content body comment document tweet",
    "label": "label labels sentiment class target polarity stars rating score emotion topic",
    "split": "split partition subset",
    "category": "category domain",
}
OPTIONS = tuple(_USUAL_NAMES)

Columns = Sequence[str]
"""The names of the columns for text, label, split and category; empty for a missing column."""
Choose = Callable[[Sequence[str]], Columns]
"""Chooses these columns from the names of all columns."""
Row = tuple[Any, ...]
"""The values of these columns, None for a missing column, and the number of the line or row."""

# Names of splits. Nothing is tuned on a validation split, so it may serve as the test split.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}


def choose(
    names: Sequence[str], options: Mapping[str, str], place: str, needs_label: bool = True
) -> Columns:
    """The columns that the options name, or else those with usual names.

    Raises InputError with `place` and the names of all columns.
    """
    # Reversed, so that the first of two equal names is chosen.
    normalized = {re.sub("[ _-]", "", name.lower()): name for name in reversed(names)}
    all_columns = f"columns: {', '.join(names)}"
    chosen: list[str] = []
    for use, usual in _USUAL_NAMES.items():
        matches = (normalized[name] for name in usual.split() if name in normalized)
        name = options.get(use, next((match for match in matches if match not in chosen), ""))
        if name and names.count(name) != 1:
            count = "no column" if name not in names else "more than one column"
            raise InputError(f"{place}: {count} {name}; {all_columns}")
        if not name and (use == "text" or (use == "label" and needs_label)):
            raise InputError(
                f"{place}: no column for the {use}: name it with ?{use}=COLUMN; {all_columns}"
            )
        chosen.append(name)
    return chosen


def labelled(
    rows: Callable[[], Iterator[Row | BadRow]],
    place: object,
    unit: str,
    split_name: str = "",
    needs_label: bool = True,
) -> Iterator[Example | BadRow]:
    """The examples in `rows()`; the split is `split_name` or, if that is empty, that of the row.

    Without needs_label, a missing label is empty. Errors name `place`, and the row by its unit (row
    or line) and number.
    """
    test_name = "test" if split_name else _test_name(rows())
    for row in rows():
        if isinstance(row, BadRow):
            yield row
            continue
        text, label_value, split_value, category, number = row
        kind = ""
        label = _label(label_value)
        split = split_name if split_name or split_value is None else _split(split_value)
        if not isinstance(text, str):
            problem = "no text" if text is None else "the text is not a string"
        elif not text or text.isspace():
            problem = "no text"
        elif needs_label and not label:
            problem = "no label"
        elif split is None:
            problem = f"the split is {split_value!r}; expected one of {', '.join(SPLITS)}"
            kind = "an unknown split"
        else:
            if split in ("", "train", test_name):
                split = "test" if split == test_name else split
                yield Example(text, label, "" if category is None else str(category).strip(), split)
            continue
        yield BadRow(place, f"{unit} {number:,}", problem, kind)


def _test_name(rows: Iterator[Row | BadRow]) -> str:
    """The split to test on: the validation split if there is no test split."""
    splits = (row[2] for row in rows if not isinstance(row, BadRow))
    has_test = any(split is None or _split(split) == "test" for split in splits)
    return "test" if has_test else "validation"


def _split(value: object) -> str | None:
    return SPLITS.get(str(value).strip().lower())


def _label(value: object) -> str:
    """A label as a string; empty if it is missing."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else str(value) if value == value else ""
    return str(value) if isinstance(value, int) else ""
