"""Reads files, and writes files and folders atomically; errors are one line."""

import hashlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from common.errors import InputError

SUMS = "SHA256SUMS"
LONGEST_JSON = 64 * 2**20
_LONGEST_HEADER = 4 * 2**20  # of a safetensors file; Python objects take many times as much


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError while a file or folder is written into an InputError that names it."""
    try:
        yield
    except BrokenPipeError:  # from standard output
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None


@contextmanager
def aside(target: Path, name: str | None = None) -> Iterator[Path]:
    """Write a file or a folder atomically.

    Yields a temporary path in the folder of `target`. At the end of the block, the path is synced
    to the disk and renamed to `target`, which may be an existing file; after an exception, the path
    is removed. An existing temporary path, left by a killed process, is removed first; therefore
    processes that may write the same target concurrently each need a different `name`. Raises
    OSError.
    """
    path = target.with_name(name or f"{target.name}.partial")
    remove(path)
    try:
        yield path
        sync(path)
        path.replace(target)
        sync(target.parent)
    finally:
        remove(path)


def replace(path: Path, content: bytes) -> None:
    """Write a file atomically, and sync it to the disk. Raises OSError."""
    with aside(path) as partial:
        partial.write_bytes(content)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it exists. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Sync a file's content, or the names in a folder, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path, longest: int = sys.maxsize) -> bytes:
    """The content of a regular file of at most `longest` bytes. Raises InputError naming it."""
    try:
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{path}: is not a regular file")
            limit(status.st_size, path, longest)
            return file.read(status.st_size)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except MemoryError:
        raise InputError(f"{path}: does not fit into the memory") from None


def limit(size: int, path: Path, longest: int) -> None:
    """Raise InputError for a file, or a part of a file, of more than `longest` bytes."""
    if size > longest:
        raise InputError(f"{path}: {size:,} bytes are too many where {longest:,} are allowed")


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file. Raises OSError.

    np.save and ndarray.tofile lose the last 4096 bytes without an error if the disk is full.
    """
    with path.open("wb") as file:  # np.lib.format uses tofile for a real file
        np.lib.format.write_array(SimpleNamespace(write=file.write), array)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically. Raises InputError if that fails."""
    with writing(path):
        replace(path, to_json(value))


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises InputError naming it if it is missing or damaged."""
    return parse_json(read(path, LONGEST_JSON), path, LONGEST_JSON)


def to_json(value: object) -> bytes:
    """A value as JSON; types unknown to JSON become strings."""
    return json.dumps(value, indent=1, default=str).encode()


def parse_json(content: bytes, path: Path, longest: int) -> Any:
    """Parse JSON of at most `longest` bytes. Raises InputError naming its file, `path`."""
    limit(len(content), path, longest)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file ({error})") from None


def to_tensors(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The content of a safetensors file with these arrays."""
    return safetensors.save({name: np.asarray(v, order="C") for name, v in tensors.items()})


def parse_tensors(
    content: bytes, path: Path, shapes: Mapping[str, tuple[int | None, ...]]
) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, in the order of `shapes`, in which None is any size.

    Arrays must be float32 or float64 and finite in float32; "step" and "codes.N" must be int32 or
    int64. Raises InputError naming the file, and the tensor that is missing, unexpected, or of a
    wrong shape or type.
    """
    limit(int.from_bytes(content[:8], "little"), path, _LONGEST_HEADER)
    try:
        tensors = safetensors.load(content)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that NumPy lacks
        raise InputError(f"{path}: not a safetensors file of NumPy arrays ({error})") from None
    for name in shapes.keys() ^ tensors.keys():
        problem = "is missing" if name in shapes else "is not expected"
        raise InputError(f"{path}: the tensor {name} {problem}")
    for name, shape in shapes.items():
        value = tensors[name]
        matches = len(value.shape) == len(shape) and all(
            expected in (None, size) for size, expected in zip(value.shape, shape, strict=True)
        )
        if not matches:
            raise InputError(f"{path}: {name} has shape {value.shape}, expected {shape}")
        is_integer = name == "step" or name.startswith("codes.")
        dtypes = ("int32", "int64") if is_integer else ("float32", "float64")
        if value.dtype not in dtypes:
            raise InputError(f"{path}: {name} is {value.dtype}, expected {' or '.join(dtypes)}")
        with np.errstate(over="ignore"):  # all computations use float32
            is_finite = is_integer or np.isfinite(value.astype(np.float32, copy=False)).all()
        if not is_finite:
            raise InputError(f"{path}: {name} is not all finite numbers in float32")
    # A fixed order, because the last bit of sums over all parameters (the norm of the gradient)
    # depends on it.
    return {name: tensors[name] for name in shapes}


def checksums(contents: Mapping[str, bytes]) -> bytes:
    """The content of SHA256SUMS, for `sha256sum -c`, from the files' contents by name."""
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()


def read_verified(
    folder: Path, names: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, bytes]:
    """The contents of a folder's files, verified by its SHA256SUMS.

    Optional files are read if SHA256SUMS lists them. Raises InputError naming the file that is
    missing or damaged.
    """
    expected = read(folder / SUMS, 2**16)
    names += tuple(name for name in optional if f"  {name}\n".encode() in expected)
    contents = {name: read(folder / name) for name in names}
    if expected != checksums(contents):
        wrong = [name for name in names if checksums({name: contents[name]}) not in expected]
        # A single mismatch means that this file is damaged; otherwise SHA256SUMS is.
        name = wrong[0] if len(wrong) == 1 else SUMS
        raise InputError(f"{folder / name}: damaged (its SHA-256 is not that in {SUMS})")
    return contents
