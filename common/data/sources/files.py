"""Helpers of the sources that read files: specs, file access and decoding."""

import codecs
import hashlib
import os
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import InputError

MAX_LINE = 2**26  # bytes: a file with a longer line is no text
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\3\4": "zip"}
"""The first bytes of compressed files; spreadsheets (.xlsx, .ods) are zip files."""


def parse(
    spec: str, known: Collection[str] = (), *, most: int = 1, must_exist: bool = True
) -> tuple[list[Path], dict[str, str]]:
    """Paths and options of a spec: KIND:PATH[,PATH][?OPTION=VALUE[&OPTION=VALUE...]]

    A path of an existing file may contain commas and question marks. Raises InputError for more
    than `most` paths, an option that is not in `known` and, if must_exist, a missing path.
    """
    arguments = spec.partition(":")[2]
    splits = [(arguments, ""), arguments.rpartition("?")[::2], arguments.partition("?")[::2]]
    name, query = next((split for split in splits if split[0] and _exists(split[0])), splits[-1])
    names = [name] if _exists(name) else name.split(",")
    options = {}
    for option in filter(None, query.split("&")):
        key, equals, options[key] = option.partition("=")
        if not equals or key not in known:
            expected = f"OPTION=VALUE with one of {', '.join(known)}" if known else "no options"
            raise InputError(f"--data {spec}: {option}: expected {expected}")
    if not all(names) or len(names) > most:
        paths = "one path" if most == 1 else "one or two paths"
        raise InputError(f"--data {spec}: expected {paths}")
    for name in names:
        if must_exist and not _exists(name):
            raise InputError(f"--data {spec}: {name}: no such file or directory")
    return [Path(os.path.expanduser(name)) for name in names], options


def _exists(name: str) -> bool:
    # Unlike pathlib, os.path returns False for a name that is too long and for an unknown user.
    return os.path.exists(os.path.expanduser(name))


def state(paths: Sequence[Path]) -> dict[str, str | int]:
    """A digest of the files' names, sizes and modification times."""
    digest, total = hashlib.sha256(), 0
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        digest.update(os.fsencode(path.absolute()))
        digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        total += status.st_size
    return {"files": len(paths), "bytes": total, "state": digest.hexdigest()}


def open_file(path: Path, *, packed: bool = False) -> BinaryIO:
    """The file, open as bytes. Raises InputError if it cannot be read, is empty or, unless `packed`
    allows it, is compressed."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if not file.peek(1):
        file.close()
        raise InputError(f"{path}: the file is empty")
    start = file.peek(8)
    kind = next((kind for magic, kind in PACKED.items() if start.startswith(magic)), None)
    if kind and not packed:
        file.close()
        hint = "save it as csv" if path.suffix in (".xlsx", ".ods") else "decompress it first"
        raise InputError(f"{path}: a {kind} file: {hint}")
    return file


def lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, numbered from 1. Raises InputError for a line longer than MAX_LINE."""
    for number, line in enumerate(iter(partial(file.readline, MAX_LINE), b""), start=1):
        if len(line) == MAX_LINE:
            raise InputError(f"{path}: line {number:,}: longer than {MAX_LINE // 2**20} MiB")
        yield number, line


def _as_cp1252(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    stray = error.object[error.start : error.end]
    try:
        return stray.decode("cp1252"), error.end
    except UnicodeDecodeError:  # five bytes are undefined in Windows-1252
        return stray.decode("latin-1"), error.end


# Text from the web of the 2000s often mixes UTF-8 with stray bytes of Windows-1252.
STRAY_BYTES = "gru-twins.cp1252"
codecs.register_error(STRAY_BYTES, _as_cp1252)


def decode(data: bytes) -> str:
    """Decode UTF-8; invalid bytes are read as Windows-1252."""
    return data.decode("utf-8", STRAY_BYTES)


def without_surrogates(value: Any) -> Any:
    """Replace lone surrogates, which JSON and pickles may contain and no encoding can encode."""
    if not isinstance(value, str) or value.isascii():
        return value
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
