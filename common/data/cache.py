"""Folders of results that are costly to compute, kept under a key of all they depend on."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import platformdirs

from common.errors import InputError


def cache_folder() -> Path:
    """Where results are kept: $GRU_TWINS_CACHE, or the user's cache folder."""
    chosen = os.environ.get("GRU_TWINS_CACHE")
    return Path(chosen) if chosen else platformdirs.user_cache_path("gru-twins")


def cached(kind: str, key: Mapping[str, object], build: Callable[[Path], None]) -> Path:
    """The folder that `build(folder)` once filled for this key, filling it now if need be.

    It appears whole or not at all: it is built aside and renamed. Of two processes that build the
    same, the first wins. Raises InputError where the cache cannot be written.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / f"{kind}-{digest}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f"{kind}-", suffix=".partial", dir=folder.parent))
    except OSError as error:
        raise InputError(
            f"{folder.parent}: cannot write the cache ({error.strerror}); "
            "set GRU_TWINS_CACHE to another folder"
        ) from None
    try:
        build(aside)
        (aside / "key.json").write_text(json.dumps(key, indent=1, sort_keys=True))
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder
