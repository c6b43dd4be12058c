"""CSV and TSV files: rows of fields.

Options: encoding=NAME (utf-8); quotes=yes or no, whether quotation marks may enclose a field (csv:
yes, tsv: no); header=no where the first line is a row like the others: columns 1, 2, 3, ...
"""

import csv
from collections.abc import Iterator, Mapping
from functools import partial
from io import TextIOWrapper
from itertools import chain
from operator import itemgetter
from pathlib import Path

from common.data.sources import files
from common.data.sources.columns import Choose, Row
from common.errors import InputError

OPTIONS = ("encoding", "quotes", "header")

# A quotation mark that is never closed makes one field of the rest of the file.
MAX_FIELD = 2**24
_HINT = "name the encoding: ?encoding=NAME"


def check(spec: str, options: Mapping[str, str]) -> None:
    """Raise InputError for an option whose value means nothing."""
    for option in ("quotes", "header"):
        if options.get(option, "yes") not in ("yes", "no"):
            raise InputError(f"--data {spec}: {option}={options[option]}: expected yes or no")
    try:
        "".encode(options.get("encoding", "utf-8"))
    except LookupError as error:
        raise InputError(f"--data {spec}: {error}") from None


def rows(
    path: Path, options: Mapping[str, str], choose: Choose, *, delimiter: str
) -> Iterator[Row]:
    """The rows, numbered by their first lines."""
    encoding = options.get("encoding", "utf-8")
    quotes = options.get("quotes", "yes" if delimiter == "," else "no") == "yes"
    csv.field_size_limit(MAX_FIELD)  # there is but one limit, for all readers
    with files.open_file(path) as binary:
        # A mark of the byte order, as Excel writes it, is no part of the first column's name.
        file = TextIOWrapper(binary, "utf-8-sig" if encoding == "utf-8" else encoding, newline="")
        # pyarrow.csv names no line, takes stray quotation marks as they come and bytes for text.
        lines = iter(partial(file.readline, files.MAX_LINE), "")
        reader = csv.reader(
            lines,
            delimiter=delimiter,
            quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
            strict=True,
        )
        line = 1
        try:
            names, before = next(reader), []
            if options.get("header") == "no":
                names, before = [str(i + 1) for i in range(len(names))], [names]
            else:
                line = reader.line_num + 1
            # Out of the fields with None and the line after them.
            pick = itemgetter(*(names.index(it) if it else -2 for it in choose(names)), -1)
            for fields in chain(before, reader):
                if len(fields) == len(names):
                    yield pick([*fields, None, line])
                elif fields:
                    raise InputError(
                        f"{path}: line {line:,}: {len(fields)} columns instead of {len(names)}"
                    )
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
            raise InputError(
                f"{path}: line {line:,}: {error}: a quotation mark that is not closed?"
            ) from None
