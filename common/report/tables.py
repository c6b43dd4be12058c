"""The tables of the terminal, report.md and report.html.

A table is a title, a function for each column, and structs of results.json.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from common.metrics import MOST_DRAWN
from common.report.schema import (
    BUILT_IN,
    PEER_BOUNDS,
    REFERENCE,
    Check,
    Gates,
    Latency,
    Pair,
    Run,
    Speed,
    Timed,
    Tuning,
    Vanishing,
)

# Times from the report of the homework: batch 1, H 128, Adam, 4 epochs of 14,227 reviews.
RECIPE_SECONDS = {"its own GRU": 6_415, "nn.GRU": 288}
DISTANCES = (0, 1, 2, 5, 10, 20, 50, 100, 200, 400)

Columns = dict[str, Callable[[Any], str]]
"""The titles of the columns of a table, and functions from its rows to their cells."""


@dataclass(frozen=True)
class Table:
    """Text in rows and columns. A cell like **this** is highlighted; there is no other markup."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1
    """The number of columns with names, which come first; other columns are aligned right."""

    @classmethod
    def of(cls, title: str, rows: Iterable[Any], columns: Columns, names: int = 1) -> "Table":
        cells = [[cell(row) for cell in columns.values()] for row in rows]
        return cls(title, list(columns), cells, names)

    def __rich__(self) -> RichTable:
        table = RichTable(title=self.title, title_justify="left", box=box.SIMPLE_HEAD)
        for number, title in enumerate(self.header):
            name = number < self.names
            table.add_column(title, justify="left" if name else "right", no_wrap=name)
        for row in self.rows:
            table.add_row(*(Text(stripped(c), "red" if stands_out(c) else "") for c in row))
        return table

    def markdown(self) -> list[str]:
        """The lines of report.md."""
        rule = ["---" if i < self.names else "--:" for i in range(len(self.header))]
        header, *rows = ([*map(markdown_of, cells)] for cells in (self.header, *self.rows))
        return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]


def stands_out(cell: str) -> bool:
    """Whether a cell is highlighted."""
    return len(cell) > 4 and cell.startswith("**") and cell.endswith("**")


def stripped(cell: str) -> str:
    """A cell without the highlighting marks."""
    return cell[2:-2] if stands_out(cell) else cell


def markdown_of(text: str) -> str:
    """Markdown that shows a text verbatim, in one line; a highlighted text is bold.

    HTML, entities, code, emphasis, links, formulas and ends of table cells are escaped, and at the
    beginning also headings, lists and rules.
    """
    line = " ".join(stripped(text).split())
    # An underscore within a word has no effect.
    line = re.sub(r"[\\`*\[\]<>&|~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", line)
    line = re.sub(r"^(\d*)([-+#.)])(?=[-+#]*(\s|$))", r"\1\\\2", line)
    return f"**{line}**" if stands_out(text) else line


def summary(runs: Sequence[Run]) -> Table:
    """The accuracy and speed of each run."""

    def half(run: Run) -> float:
        return (run.accuracy_interval[1] - run.accuracy_interval[0]) / 2

    columns: Columns = {
        "framework": lambda run: run.framework,
        "model": lambda run: run.model,
        "accuracy": lambda run: f"{run.accuracy:.2%} ± {half(run):.2%}",
        "implementation": lambda run: run.implementation,
        "cores": lambda run: f"{run.cores}",
        "training": lambda run: f"{run.train_seconds:.1f} s",
        "tokens/s": lambda run: f"{run.tokens_per_second:,.0f}",
        "first step": lambda run: optional(run.first_step_seconds, "{:.2f} s"),
        "peak memory": lambda run: f"{run.peak_memory_bytes / 2**20:,.0f} MiB",
    }
    return Table.of("The trained models", runs, columns, names=2)


def optional(value: float | None, form: str) -> str:
    """The formatted value; empty for None."""
    return "" if value is None else form.format(value)


def calibration(runs: Sequence[Run]) -> Table:
    """The calibration error of each run."""
    columns: Columns = {
        "model": lambda run: run.name,
        "expected calibration error": lambda run: f"{run.miscalibration} points",
        "temperature": lambda run: f"{run.temperature or 1:.3f}",
    }
    return Table.of("Calibration", runs, columns)


def categories(runs: Sequence[Run]) -> Table:
    """The accuracy in each category, a column for each run."""
    cell = "{0.accuracy:.2%} ({0.accuracy_interval[0]:.2%} to {0.accuracy_interval[1]:.2%})"
    rows = [
        [name, f"{about.support:,}", *(cell.format(run.categories[name]) for run in runs)]
        for name, about in runs[0].categories.items()
    ]
    header = ["category", "reviews", *(run.name for run in runs)]
    return Table("Accuracy by category, with its 95 % interval", header, rows)


def classes(runs: Sequence[Run], names: Sequence[str]) -> Table:
    """The recall of the largest classes, a column for each run."""
    recalls = [run.recalls for run in runs]
    rows = [
        [names[at], f"{recalls[0][at][0]:,}", *(f"{each[at][1]:.2%}" for each in recalls)]
        for at in runs[0].by_size[:MOST_DRAWN]
    ]
    header = ["class", "reviews", *(run.name for run in runs)]
    return Table(f"Recall of the {len(rows)} largest classes", header, rows)


TIMED: Columns = {
    "implementation": lambda row: row.contender,
    "tokens/s": lambda row: f"{row.tokens_per_second:,.0f}",
    "quartiles": lambda row: "{:,.0f} to {:,.0f}".format(*row.quartiles),
    f"x {REFERENCE}": lambda row: f"{row.ratio:.2f}",
    "of peak": lambda row: f"{row.peak_fraction:.0%}",
}
# All rows of the tasks on a GPU are equally long.
ON_GPU = TIMED | {"µs a step": lambda row: f"{1e6 * row.B / row.tokens_per_second:.2f}"}
CALLED: Columns = {
    "implementation": lambda row: row.contender,
    "p50": lambda row: f"{1e6 * row.p50:,.0f} µs",
    "p99": lambda row: f"{1e6 * row.p99:,.0f} µs",
}
LATENCY = CALLED | {
    "tokens/s": TIMED["tokens/s"],
    f"x {BUILT_IN}": lambda row: f"{row.ratio:.2f}",
}


def tasks(timings: Sequence[Timed] | Sequence[Latency], columns: Columns) -> list[Table]:
    """One table per task, the fastest implementation first."""
    rows = sorted(timings, key=lambda row: -row.tokens_per_second)
    return [
        Table.of(name, [row for row in rows if row.name == name], columns)
        for name in dict.fromkeys(row.name for row in timings)
    ]


def all_tasks(title: str, timings: Sequence[Timed] | Sequence[Latency], columns: Columns) -> Table:
    """One table of all tasks."""
    return Table.of(title, timings, {"task": lambda row: row.name, **columns}, names=2)


def calls(speed: Speed) -> Table:
    """The overhead of a call."""
    rows = sorted(speed.calls, key=lambda row: row.p50)
    return Table.of("Overhead of a call", rows, CALLED)


def lengths(speed: Speed) -> Table:
    """The time of the kernel per token, by the length of the reviews."""
    times: dict[str, list[str]] = {}
    for each in speed.lengths:
        times.setdefault(each.contender, []).append(f"{each.nanoseconds_per_token:,.0f}")
    steps = dict.fromkeys(f"T {each.T:,}" for each in speed.lengths)
    title = "Nanoseconds per token of the kernel alone, by the length of the reviews"
    rows = [[name, *times[name]] for name in sorted(times)]
    return Table(title, ["implementation", *steps], rows)


def recipe(speed: Speed) -> Table:
    """Speed on the homework's recipe, with the times of its report."""
    rows = [
        [each.contender, f"{each.reviews_per_second:,.1f}", f"{each.projected_seconds:,.0f} s"]
        for each in speed.recipe
    ]
    rows += [[f"the homework's report: {n}", "", f"{s:,} s"] for n, s in RECIPE_SECONDS.items()]
    title = "The homework's recipe: batch 1, Adam, 4 epochs of 14,227 reviews"
    return Table(title, ["implementation", "reviews/s", "projected"], rows)


def trials(tuning: Tuning) -> Table:
    """The trials, the best first."""
    rows = [
        [
            *(str(each.number), each.state if each.state != "failed" else f"**{each.state}**"),
            f"{each.loss:.4g}" if each.losses else "",
            optional(each.accuracy, "{:.2%}"),
            *(str(len(each.losses)), f"{each.seconds:.0f} s"),
            *(f"{value:.3g}" for value in each.options.values()),
        ]
        for each in sorted(tuning.trials, key=lambda each: (each.state != "complete", each.loss))
    ]
    options = [name.replace("_", " ") for name in tuning.trials[0].options]
    header = ["trial", "state", "loss", "accuracy", "epochs", "time", *options]
    return Table("Trials, by the lowest loss on the validation reviews", header, rows, names=2)


def parity(checks: Sequence[Check]) -> Table:
    """All parity checks."""
    header = ["models", "check", "dtype", "error", "bound", "of bound", "ULP", "passed"]
    rows = [
        [
            *(" / ".join(each.models), each.check, each.dtype, f"{each.error:.1e}"),
            *(f"{each.bound:.1e}", f"{each.strain:.0%}", f"{each.ulp:.1f}"),
            ("above the bound, not ours" if each.is_excess else "yes") if each.passed else "**NO**",
        ]
        for each in checks
    ]
    return Table("Parity checks", header, rows, names=3)


def excesses(checks: Sequence[Check]) -> str:
    """A sentence about the layers of other libraries whose errors exceed their bounds, if any."""
    excesses = [check for check in checks if check.is_excess]
    if not excesses:
        return ""
    worst = max(excesses, key=lambda check: check.strain)
    return (
        f"In {len(excesses)} of those that passed, the error of another library's layer exceeds "
        f"its bound, by at most a factor of {worst.strain:.2f} ({worst.models[0]}, {worst.check}, "
        f"{worst.dtype}); that is a failure only above a factor of {PEER_BOUNDS}."
    )


def oracle(checks: Sequence[Check]) -> list[Table]:
    """The checks of comparison.parity.run: tables by dtype, rows by model, columns by quantity."""
    lines: dict[str, dict[tuple[str, str], dict[str, str]]] = {}
    for each in checks:
        quantity, kind = each.check.split(", reset ")
        cell = f"{each.error:.0e} ({each.ulp:.1f})"
        cell += f", {each.strain:.2f} x bound" if each.is_excess else ""
        cell = cell if each.passed else f"**{cell} > {each.bound:.0e}**"
        of_model = lines.setdefault(each.dtype, {}).setdefault((each.models[0], kind), {})
        of_model[quantity] = cell
    tables = []
    for dtype, models in lines.items():
        quantities = dict.fromkeys(itertools.chain(*models.values()))
        title = f"{dtype}: largest difference from the oracle, relative to the largest value (ULP)"
        rows = [[*name, *(line.get(q, "") for q in quantities)] for name, line in models.items()]
        tables.append(Table(title, ["model", "reset", *quantities], rows, names=2))
    return tables


def pairs(comparisons: Sequence[Pair]) -> Table:
    """The comparisons of two models."""
    header = ["models", "seeds", "accuracy", "difference", "95 % interval", "p", "training"]
    rows = [
        [
            f"{each.b} against {each.a}",
            f"{each.seeds}",
            f"{each.accuracy_b:.2%}, {each.accuracy_a:.2%}",
            f"{100 * each.difference:+.2f}",
            f"{100 * each.interval[0]:+.2f} to {100 * each.interval[1]:+.2f}",
            f"{each.mcnemar_p:.2g}",
            f"{each.seconds_b:,.1f} s, {each.seconds_a:,.1f} s",
        ]
        for each in comparisons
    ]
    return Table("Two models on the same test reviews, paired by seed and review", header, rows)


def vanishing(results: Vanishing) -> Table:
    """The gradient norm by the distance to the end."""
    rows = [
        [str(results.distances[at]), *(f"{each.median[at]:.1e}" for each in results.series)]
        for at in DISTANCES
        if at < len(results.distances)
    ]
    title = "Norm of dLoss/dh_t, by the distance to the end of the review (words)"
    return Table(title, ["words to the end", *(each.name for each in results.series)], rows)


def gates(results: Gates) -> list[Table]:
    """The gates by groups of words, and the effect sizes."""
    words: Columns = {
        "words": lambda row: row.group,
        "number": lambda row: f"{row.n:,}",
        "update gate z": lambda row: f"{row.z:.4f}",
        "95 % interval of z": lambda row: "{:.4f} to {:.4f}".format(*row.z_interval),
        "relative change": lambda row: f"{row.change:.4f}",
        "95 % interval of the change": lambda row: "{:.4f} to {:.4f}".format(*row.change_interval),
    }
    effects: Columns = {
        "groups": lambda row: " and ".join(row.pair),
        "quantity": lambda row: row.quantity,
        "Cohen's d": lambda row: f"{row.cohens_d:+.2f}",
        "95 % interval": lambda row: "{:+.2f} to {:+.2f}".format(*row.interval),
    }
    return [
        Table.of("The trained GRU, word by word", results.groups, words),
        Table.of("Effect sizes", results.effects, effects, names=2),
    ]
