"""`python compare.py speed`: tokens a second of every GRU that runs here, measured in one run.

The frameworks live in processes of their own (see comparison.contenders), which take turns, so that
a busy moment of the machine falls on all of them alike. Every figure is the median of repetitions,
beside it the spread between the first and the third quartile.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from common.report.figures import task_name
from comparison.contenders import DIMENSION, PROCESSES, Task, batch_of

REPETITIONS = 5
REFERENCE = "nn.GRU padded"
SHORT = (
    Task(64, 200, 128),
    Task(64, 200, 128, backward=False),
    Task(64, 200, 128, bidirectional=True),
    Task(256, 50, 256),
)
FULL = tuple(
    Task(B, T, H, bidirectional, backward)
    for B in (1, 16, 64, 256)
    for T in (50, 200, 1000)
    for H in (64, 128, 256, 512)
    for bidirectional in (False, True)
    for backward in (False, True)
)
# Does a word cost the kernel the same in long reviews? The products of the distinct inputs are left
# out: the longer the reviews, the fewer there are for each word.
LENGTHS = tuple(Task(64, T, 128, recurrence=True) for T in (50, 200, 1000, 2000))
# The homework: batch 1, H 128, Adam, 4 epochs of 14,227 reviews; 6,415 s by its own GRU, 288 s by
# nn.GRU.
RECIPE = Task(1, 200, 128, training=True)
RECIPE_STEPS = 4 * 14_227
RECIPE_SECONDS = {"its own GRU": 6_415, "nn.GRU": 288}


@dataclass
class Worker:
    """A process of comparison.contenders."""

    process: subprocess.Popen

    def ask(self, question: object) -> Any:
        """Send one question and wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.process.args!r} ended: exit status {self.process.wait()}")
        return json.loads(answer)


def measure(tasks: Iterable[Task], report: Callable[[str], None]) -> dict[str, Any]:
    """Time all contenders on all tasks and on the homework's recipe.

    Returns {"peak_flops", "rows": [...], "lengths": [...], "recipe": [...]} for results.json;
    report is told, in a line of text, what is being measured.
    """
    with ExitStack() as stack:
        workers = {}
        for name in PROCESSES:
            package = name.partition("-")[0]
            if find_spec(package) is not None:
                process = subprocess.Popen(
                    [sys.executable, "-m", "comparison.contenders", name],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    cwd=Path(__file__).parents[1],
                )
                stack.callback(process.wait)
                stack.callback(process.stdin.close)  # type: ignore[union-attr]
                workers[name] = Worker(process)
        owners = {
            contender: worker
            for worker in workers.values()
            for contender in worker.ask("contenders")
        }
        # The faster one: PyTorch's product, MKL's, takes twice as long as XLA's on AMD.
        peaks = [[workers[n].ask("peak") for n in ("torch", "jax")] for _ in range(REPETITIONS)]
        peak = float(np.median(peaks, axis=0).max())
        rows = []
        for task in tasks:
            report(f"measuring {task_name(asdict(task))}")
            # The loop takes seconds: only where it is a matter of a few.
            names = [n for n in owners if n != "torch loop" or task.B * task.T <= 64 * 200]
            rows += _rows(task, _time(owners, names, task), peak)
        report("measuring the cost of a token in short and in long reviews")
        fused = [name for name in owners if name.endswith(" fused")]
        lengths = [
            {
                "contender": name,
                "T": task.T,
                "nanoseconds_per_token": 1e9
                * float(np.median(seconds))
                / batch_of(task.B, task.T).words,
            }
            for task in LENGTHS
            for name, seconds in _time(owners, fused, task).items()
        ]
        report("measuring the homework's recipe")
        ours = [n for n in owners if n in (REFERENCE, "torch loop", "torch fused", "jax fused")]
        recipe = [
            {
                "contender": name,
                "reviews_per_second": float(1 / np.median(seconds)),
                "projected_seconds": float(np.median(seconds) * RECIPE_STEPS),
            }
            for name, seconds in _time(owners, ours, RECIPE).items()
        ]
    return {"peak_flops": peak, "rows": rows, "lengths": lengths, "recipe": recipe}


def _time(owners: dict[str, Worker], names: Iterable[str], task: Task) -> dict[str, list[float]]:
    """Seconds of each contender, REPETITIONS of them, interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(REPETITIONS):
        for name, found in seconds.items():
            found.append(owners[name].ask({"contender": name, "task": asdict(task)}))
    for worker in {worker.process.pid: worker for worker in owners.values()}.values():
        worker.ask("forget")
    return seconds


def _rows(task: Task, seconds: dict[str, list[float]], peak: float) -> list[dict[str, Any]]:
    batch = batch_of(task.B, task.T)
    reference = np.median(seconds[REFERENCE])
    flops = _flops(task, batch.words, len(batch.distinct))
    rows = []
    for name, found in seconds.items():
        median = float(np.median(found))
        rows.append(
            {
                **asdict(task),
                "contender": name,
                "tokens_per_second": batch.words / median,
                "quartiles": [batch.words / q for q in np.quantile(found, [0.75, 0.25])],
                "ratio": float(reference / median),
                "peak_fraction": flops / median / peak,
            }
        )
    return rows


def _flops(task: Task, words: int, distinct: int) -> float:
    """Operations in the matrix products that the task cannot do without.

    Forward: the recurrent product of every word and the input product of every distinct one.
    Backward: twice the former, for states and weights, and once the latter, for weights.
    """
    recurrent = 2 * words * 3 * task.H * task.H
    inputs = 2 * distinct * 3 * task.H * DIMENSION
    directions = 1 + task.bidirectional
    return directions * (recurrent * (3 if task.backward else 1) + inputs * (1 + task.backward))


def tables(results: dict[str, Any]) -> list[Table]:
    """What `measure` found, a table a task, and the homework's recipe."""
    found = []
    for task in dict.fromkeys(_task(row) for row in results["rows"]):
        rows = [row for row in results["rows"] if _task(row) == task]
        table = Table(title=task_name(asdict(task)))
        for column in ("", "tokens/s", "quartiles", f"x {REFERENCE}", "of peak"):
            table.add_column(column, justify="right" if column else "left")
        for row in sorted(rows, key=lambda row: -row["tokens_per_second"]):
            low, high = row["quartiles"]
            table.add_row(
                row["contender"],
                f"{row['tokens_per_second']:,.0f}",
                f"{low:,.0f} to {high:,.0f}",
                f"{row['ratio']:.2f}",
                f"{row['peak_fraction']:.0%}",
            )
        found.append(table)
    table = Table(title="Nanoseconds a token of the kernel alone, by the length of the reviews")
    for column in ("", *(f"T {task.T:,}" for task in LENGTHS)):
        table.add_column(column, justify="right" if column else "left")
    for name in dict.fromkeys(row["contender"] for row in results["lengths"]):
        found_here = [row for row in results["lengths"] if row["contender"] == name]
        table.add_row(name, *(f"{row['nanoseconds_per_token']:,.0f}" for row in found_here))
    found.append(table)
    table = Table(title="The homework's recipe: batch 1, Adam, 4 x 14,227 reviews")
    for column in ("", "reviews/s", "projected"):
        table.add_column(column, justify="right" if column else "left")
    for row in results["recipe"]:
        table.add_row(
            row["contender"],
            f"{row['reviews_per_second']:,.1f}",
            f"{row['projected_seconds']:,.0f} s",
        )
    for name, seconds in RECIPE_SECONDS.items():
        table.add_row(f"the homework's report: {name}", "", f"{seconds:,} s")
    return [*found, table]


def _task(row: dict[str, Any]) -> Task:
    return Task(**{field: row[field] for field in asdict(RECIPE)})
