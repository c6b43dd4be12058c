"""What the jobs of a comparison are doing: a live table on a terminal, plain lines elsewhere."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

LOG_LINE = re.compile(r"\[epoch:(\d+/\d+)\] \[iter: *(\d+)\].* loss: (\S+)")


@dataclass
class Row:
    """A job, in the words of the table."""

    epoch: str = ""
    loss: str = ""
    speed: str = ""
    result: str = ""
    begun: float | None = None
    ended: float | None = None

    def elapsed(self) -> str:
        if self.begun is None:
            return "" if self.result else "waiting"
        return f"{(self.ended or time.perf_counter()) - self.begun:,.0f} s"


class Board:
    """A line for each job, and under them what was said last; a context manager."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self.console = console
        self.rows = {name: Row() for name in names}
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
        row = self.rows[name]
        row.begun = row.begun or time.perf_counter()
        self.said = f"{name}: {line}"
        if found := LOG_LINE.search(line):
            epoch, iteration, row.loss = found.groups()
            row.epoch, row.speed = f"{epoch}, iteration {iteration}", _speed(run_dir / "log.jsonl")

    def finish(self, name: str, result: str, speed: str = "") -> None:
        """Show how a job came out."""
        row = self.rows[name]
        row.result, row.speed, row.ended = result, speed, time.perf_counter()

    def table(self) -> Group:
        """The table as it stands."""
        table = Table("", "epoch", "loss", "tokens/s", "elapsed", "result")
        for name, row in self.rows.items():
            table.add_row(name, row.epoch, row.loss, row.speed, row.elapsed(), row.result)
        return Group(table, Text(self.said, overflow="ellipsis", no_wrap=True))


def _speed(log: Path) -> str:
    """What the last whole line of a log says of it."""
    try:
        line = log.read_text().split("\n")[-2]
        return f"{json.loads(line)['tokens_per_second']:,.0f}"
    except (OSError, LookupError, ValueError):
        return ""
