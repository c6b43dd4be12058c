"""The live table of compare.py: on a terminal a table, elsewhere the lines as they come."""

import io
import json
from pathlib import Path

from rich.console import Console

from comparison.live import Board

NAMES = ["torch gru", "jax gru"]
LINE = "[epoch:2/3] [iter:  25] elapsed time:   4 secs   loss: 0.51234"


def test_a_terminal_shows_a_table_that_follows_the_runs(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    (tmp_path / "log.jsonl").write_text(json.dumps({"tokens_per_second": 123456.0}) + "\n{half")
    with Board(console, NAMES) as board:
        board.say("torch gru", tmp_path, "loading [/broken markup]")
        board.say("torch gru", tmp_path, LINE)
        with console.capture() as shown:
            console.print(board.table())
        board.finish("torch gru", "87.50%", "120,000")
        with console.capture() as finished:
            console.print(board.table())
    during, after = shown.get(), finished.get()
    assert all(part in during for part in ("2/3, iteration 25", "0.51234", "123,456", "waiting"))
    assert LINE in during
    assert "87.50%" in after and "120,000" in after


def test_elsewhere_the_lines_come_as_they_are(tmp_path: Path) -> None:
    file = io.StringIO()
    with Board(Console(file=file, width=20), NAMES) as board:
        board.say("jax gru", tmp_path, LINE)
        board.finish("jax gru", "87.50%")
    assert file.getvalue() == f"jax gru        {LINE}\n"
