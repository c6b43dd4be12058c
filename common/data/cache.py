"""Folders of results that are costly to compute, kept under a key of all they depend on."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
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
    since. Of two processes that build the same, the first wins. Raises InputError where the cache
    cannot be written.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / f"{kind}-{digest}"
    if _whole(folder):
        return folder
    try:
        files.remove(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with files.aside(folder, f"{folder.name}-{os.getpid()}.partial") as partial:
            partial.mkdir()
            build(partial)
            sizes = {path.name: path.stat().st_size for path in partial.iterdir()}
            about = {"key": key, "sizes": sizes}
            (partial / _ABOUT).write_text(json.dumps(about, indent=1, sort_keys=True))
    except BrokenPipeError:  # about standard output
        raise
    except OSError as error:
        if not folder.is_dir():  # else another process was first
            raise InputError(
                f"{folder.parent}: cannot write the cache ({error.strerror or error}); "
                "set GRU_TWINS_CACHE to another folder"
            ) from None
    return folder


def _whole(folder: Path) -> bool:
    """Whether the folder is there, as it was filled: a full disk or a crash may cut files short."""
    try:
        sizes = json.loads((folder / _ABOUT).read_bytes())["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False
