"""compare.py shows a live table on a terminal, and lines elsewhere."""

import io
import json
from pathlib import Path

from rich.console import Console

from common.report.schema import Run
from comparison.live import Board

RUN = Run(
    framework="torch",
    model="gru",
    implementation="fused",
    accuracy=0.875,
    accuracy_interval=(0.85, 0.9),
    train_seconds=1,
    tokens_per_second=120_000,
    peak_memory_bytes=1,
    categories={},
    cores=1,
)
NAMES = ["torch gru", "jax gru"]
LINE = "[epoch:2/3] [iter:  25] elapsed time:   4 secs   loss: 0.51234"


def test_a_terminal_shows_a_table_that_follows_the_runs(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    (tmp_path / "log.jsonl").write_text(json.dumps({"tokens_per_second": 123456.0}) + "\n{half")
    with Board(console, dict.fromkeys(NAMES, tmp_path)) as board:
        board.on_line("torch gru", "loading [/broken markup]")
        board.on_line("torch gru", LINE)
        with console.capture() as visible:
            console.print(board.get_renderable())
        board.on_end("torch gru", RUN)
        with console.capture() as finished:
            console.print(board.get_renderable())
    during, after = visible.get(), finished.get()
    assert all(part in during for part in ("2/3, iteration 25", "0.51234", "123,456", "waiting"))
    assert LINE in during
    assert "87.50%" in after and "120,000" in after


def test_without_a_terminal_lines_are_printed(tmp_path: Path) -> None:
    file = io.StringIO()
    folders = dict.fromkeys(NAMES, tmp_path)
    with Board(Console(file=file, width=20, highlight=False), folders, {"known"}) as board:
        board.on_line("jax gru", "known")
        board.on_line("jax gru", LINE)
        board.on_end("jax gru", RUN)
    assert file.getvalue() == f"jax gru        {LINE}\n"
