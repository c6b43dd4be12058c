"""The progress of the jobs of a comparison: a live table on a terminal, plain lines elsewhere."""

import json
import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

from rich.console import Console, RenderableType
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from common.report.schema import Run

LOG_LINE = re.compile(r"\[epoch:(\d+/\d+)\] \[iter: *(\d+)\].* loss: (\S+)")


class Board(Progress):
    """A context manager that shows a line per job, and below them the last line of output.

    folders: the run directory of each job. Lines of output in `known` are not shown.
    """

    last = ""

    def __init__(
        self, console: Console, folders: Mapping[str, Path], known: Container[str] = ()
    ) -> None:
        texts = "{task.description}", "{task.fields[progress]}", "{task.fields[result]}"
        name, progress, result = (TextColumn(text, markup=False) for text in texts)
        columns = name, TimeElapsedColumn(), progress, result
        super().__init__(*columns, console=console, disable=not console.is_terminal)
        self.folders, self.known = folders, known
        self.jobs = {
            name: self.add_task(name, start=False, total=None, progress="", result="waiting")
            for name in folders
        }

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.last, overflow="ellipsis", no_wrap=True)

    def stop(self) -> None:
        self.last = ""
        super().stop()

    def on_line(self, name: str, line: str) -> None:
        """Show a line of a job's output."""
        if line in self.known:
            return
        if self.disable:
            self.console.out(f"{name:14} {line}")
            return
        self.last = f"{name}: {line}"
        self.start_task(self.jobs[name])
        self.update(self.jobs[name], result="")
        if match := LOG_LINE.search(line):
            epoch, iteration, loss = match.groups()
            progress = f"epoch {epoch}, iteration {iteration}, loss {loss}"
            speed = _speed(self.folders[name] / "log.jsonl")
            self.update(self.jobs[name], progress=f"{progress}{speed}")

    def on_end(self, name: str, run: Run | None) -> None:
        """Show the result of a job; only a training has a run."""
        result = f"{run.accuracy:.2%}, {run.tokens_per_second:,.0f} tokens/s" if run else "done"
        self.stop_task(self.jobs[name])
        self.update(self.jobs[name], progress="", result=result)


def _speed(log: Path) -> str:
    """The speed in the last complete line of a log."""
    try:
        line = log.read_text().split("\n")[-2]
        return f", {json.loads(line)['tokens_per_second']:,.0f} tokens/s"
    except (OSError, LookupError, ValueError):
        return ""
