"""Encoding in parts: the result is, byte for byte, that of one machine."""

import json
import shutil
from pathlib import Path

import pytest

from common.data import corpus, encode
from tests.training.cases import Command, refused_at_once, succeeds


@pytest.fixture
def reviews(tmp_path: Path) -> str:
    """Reviews in the source's order, of labels and categories that the parts meet in another."""
    path, lines = tmp_path / "reviews.jsonl", []
    for i in range(300):
        text = f"word{i % 37} word{i * i % 101} it's number {i} {'fine ' * (i % 5)}"
        rated = {"label": ["good", "bad", "so so"][i // 7 % 3], "category": f"c{i // 100}"}
        lines.append(json.dumps({"text": text, **rated}) + "\n")
    lines[5] = '{"text": "without a label"}\n'
    path.write_text("".join(lines))
    return f"jsonl:{path}"


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "CHUNK", 700)


def contents(cache: Path) -> dict[str, bytes]:
    [folder] = cache.glob("corpus-*")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("of", [1, 3, 7])
def test_parts_come_to_the_whole(
    of: int, reviews: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRU_TWINS_CACHE", str(tmp_path / "whole"))
    whole = corpus.load(reviews, skip_bad_rows=True)
    monkeypatch.setenv("GRU_TWINS_CACHE", str(tmp_path / "merged"))
    same = ["--data", reviews, "--parts", tmp_path / "parts", "--skip-bad-rows"]
    for part in reversed(range(of)):
        assert command(encode.main, "part", *same, "--part", part, "--of", of)[0] == 0
    output = succeeds(command(encode.main, "merge", *same))
    assert output == f"{reviews}: 299 texts, {len(whole.vocabulary)} words\n"
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")
    lines: list[str] = []
    assert corpus.load(reviews, lines.append, skip_bad_rows=True).left_out == whole.left_out
    assert len(lines) == 1  # of the row that is left out: it was not encoded again


@pytest.mark.usefixtures("small_pieces")
def test_what_does_not_fit_is_refused(reviews: str, command: Command, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    same = ["--data", reviews, "--parts", parts, "--skip-bad-rows"]
    for part in range(2):
        assert command(encode.main, "part", *same, "--part", part, "--of", 3)[0] == 0

    def refused(*arguments: object) -> str:
        return refused_at_once(command(encode.main, *arguments))

    assert f"{parts / '2'}: part 2 of 3 is missing" in refused("merge", *same)
    assert command(encode.main, "part", *same, "--part", 2, "--of", 4)[0] == 0
    assert f"{parts / '2'}: is part 2 of 4" in refused("merge", *same)
    assert f"{parts / '0'}: is of another" in refused("merge", *same[:-1])
    assert "--part 3: not from 0 to 2" in refused("part", *same, "--part", 3, "--of", 3)
    assert "line 6" in refused("part", "--data", reviews, "--parts", tmp_path / "other")
    assert "--of 0: must be at least 1" in refused("part", *same, "--part", 0, "--of", 0)
    third = ("part", *same, "--part", 2, "--of", 3)
    assert f"{parts / '2'}: holds another part" in refused(*third)
    (parts / "2" / "about.json").write_text("{}")
    assert command(encode.main, *third)[0] == 0
    for path in sorted((parts / "1").iterdir()):
        whole = path.read_bytes()
        for damaged in (whole[:-4], b"{}", whole[:-1] + b"\x07"):
            path.write_bytes(damaged)
            assert str(path) in refused("merge", *same)
        path.write_bytes(whole)
    shutil.rmtree(parts / "0")
    assert f"{parts / '0'}: part 0 is missing" in refused("merge", *same)
