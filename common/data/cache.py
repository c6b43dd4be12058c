"""Folders of results that are costly to compute, kept under a key of all they depend on."""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs

from common import files
from common.errors import InputError

_ABOUT = "key.json"


def cache_folder() -> Path:
    """Where results are kept: $GRU_TWINS_CACHE, or the user's cache folder."""
    return Path(os.environ.get("GRU_TWINS_CACHE") or platformdirs.user_cache_path("gru-twins"))


def cached(kind: str, key: Mapping[str, object], build: Callable[[Path], None]) -> Path:
    """The folder that `build(folder)` once filled for this key, filling it now if need be.

    It appears whole or not at all, and is filled anew where a file in it is gone or of another size
    since. Of processes that want the same, one builds it and the others wait. Raises InputError
    where the cache cannot be written.
    """
    folder = _folder(kind, key)
    if _whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.with_name(f".{folder.name}.lock")):
            if not _whole(folder):
                _fill(folder, key, build)
    except BrokenPipeError:  # about standard output
        raise
    except OSError as error:
        if not folder.is_dir():  # else another process was first
            raise InputError(
                f"{folder.parent}: cannot write the cache ({error.strerror or error}); "
                "set GRU_TWINS_CACHE to another folder"
            ) from None
    return folder


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
        sizes = {path.name: path.stat().st_size for path in partial.iterdir()}
        about = {"key": key, "sizes": sizes}
        (partial / _ABOUT).write_text(json.dumps(about, indent=1, sort_keys=True))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While others wait here, if the file system has locks; if not, they do the same work."""
    with path.open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _whole(folder: Path) -> bool:
    """Whether the folder is there, as it was filled: a full disk or a crash may cut files short."""
    try:
        sizes = json.loads((folder / _ABOUT).read_bytes())["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False
