"""Folders of results that are costly to compute, kept under a key of all they depend on.

key.json in a folder holds the key, and of every file the size and the CRC-32 of each block. ISA-L
computes CRC-32 faster than memory is read (20 GB/s, where SHA-256 and BLAKE2 reach 1 to 2). CRC-32
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
from common.errors import InputError, complain

WHOLE = 2**26  # bytes: a file that is not larger is verified whole, in some 10 ms
BLOCK = 2**16  # bytes
_ABOUT = "key.json"
_DAMAGED = f"damaged (its checksum is not that in {_ABOUT})"


def cache_folder() -> Path:
    """Where results are kept: $GRU_TWINS_CACHE, or the user's cache folder."""
    return Path(os.environ.get("GRU_TWINS_CACHE") or platformdirs.user_cache_path("gru-twins"))


def cached(
    kind: str,
    key: Mapping[str, object],
    build: Callable[[Path], None],
    by_block: Container[str] = (),
) -> Path:
    """The folder that `build(folder)` once filled for this key, filling it now if need be.

    The folder appears whole or not at all. Its files are verified; where one is missing or damaged,
    a line on standard error says so, and the folder is filled anew. by_block: names of files that,
    if they are larger than WHOLE, are only verified as they are read, by Blocks. Of processes that
    want the same folder, one fills it and the others wait. Raises InputError where the cache has to
    be written and cannot be.
    """
    folder = _folder(kind, key)
    if not _problem(folder, key, by_block):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.with_name(f".{folder.name}.lock")):
            if problem := _problem(folder, key, by_block):
                if os.path.lexists(folder):
                    complain(f"{problem}; making it anew")
                _fill(folder, key, build)
    except BrokenPipeError:  # about standard output
        raise
    except OSError as error:
        if problem := _problem(folder, key, by_block):  # else another process was first
            damage = f"{problem}; " if os.path.lexists(folder) else ""
            raise InputError(
                f"{damage}{folder.parent}: cannot write the cache ({error.strerror or error}); "
                "set GRU_TWINS_CACHE to another folder"
            ) from None
    return folder


class Blocks:
    """Verifies a large file of the cache, each block when it is first read."""

    def __init__(self, path: Path, content: np.ndarray, width: int) -> None:
        """content: the whole file, mapped by map_file. width: numbers in a row of it."""
        self.path, self._row_bytes = path, width * content.itemsize
        self._mapped: mmap.mmap = content.base.obj  # type: ignore[union-attr]
        self._sums = _about(path.parent)["sums"][path.name]
        self._unread = bytearray(b"\1") * math.ceil(content.nbytes / BLOCK)

    def verify(self, start: int, stop: int) -> None:
        """Verify rows start to stop of the content.

        Raises InputError where they are damaged, after removing the folder.
        """
        first, last = start * self._row_bytes // BLOCK, -(-stop * self._row_bytes // BLOCK)
        while (block := self._unread.find(1, first, last)) >= 0:
            begin = block * BLOCK
            # map_file has the system read page by page.
            self._mapped.madvise(mmap.MADV_WILLNEED, begin, BLOCK)
            content = memoryview(self._mapped)[begin : begin + BLOCK]
            if _sum(content) != self._sums[8 * block : 8 * block + 8]:
                with suppress(OSError):
                    files.remove(self.path.parent)
                removed = "remove its folder" if self.path.exists() else "its folder is removed"
                again = f"{removed}, and the same command makes it anew"
                raise InputError(f"{self.path}: {_DAMAGED}; {again}")
            self._unread[block] = 0


def in_blocks(path: Path, content: np.ndarray, width: int = 1) -> tuple[Blocks, ...]:
    """What verifies a file that was named to `cached` as one by_block: nothing if it is small."""
    return (Blocks(path, content, width),) if content.nbytes > WHOLE else ()


def map_file(path: Path, dtype: type[np.generic]) -> Shaped[np.ndarray, " numbers"]:
    """A file of numbers, memory-mapped, for reading at random places."""
    if not path.stat().st_size:  # which cannot be mapped
        return np.zeros(0, dtype)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM)  # a batch needs its texts, not what lies beside them
    # A plain array: slices of np.memmap, an array class of its own, take longer.
    return np.frombuffer(mapped, dtype)


def forget(kind: str, key: Mapping[str, object]) -> None:
    """Remove what is kept for this key, if there is any. Who has mapped it still has it."""
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
        (partial / _ABOUT).write_bytes(_to_json(about))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While others wait here, if the file system has locks; if not, they do the same work."""
    with ExitStack() as stack:
        while True:
            file = stack.enter_context(path.open("w"))
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            # The process that held the lock has removed the file; another may have made a new one.
            with suppress(FileNotFoundError):
                if os.path.samefile(path, file.fileno()):
                    break
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _problem(folder: Path, key: Mapping[str, object], by_block: Container[str]) -> str:
    """What is wrong with the folder: a file is missing, damaged, of another key or a stranger."""
    path = folder / _ABOUT
    try:
        about = _about(folder)
        if about["key"] != json.loads(json.dumps(key)):
            return f"{path}: describes another folder's content"
        for stranger in {each.name for each in folder.iterdir()} - {_ABOUT, *about["sizes"]}:
            return f"{folder / stranger}: is not a file of the cache"
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


def _about(folder: Path) -> dict[str, Any]:
    """What key.json holds. Raises what `_problem` catches where it cannot be read or is damaged."""
    about = json.loads((folder / _ABOUT).read_bytes())
    if about.pop("sum") != _sum(_to_json(about)):
        raise ValueError
    return about


def _to_json(about: dict[str, Any]) -> bytes:
    return json.dumps(about, indent=1, sort_keys=True).encode()


def _sums(path: Path) -> str:
    """The checksums of all blocks of a file, one after the other."""
    with path.open("rb", buffering=0) as file:
        return "".join(map(_sum, iter(lambda: file.read(BLOCK), b"")))


def _sum(content: bytes | memoryview) -> str:
    return f"{crc32(content):08x}"
