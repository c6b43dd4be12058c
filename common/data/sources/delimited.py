"""CSV and TSV files: rows of fields.

Options: encoding=NAME (utf-8); sep=CHARACTER, what separates fields (csv: the one of , ; tab and |
by which the first line has the columns that are wanted; tsv: tab); quotes=yes or no, whether
quotation marks may enclose a field (csv: yes, tsv: no); header=no where the first line is a row
like the others: columns 1, 2, 3, ...
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

# A quotation mark that is never closed makes one field of the rest of the file.
MAX_FIELD = 2**24
_HINT = "name the encoding: ?encoding=NAME"
_COLUMNS = "another number of columns"
_QUOTE = "a quotation mark that is not closed?"


def check(spec: str, options: Mapping[str, str]) -> None:
    """Raise InputError for an option whose value means nothing."""
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
    """The rows, numbered by their first lines. delimiters: what may stand between their fields."""
    encoding = options.get("encoding", "utf-8")
    quotes = options.get("quotes", "yes" if "," in delimiters else "no") == "yes"
    read = partial(_reader, path, encoding, quotes)
    delimiter = options.get("sep") or _delimiter(path, read, options, choose, delimiters)
    with read(_character(delimiter)) as reader:
        line = 1
        try:
            names, before = _names(reader, options)
            line = reader.line_num + 1 - len(before)
            # Out of the fields with None and the line after them.
            pick = itemgetter(*(names.index(it) if it else -2 for it in choose(names)), -1)
            found = chain(before, reader)
            while True:
                try:
                    for fields in found:
                        if len(fields) == len(names):
                            yield pick([*fields, None, line])
                        elif fields:
                            problem = f"{len(fields)} columns instead of {len(names)}"
                            yield BadRow(path, f"line {line:,}", problem, _COLUMNS)
                        line = reader.line_num + 1
                    return
                except csv.Error as error:
                    if "expected after" not in str(error):  # the rest of the file is in one field
                        raise
                    lines = reader.line_num + 1 - line
                    yield BadRow(path, f"line {line:,}", f"{error}: {_QUOTE}", _QUOTE, lines)
                    line = reader.line_num + 1
        except UnicodeDecodeError as error:
            # The lines of what was decoded before have all been read.
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
    csv.field_size_limit(MAX_FIELD)  # there is but one limit, for all readers
    with files.open_file(path) as binary:
        # A mark of the byte order, as Excel writes it, is no part of the first column's name.
        file = TextIOWrapper(binary, "utf-8-sig" if encoding == "utf-8" else encoding, newline="")
        # pyarrow.csv names no line, takes stray quotation marks as they come and bytes for text.
        yield csv.reader(
            iter(partial(file.readline, files.MAX_LINE), ""),
            delimiter=delimiter,
            quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
            strict=True,
        )


def _names(reader: Iterator[list[str]], options: Mapping[str, str]) -> tuple[list[str], list]:
    """The names of the columns, and the first row where it does not hold them."""
    first = next(reader, [])
    if options.get("header") == "no":
        return [str(number + 1) for number in range(len(first))], [first]
    return first, []


def _delimiter(
    path: Path,
    read: Callable[[str], AbstractContextManager],
    options: Mapping[str, str],
    choose: Choose,
    delimiters: str,
) -> str:
    """The one by which the first line has the columns that are wanted, or the most of any.

    Raises InputError where it has them by more than one, unless there is one column alone.
    """
    columns, found = dict.fromkeys(delimiters, 0), []
    for delimiter in delimiters[1:] and delimiters:  # of one, there is no choice
        with suppress(InputError, UnicodeError, csv.Error), read(delimiter) as reader:
            names, _ = _names(reader, options)
            columns[delimiter] = len(names)
            choose(names)
            found.append(delimiter)
    if len(found) > 1 and any(columns[delimiter] > 1 for delimiter in found):
        raise InputError(f"{path}: are its columns separated by {' or '.join(found)}? Say ?sep=...")
    return found[0] if found else max(columns, key=columns.__getitem__)


def _character(sep: str) -> str:
    return "\t" if sep == "tab" else sep
