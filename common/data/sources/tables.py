"""Tables of labelled texts.

    csv:FILE  tsv:FILE  jsonl:FILE  parquet:FILE         the split: a column, or else to be drawn
    csv:TRAIN_FILE,TEST_FILE                             the split: the two files

Options follow a question mark: csv:FILE?text=COLUMN&label=COLUMN. `text`, `label`, `split` and
`category` name columns; by default, columns with usual names are chosen. `split=` and `category=`
select no column. Validation rows are the test split if there are no test rows; otherwise they are
left out. delimited.py has further options of csv and tsv.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import count, repeat
from pathlib import Path
from typing import Any

from common.data.sources import delimited, files
from common.data.sources.columns import OPTIONS, Choose, Columns, Row, choose, labelled
from common.data.sources.dataset import BadRow, Dataset, Example
from common.errors import InputError

BATCH = 1_000  # rows of an Arrow table in memory: 10 MB with texts of 10 kB
_NO_OBJECT = "not a JSON object"


def load(spec: str, needs_label: bool = True) -> Dataset:
    """The rows of one or two tables; without needs_label, all rows of all splits."""
    kind = spec.partition(":")[0]
    reader, unit = _READERS[kind]
    further_options = delimited.OPTIONS if kind in ("csv", "tsv") else ()
    paths, options = files.parse(spec, (*OPTIONS, *further_options), most=2)
    delimited.check(spec, options)
    options = options if needs_label else {**options, "split": ""}

    def rows() -> Iterator[Example | BadRow]:
        for path, split in zip(paths, ("train", "test") if paths[1:] else ("",), strict=True):
            place = str(path)
            columns = partial(choose, options=options, place=place, needs_label=needs_label)
            rows_of = partial(reader, path, options, columns)
            yield from labelled(rows_of, path, unit, split, needs_label)

    return Dataset(spec, rows, state=files.state(paths))


def _json_lines(path: Path, options: Mapping[str, str], choose: Choose) -> Iterator[Row | BadRow]:
    """One object per line; the columns are the keys of the first, and a missing key is empty."""
    columns, rows = None, 0
    with files.open_file(path) as file:
        for number, line in files.lines(file, path):
            if line.isspace():
                continue
            rows += 1
            try:
                # pyarrow.json counts rows only within a block, and refuses labels of mixed types.
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield BadRow(path, f"line {number:,}", str(error), _NO_OBJECT)
                continue
            if not isinstance(row, dict):
                yield BadRow(path, f"line {number:,}", _NO_OBJECT)
                continue
            columns = columns or choose(list(row))
            values = [row.get(name, "") if name else None for name in columns]
            yield (*map(files.without_surrogates, values), number)
    if not rows:
        raise InputError(f"{path}: no row in it")


def _parquet(path: Path, options: Mapping[str, str], choose: Choose) -> Iterator[Row]:
    import pyarrow as pa  # slow to import
    import pyarrow.parquet as pq

    number = 0
    files.open_file(path).close()
    try:
        with pq.ParquetFile(path) as table:
            columns = choose(table.schema_arrow.names)
            existing = [name for name in columns if name]
            batches = table.iter_batches(BATCH, columns=existing, use_threads=False)
            for row in arrow_rows(batches, columns):
                yield row
                number = row[-1]
    except InputError:
        raise
    # ValueError: invalid UTF-8, or a date out of Python's range, as is OverflowError.
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        message = str(error).partition("\n")[0]
        raise InputError(
            f"{path}: after row {number:,}: not a whole Parquet file: {message}"
        ) from None
    if not number:
        raise InputError(f"{path}: no row in it")


def arrow_rows(tables: Iterable[Any], columns: Columns) -> Iterator[Row]:
    """The rows of Arrow tables or record batches, numbered from 1 throughout."""
    number = count(1)
    for table in tables:
        values = (table.column(name).to_pylist() if name else repeat(None) for name in columns)
        yield from zip(*values, number, strict=False)


# kind -> (reader of rows, unit of their numbers)
_READERS: Mapping[str, tuple[Callable, str]] = {
    "csv": (partial(delimited.rows, delimiters=",;\t|"), "line"),
    "tsv": (partial(delimited.rows, delimiters="\t"), "line"),
    "jsonl": (_json_lines, "line"),
    "parquet": (_parquet, "row"),
}
KINDS = tuple(_READERS)
