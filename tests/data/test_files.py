"""Files and folders that are written whole or not at all."""

from pathlib import Path

import pytest

from common import files


def fill(folder: Path) -> None:
    (folder / "content").write_text("new")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_failed_write_leaves_no_partial_file(kind: str, tmp_path: Path) -> None:
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
