"""Parquet files."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

from common.data.sources import files
from common.data.sources.columns import Columns, Row
from common.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

# Rows at a time: with texts of 10 kB, 10 MB in memory.
BATCH = 1_000


def rows(
    path: Path, options: Mapping[str, str], choose: Callable[[Sequence[str]], Columns]
) -> Iterator[Row]:
    """The rows, numbered from 1, a batch in memory at a time."""
    import pyarrow as pa  # slow to import
    import pyarrow.parquet as pq

    number = 0
    files.open_file(path).close()
    try:
        with pq.ParquetFile(path) as table:
            columns = choose(table.schema_arrow.names)
            batches = table.iter_batches(
                BATCH, columns=[name for name in columns if name], use_threads=False
            )
            for row in arrow_rows(batches, columns):
                yield row
                number = row[0]
    except InputError:
        raise
    # ValueError: a string that is not UTF-8; with OverflowError, a date that Python does not have.
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        message = str(error).partition("\n")[0]
        raise InputError(
            f"{path}: after row {number:,}: not a whole Parquet file: {message}"
        ) from None
    if not number:
        raise InputError(f"{path}: no row in it")


def arrow_rows(tables: "Iterable[pa.RecordBatch | pa.Table]", columns: Columns) -> Iterator[Row]:
    """The rows of Arrow tables, numbered from 1 throughout."""
    before = 0
    for table in tables:
        values = (
            repeat(None, len(table)) if name is None else table.column(name).to_pylist()
            for name in columns
        )
        for number, row in enumerate(zip(*values, strict=True), start=before + 1):
            yield (number, *row)
        before += len(table)
