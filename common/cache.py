"""Caches results in folders, under a key of all their inputs.

key.json in a folder contains the key and, for every file, its size and the CRC-32 of each block.
ISA-L computes CRC-32 at 20 GB/s, faster than memory is read (SHA-256, BLAKE2: 1 to 2 GB/s). CRC-32
detects every flipped bit and every error within 32 bits; it misses other damage with a probability
of 2^-32. The checksums detect accidents, not attacks: the folder belongs to the user.
"""

import fcntl
import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from isal.isal_zlib import crc32
from jaxtyping import Shaped

from common import files
from common.errors import InputError, print_error

WHOLE = 2**26  # bytes: files up to this size are verified whole, in about 10 ms
BLOCK = 2**16  # bytes
_MANIFEST = "key.json"
_DAMAGED = f"damaged (its checksum is not that in {_MANIFEST})"


def cache_folder() -> Path:
    """$GRU_TWINS_CACHE, or the user's cache folder."""
    return Path(os.environ.get("GRU_TWINS_CACHE") or platformdirs.user_cache_path("gru-twins"))


def cached(
    kind: str,
    key: Mapping[str, object],
    build: Callable[[Path], None],
    by_block: Container[str] = (),
) -> Path:
    """The cache folder for this key; if it does not exist, `build(folder)` fills it.

    The folder is created atomically. Its files are verified; if one is missing or damaged, a line
    on standard error reports it, and the folder is built again. by_block: names of files that
    Blocks verifies as they are read if they are larger than WHOLE. If several processes need the
    same folder, one builds it and the others wait. Raises InputError if the cache cannot be
    written.
    """
    folder = _folder(kind, key)
    if not _problem(folder, key, by_block):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f".{folder.name}.lock")):
            if problem := _problem(folder, key, by_block):
                if os.path.lexists(folder):
                    print_error(f"{problem}; making it again")
                _fill(folder, key, build)
    except BrokenPipeError:  # from standard output
        raise
    except OSError as error:
        if problem := _problem(folder, key, by_block):  # otherwise another process has built it
            damage = f"{problem}; " if os.path.lexists(folder) else ""
            raise InputError(
                f"{damage}{folder.parent}: cannot write the cache ({error.strerror or error}); "
                "set GRU_TWINS_CACHE to another folder"
            ) from None
    return folder


class Blocks:
    """Verifies each block of a large cache file when it is first read."""

    def __init__(self, path: Path, content: np.ndarray, width: int) -> None:
        """content: the whole file, mapped by map_file. width: numbers in a row."""
        self.path, self._row_bytes = path, width * content.itemsize
        self._mapped: mmap.mmap = content.base.obj  # type: ignore[union-attr]
        self._sums = _read_manifest(path.parent)["sums"][path.name]
        self._unread = bytearray(b"\1") * math.ceil(content.nbytes / BLOCK)

    def verify(self, start: int, stop: int) -> None:
        """Verify rows start to stop; if damaged, remove the folder and raise InputError."""
        first, last = start * self._row_bytes // BLOCK, -(-stop * self._row_bytes // BLOCK)
        while (block := self._unread.find(1, first, last)) >= 0:
            begin = block * BLOCK
            # Reads the whole block at once; map_file has disabled read-ahead.
            self._mapped.madvise(mmap.MADV_WILLNEED, begin, BLOCK)
            content = memoryview(self._mapped)[begin : begin + BLOCK]
            if _sum(content) != self._sums[8 * block : 8 * block + 8]:
                with suppress(OSError):
                    files.remove(self.path.parent)
                removed = "remove its folder" if self.path.exists() else "its folder is removed"
                raise InputError(
                    f"{self.path}: {_DAMAGED}; {removed}, and the same command makes it again"
                )
            self._unread[block] = 0


def in_blocks(path: Path, content: np.ndarray, width: int = 1) -> tuple[Blocks, ...]:
    """The Blocks of a file that `cached` does not verify whole; empty for a small file."""
    return (Blocks(path, content, width),) if content.nbytes > WHOLE else ()


def map_file(path: Path, dtype: type[np.generic]) -> Shaped[np.ndarray, " numbers"]:
    """A memory-mapped file of numbers, for random access."""
    if not path.stat().st_size:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM)  # no read-ahead: a batch needs only its own texts
    # A plain array, because slicing np.memmap is slower.
    return np.frombuffer(mapped, dtype)


def forget(kind: str, key: Mapping[str, object]) -> None:
    """Remove the folder of this key, if it exists. Existing mappings of its files stay valid."""
    with suppress(OSError):
        files.remove(_folder(kind, key))


def _folder(kind: str, key: Mapping[str, object]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / f"{kind}-{digest}"


def _fill(folder: Path, key: Mapping[str, object], build: Callable[[Path], None]) -> None:
    files.remove(folder)
    with files.aside(folder, f"{folder.name}-{os.getpid()}.partial") as partial:
        partial.mkdir()
        build(partial)
        paths = sorted(partial.iterdir())
        about: dict[str, Any] = {"key": key}
        about["sizes"] = {path.name: path.stat().st_size for path in paths}
        about["sums"] = {path.name: _sums(path) for path in paths}
        about["sum"] = _sum(_to_json(about))
        (partial / _MANIFEST).write_bytes(_to_json(about))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; without file locks, several processes do the same work."""
    with ExitStack() as stack:
        while True:
            file = stack.enter_context(path.open("w"))
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            # The previous holder has removed the file; another process may have created it again.
            with suppress(FileNotFoundError):
                if os.path.samefile(path, file.fileno()):
                    break
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _problem(folder: Path, key: Mapping[str, object], by_block: Container[str]) -> str:
    """The problem of a folder: a missing, damaged or unknown file, or another key; or empty."""
    path = folder / _MANIFEST
    try:
        about = _read_manifest(folder)
        if about["key"] != json.loads(json.dumps(key)):
            return f"{path}: describes another folder's content"
        for unknown in {each.name for each in folder.iterdir()} - {_MANIFEST, *about["sizes"]}:
            return f"{folder / unknown}: is not a file of the cache"
        for name, size in about["sizes"].items():
            path = folder / name
            if path.stat().st_size != size:
                return f"{path}: has another size than it had"
            if (size <= WHOLE or name not in by_block) and _sums(path) != about["sums"][name]:
                return f"{path}: {_DAMAGED}"
        return ""
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{path}: damaged, or of an earlier version of this program"


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The content of key.json. If it is damaged, raises an exception that `_problem` catches."""
    about = json.loads((folder / _MANIFEST).read_bytes())
    if about.pop("sum") != _sum(_to_json(about)):
        raise ValueError
    return about


def _to_json(about: dict[str, Any]) -> bytes:
    return json.dumps(about, indent=1, sort_keys=True).encode()


def _sums(path: Path) -> str:
    """The concatenated checksums of all blocks of a file."""
    with path.open("rb", buffering=0) as file:
        return "".join(map(_sum, iter(lambda: file.read(BLOCK), b"")))


def _sum(content: bytes | memoryview) -> str:
    return f"{crc32(content):08x}"
