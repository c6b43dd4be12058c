"""Reads CSV and TSV files.

Options: encoding=NAME (default utf-8); sep=CHARACTER, the delimiter (csv: detected among , ; tab
and | by the columns of the first line; tsv: tab); quotes=yes or no, whether fields may be quoted
(csv: yes, tsv: no); header=no if the first line is a row; the columns are then named 1, 2, 3, ...
"""

import csv
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from io import TextIOWrapper
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

from common.data.sources import files
from common.data.sources.columns import Choose, Row
from common.data.sources.dataset import BadRow
from common.errors import InputError

OPTIONS = ("encoding", "sep", "quotes", "header")

MAX_FIELD = 2**24  # characters; an unclosed quotation mark makes one field of the rest of a file
_HINT = "name the encoding: ?encoding=NAME"
_COLUMNS = "another number of columns"
_QUOTE = "a quotation mark that is not closed?"


def check(spec: str, options: Mapping[str, str]) -> None:
    """Raise InputError for an invalid value of an option."""
    for option in ("quotes", "header"):
        if options.get(option, "yes") not in ("yes", "no"):
            raise InputError(f"--data {spec}: {option}={options[option]}: expected yes or no")
    if len(sep := _character(options.get("sep", ","))) != 1 or sep in '"\r\n':
        raise InputError(f"--data {spec}: sep={sep}: expected a character, or tab")
    try:
        "".encode(options.get("encoding", "utf-8"))
    except LookupError as error:
        raise InputError(f"--data {spec}: {error}") from None


def rows(
    path: Path, options: Mapping[str, str], choose: Choose, *, delimiters: str
) -> Iterator[Row | BadRow]:
    """The rows, numbered by their first lines. delimiters: candidates for the delimiter."""
    encoding = options.get("encoding", "utf-8")
    quotes = options.get("quotes", "yes" if "," in delimiters else "no") == "yes"
    open_reader = partial(_reader, path, encoding, quotes)
    delimiter = options.get("sep") or _delimiter(path, open_reader, options, choose, delimiters)
    with open_reader(_character(delimiter)) as reader:
        line = 1
        try:
            names, first_rows = _names(reader, options)
            line = reader.line_num + 1 - len(first_rows)
            # Selects from the fields followed by None (for a missing column) and the line.
            select = itemgetter(*(names.index(it) if it else -2 for it in choose(names)), -1)
            all_rows = chain(first_rows, reader)
            while True:
                try:
                    for fields in all_rows:
                        if len(fields) == len(names):
                            yield select([*fields, None, line])
                        elif fields:
                            problem = f"{len(fields)} columns instead of {len(names)}"
                            yield BadRow(path, f"line {line:,}", problem, _COLUMNS)
                        line = reader.line_num + 1
                    return
                except csv.Error as error:
                    if "expected after" not in str(error):  # the field is the rest of the file
                        raise
                    lines = reader.line_num + 1 - line
                    yield BadRow(path, f"line {line:,}", f"{error}: {_QUOTE}", _QUOTE, lines)
                    line = reader.line_num + 1
        except UnicodeDecodeError as error:
            # The reader has consumed all lines decoded before this block.
            rest = error.object[: error.start].decode(encoding, "ignore")
            line = reader.line_num + 1 + rest.count("\n")
            stray = f"the byte 0x{error.object[error.start]:02x} is not {encoding}"
            raise InputError(f"{path}: line {line:,}: {stray}; {_HINT}") from None
        except UnicodeError as error:  # UTF-16 without a byte order mark
            raise InputError(f"{path}: {error}; {_HINT}") from None
        except csv.Error as error:
            raise InputError(f"{path}: line {line:,}: {error}: {_QUOTE}") from None


@contextmanager
def _reader(path: Path, encoding: str, quotes: bool, delimiter: str) -> Iterator[Any]:
    csv.field_size_limit(MAX_FIELD)  # the limit is global
    with files.open_file(path) as binary:
        # utf-8-sig skips the byte order mark that Excel writes.
        file = TextIOWrapper(binary, "utf-8-sig" if encoding == "utf-8" else encoding, newline="")
        # Unlike csv, pyarrow.csv reports no line and accepts stray quotation marks and bytes.
        yield csv.reader(
            iter(partial(file.readline, files.MAX_LINE), ""),
            delimiter=delimiter,
            quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
            strict=True,
        )


def _names(reader: Iterator[list[str]], options: Mapping[str, str]) -> tuple[list[str], list]:
    """The names of the columns, and the first row if it is not the header."""
    first = next(reader, [])
    if options.get("header") == "no":
        return [str(number + 1) for number in range(len(first))], [first]
    return first, []


def _delimiter(
    path: Path,
    open_reader: Callable[[str], AbstractContextManager],
    options: Mapping[str, str],
    choose: Choose,
    delimiters: str,
) -> str:
    """The delimiter with which the first line has the required columns, or else the most columns.

    Raises InputError if several delimiters do, unless all of them yield a single column.
    """
    columns, matches = dict.fromkeys(delimiters, 0), []
    for delimiter in delimiters[1:] and delimiters:  # a single candidate needs no detection
        with suppress(InputError, UnicodeError, csv.Error), open_reader(delimiter) as reader:
            names, _ = _names(reader, options)
            columns[delimiter] = len(names)
            choose(names)
            matches.append(delimiter)
    if len(matches) > 1 and any(columns[delimiter] > 1 for delimiter in matches):
        raise InputError(
            f"{path}: the delimiter may be {' or '.join(matches)}: choose one by ?sep=..."
        )
    return matches[0] if matches else max(columns, key=columns.__getitem__)


def _character(sep: str) -> str:
    return "\t" if sep == "tab" else sep
