"""Reading and writing files: whole or not at all, and one clear line where that fails."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import InputError

LONGEST_JSON = 64 * 2**20

Bytes = bytes | bytearray


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong in writing a file or folder into an InputError that names it."""
    try:
        yield
    except BrokenPipeError:  # about standard output
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


def replace(path: Path, content: Bytes) -> None:
    """Write a file, whole or not at all, and sync it to the disk. Raises OSError."""
    aside = path.with_name(path.name + ".partial")
    try:
        write(aside, content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file, whole or not at all. Raises InputError where that fails."""
    with writing(path):
        replace(path, to_json(value))


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises InputError naming it where it is missing or damaged."""
    return parse_json(read(path, LONGEST_JSON), path, LONGEST_JSON)


def to_json(value: object) -> bytes:
    """A value as JSON; what JSON does not know, as a string."""
    return json.dumps(value, indent=1, default=str).encode()


def parse_json(content: Bytes, path: Path, longest: int) -> Any:
    """What JSON of at most so many bytes says. Raises InputError naming the file it came from."""
    limit(len(content), path, longest)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file ({error})") from None


def limit(size: int, path: Path, longest: int) -> None:
    """Raise InputError for a file, or a part of one, of more than so many bytes."""
    if size > longest:
        raise InputError(f"{path}: {size:,} bytes are too many where {longest:,} are allowed")


def read(path: Path, longest: int | None = None) -> bytearray:
    """The content of a regular file. Raises InputError naming it."""
    try:
        # Without O_NONBLOCK a pipe in place of the file would wait for a writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise InputError(f"{path}: is not a regular file")
            if longest is not None:
                limit(about.st_size, path, longest)
            content = bytearray(about.st_size)
            del content[file.readinto(content) :]
            return content
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except MemoryError:
        raise InputError(f"{path}: does not fit into the memory") from None


def write(path: Path, content: Bytes) -> None:
    """Write a new file, synced to the disk. Raises OSError."""
    path.unlink(missing_ok=True)  # what somebody else's run directory may have put there
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Bring the names of the files in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
