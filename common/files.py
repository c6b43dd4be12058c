"""Reading and writing files and folders: whole or not at all, one clear line where that fails."""

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
_LONGEST_HEADER = 4 * 2**20  # of a safetensors file; as Python objects, many times as long


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong in writing a file or folder into an InputError that names it."""
    try:
        yield
    except BrokenPipeError:  # about standard output
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None


@contextmanager
def aside(target: Path, name: str | None = None) -> Iterator[Path]:
    """Write a file or a folder whole or not at all.

    Yields a path beside `target` to write to. At the end of the block it is synced to the disk and
    renamed to `target`, which may be a file that is there already; after an exception it is
    removed. What a killed process left there is removed first: of processes that may write the same
    target at once, each needs a `name` of its own. Raises OSError.
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
    """Write a file, whole or not at all, and sync it to the disk. Raises OSError."""
    with aside(path) as partial:
        partial.write_bytes(content)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Bring a file's content, or the names in a folder, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path, longest: int = sys.maxsize) -> bytes:
    """The content of a regular file of at most so many bytes. Raises InputError naming it."""
    try:
        # Without O_NONBLOCK a pipe in place of the file would wait for a writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise InputError(f"{path}: is not a regular file")
            limit(about.st_size, path, longest)
            return file.read(about.st_size)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except MemoryError:
        raise InputError(f"{path}: does not fit into the memory") from None


def limit(size: int, path: Path, longest: int) -> None:
    """Raise InputError for a file, or a part of one, of more than so many bytes."""
    if size > longest:
        raise InputError(f"{path}: {size:,} bytes are too many where {longest:,} are allowed")


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file. Raises OSError.

    np.save, as ndarray.tofile, loses the last 4096 bytes without an error where the disk is full.
    """
    with path.open("wb") as file:  # which np.lib.format would hand to tofile
        np.lib.format.write_array(SimpleNamespace(write=file.write), array)


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


def parse_json(content: bytes, path: Path, longest: int) -> Any:
    """What JSON of at most so many bytes says. Raises InputError naming the file it came from."""
    limit(len(content), path, longest)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file ({error})") from None


def to_tensors(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Arrays as a safetensors file."""
    return safetensors.save({name: np.asarray(v, order="C") for name, v in tensors.items()})


def parse_tensors(
    content: bytes, path: Path, shapes: Mapping[str, tuple[int | None, ...]]
) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, in the order of `shapes`, in which None is any size.

    They are float32 or float64, finite as float32; one named "step" or "codes.N" is int32 or int64.
    Raises InputError naming the file, and the tensor that is missing, not expected, or of another
    shape or type.
    """
    limit(int.from_bytes(content[:8], "little"), path, _LONGEST_HEADER)
    try:
        tensors = safetensors.load(content)
    except (SafetensorError, KeyError) as error:  # KeyError: a type that NumPy does not have
        raise InputError(f"{path}: not a safetensors file of NumPy arrays ({error})") from None
    for name in shapes.keys() ^ tensors.keys():
        problem = "is missing" if name in shapes else "is not expected"
        raise InputError(f"{path}: the tensor {name} {problem}")
    for name, shape in shapes.items():
        value = tensors[name]
        fits = len(value.shape) == len(shape) and all(
            wanted in (None, size) for size, wanted in zip(value.shape, shape, strict=True)
        )
        if not fits:
            raise InputError(f"{path}: {name} has shape {value.shape}, expected {shape}")
        whole = name == "step" or name.startswith("codes.")
        kinds = ("int32", "int64") if whole else ("float32", "float64")
        if value.dtype not in kinds:
            raise InputError(f"{path}: {name} is {value.dtype}, expected {' or '.join(kinds)}")
        with np.errstate(over="ignore"):  # all that reads them computes in float32
            finite = whole or np.isfinite(value.astype(np.float32, copy=False)).all()
        if not finite:
            raise InputError(f"{path}: {name} is not all finite numbers in float32")
    # Not in the file's order: sums over all parameters (the norm of the gradient) depend on it in
    # the last bit.
    return {name: tensors[name] for name in shapes}


def checksums(contents: Mapping[str, bytes]) -> bytes:
    """SHA256SUMS of files, by name, as `sha256sum -c` reads it."""
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()


def read_verified(
    folder: Path, names: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, bytes]:
    """The content of a folder's files, if it is what its SHA256SUMS says.

    Those of the optional files that SHA256SUMS lists are read, too. Raises InputError naming the
    file that is missing or damaged.
    """
    said = read(folder / SUMS, 2**16)
    names += tuple(name for name in optional if f"  {name}\n".encode() in said)
    contents = {name: read(folder / name) for name in names}
    if said != checksums(contents):
        wrong = [name for name in names if checksums({name: contents[name]}) not in said]
        # Where all but one are right, that file is damaged; else SHA256SUMS itself is.
        name = wrong[0] if len(wrong) == 1 else SUMS
        raise InputError(f"{folder / name}: damaged (its SHA-256 is not that in {SUMS})")
    return contents
