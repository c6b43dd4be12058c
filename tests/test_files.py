"""Files and folders that are written whole or not at all."""

import os
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event

import pytest

from common import files
from common.data.cache import cache_folder, cached
from common.errors import InputError


def fill(folder: Path) -> None:
    (folder / "content").write_text("new")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_fails_halfway_leaves_what_was_there(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    for ends in (False, True):
        (tmp_path / "target.partial").mkdir()  # as a killed process may leave it
        try:
            with files.aside(target) as partial:
                if kind == "folder":
                    partial.mkdir()
                    fill(partial)
                else:
                    partial.write_text("new")
                if not ends:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert list(tmp_path.iterdir()) == []
    assert list(tmp_path.iterdir()) == [target]
    assert (target / "content" if kind == "folder" else target).read_text() == "new"


def test_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / "target.partial").symlink_to(tmp_path / "elsewhere")
    files.replace(tmp_path / "target", b"new")
    assert (tmp_path / "elsewhere").read_text() == "kept"
    assert not (tmp_path / "target").is_symlink()


def test_of_two_that_want_the_same_one_fills_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRU_TWINS_CACHE", str(tmp_path))

    begun, going_on = Event(), Event()

    def slow(folder: Path) -> None:
        begun.set()
        assert going_on.wait(10)
        (folder / "content").write_text("of the first")

    with ThreadPoolExecutor() as threads:
        first = threads.submit(cached, "kind", {}, slow)
        assert begun.wait(10)
        second = threads.submit(cached, "kind", {}, lambda folder: pytest.fail("filled again"))
        assert not wait([second], 0.2).done
        going_on.set()
        assert first.result() == second.result()
    assert (first.result() / "content").read_text() == "of the first"
    assert len(list(cache_folder().iterdir())) == 1


@pytest.mark.parametrize("damage", ["cut content", "cut key.json", "remove content"])
def test_what_was_cut_short_is_made_anew(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRU_TWINS_CACHE", str(tmp_path))
    how, _, name = damage.partition(" ")
    damaged = cached("kind", {}, fill) / name
    whole = damaged.read_bytes()
    cached("kind", {}, lambda folder: pytest.fail("filled again"))
    damaged.unlink() if how == "remove" else os.truncate(damaged, len(whole) // 2)
    assert cached("kind", {}, fill) == damaged.parent
    assert damaged.read_bytes() == whole


def test_a_cache_that_cannot_be_written_gets_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("GRU_TWINS_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"cannot write the cache \(No space .*GRU_TWINS_CACHE"):
        cached("kind", {}, full)
    assert list(tmp_path.iterdir()) == []
