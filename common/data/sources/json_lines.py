"""JSON Lines: an object a line. The columns are the keys of the first."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from common.data.sources import files
from common.data.sources.columns import Columns, Row
from common.errors import InputError


def rows(
    path: Path, options: Mapping[str, str], choose: Callable[[Sequence[str]], Columns]
) -> Iterator[Row]:
    """The objects, numbered by their lines. A key that an object lacks counts as empty."""
    columns = None
    with files.open_file(path) as file:
        for number, line in files.lines(file, path):
            if line.isspace():
                continue
            try:
                # pyarrow.json counts rows within a block, and refuses labels of several types.
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}: line {number:,}: {error}") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}: line {number:,}: not a JSON object")
            columns = columns or choose(list(row))
            text, label, split, category = (
                None if name is None else _valid(row.get(name, "")) for name in columns
            )
            yield number, text, label, split, category
    if columns is None:
        raise InputError(f"{path}: no row in it")


def _valid(value: object) -> object:
    return files.without_surrogates(value) if isinstance(value, str) else value
