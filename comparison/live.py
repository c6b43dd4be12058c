"""The progress of the jobs of a comparison: a live table on a terminal, plain lines elsewhere."""

import json
import re
import time
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from common.report.schema import Run

LOG_LINE = re.compile(r"\[epoch:(\d+/\d+)\] \[iter: *(\d+)\].* loss: (\S+)")


@dataclass
class Row:
    """The state of a job."""

    epoch: str = ""
    loss: str = ""
    speed: str = ""
    result: str = ""
    started: float | None = None
    ended: float | None = None

    def elapsed(self) -> str:
        if self.started is None:
            return "" if self.result else "waiting"
        return f"{(self.ended or time.perf_counter()) - self.started:,.0f} s"


class Board:
    """A context manager that shows a line per job, and below them the last line of output.

    folders: the run directory of each job. Lines of output in `known` are not shown.
    """

    def __init__(
        self, console: Console, folders: Mapping[str, Path], known: Container[str] = ()
    ) -> None:
        self.console, self.folders, self.known = console, folders, known
        self.rows = {name: Row() for name in folders}
        self.last = ""
        self.live = Live(console=console, get_renderable=self.table, refresh_per_second=4)

    def __enter__(self) -> "Board":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.last = ""
            self.live.stop()

    def on_line(self, name: str, line: str) -> None:
        """Show a line of a job's output."""
        if line in self.known:
            return
        if not self.console.is_terminal:
            self.console.out(f"{name:14} {line}")
            return
        row = self.rows[name]
        row.started = row.started or time.perf_counter()
        self.last = f"{name}: {line}"
        if match := LOG_LINE.search(line):
            epoch, iteration, row.loss = match.groups()
            row.epoch = f"{epoch}, iteration {iteration}"
            row.speed = _speed(self.folders[name] / "log.jsonl")

    def on_end(self, name: str, run: Run | None) -> None:
        """Show the result of a job; only a training has a run."""
        row = self.rows[name]
        row.result, row.ended = "done", time.perf_counter()
        if run:
            row.result, row.speed = f"{run.accuracy:.2%}", f"{run.tokens_per_second:,.0f}"

    def table(self) -> Group:
        """The current table."""
        table = Table("", "epoch", "loss", "tokens/s", "elapsed", "result")
        for name, row in self.rows.items():
            table.add_row(name, row.epoch, row.loss, row.speed, row.elapsed(), row.result)
        return Group(table, Text(self.last, overflow="ellipsis", no_wrap=True))


def _speed(log: Path) -> str:
    """The speed in the last complete line of a log."""
    try:
        line = log.read_text().split("\n")[-2]
        return f"{json.loads(line)['tokens_per_second']:,.0f}"
    except (OSError, LookupError, ValueError):
        return ""
