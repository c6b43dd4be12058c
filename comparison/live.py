"""What the jobs of a comparison are doing: a live table on a terminal, plain lines elsewhere."""

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

LOG_LINE = re.compile(r"\[epoch:(\d+/\d+)\] \[iter: *(\d+)\].* loss: (\S+)")


class Board:
    """A line for each job, and under them what was said last; a context manager."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self.console = console
        self.rows = {
            name: dict.fromkeys(("epoch", "loss", "speed", "elapsed", "result"), "")
            for name in names
        }
        self.begun: dict[str, float] = {}
        self.said = ""
        self.live = Live(console=console, get_renderable=self.table, refresh_per_second=4)

    def __enter__(self) -> "Board":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.said = ""
            self.live.stop()

    def say(self, name: str, run_dir: Path, line: str) -> None:
        """Take note of a line that a job printed."""
        if not self.console.is_terminal:
            self.console.print(f"{name:14}", line, markup=False, highlight=False, soft_wrap=True)
            return
        self.begun.setdefault(name, time.perf_counter())
        self.said = f"{name}: {line}"
        if found := LOG_LINE.search(line):
            epoch, iteration, loss = found.groups()
            speed = _last(run_dir / "log.jsonl").get("tokens_per_second")
            self.rows[name].update(epoch=f"{epoch}, iteration {iteration}", loss=loss)
            self.rows[name]["speed"] = "" if speed is None else f"{speed:,.0f}"

    def finish(self, name: str, result: str, speed: str = "") -> None:
        """Show how a job came out."""
        if name in self.begun:
            self.rows[name]["elapsed"] = _elapsed(self.begun.pop(name))
        self.rows[name].update(result=result, speed=speed)

    def table(self) -> Group:
        """The table as it stands."""
        table = Table("", "epoch", "loss", "tokens/s", "elapsed", "result")
        for name, row in self.rows.items():
            elapsed = row["elapsed"] or ("" if row["result"] else "waiting")
            if name in self.begun:
                elapsed = _elapsed(self.begun[name])
            table.add_row(name, row["epoch"], row["loss"], row["speed"], elapsed, row["result"])
        return Group(table, Text(self.said, overflow="ellipsis", no_wrap=True))


def _elapsed(begun: float) -> str:
    return f"{time.perf_counter() - begun:,.0f} s"


def _last(log: Path) -> dict[str, Any]:
    """The last whole line of a log."""
    try:
        lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return json.loads(lines[-1])
    except (OSError, IndexError, ValueError):
        return {}
