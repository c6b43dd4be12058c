"""report.md, made from results.json alone."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.report.figures import Figure, task_name

COLUMNS = (
    "framework",
    "model",
    "implementation",
    "accuracy",
    "cores",
    "training",
    "tokens/s",
    "first step",
    "peak memory",
)


def row(run: Mapping[str, Any]) -> tuple[str, ...]:
    """A run in the words of the table, one for each of COLUMNS."""
    return (
        run["framework"],
        run["model"],
        run["implementation"],
        _accuracy(run),
        str(run.get("cores", "")),
        f"{run['train_seconds']:.1f} s",
        f"{run['tokens_per_second']:,.0f}",
        f"{run['first_step_seconds']:.2f} s",
        f"{run['peak_memory_bytes'] / 2**20:,.0f} MiB",
    )


def write(folder: Path, results: Mapping[str, Any], found: Mapping[str, Sequence[Figure]]) -> Path:
    """Write report.md into the folder; it shows the figures `found`, as saved in figures/."""
    runs, data = results["runs"], results["data"]
    environment = results["environment"]
    lines = ["# Comparison", "", f"    {environment['command']}", ""]
    if runs:
        lines += [
            f"Data: {data['name']}, {data['train']:,} reviews to train on, {data['test']:,} to "
            f"test on, word vectors {data['vectors']} ({data['vocabulary']:,} words).",
            "",
            *_table(COLUMNS, map(row, runs)),
            "",
            "Accuracy ± half of its 95 % interval (Wilson). Cores: how many a training could use. "
            "Training: the wall time of all epochs, compilation included. tokens/s: the median "
            "over the stretches between two log lines. First step: from building the model to its "
            "first update. Peak memory: of the process.",
            "",
            *_categories(runs),
        ]
    for section, shown in found.items():
        lines += [f"## {section.capitalize()}", ""]
        for figure in shown:
            lines += [figure.title, "", f"![{figure.title}](figures/{figure.name}.png)", ""]
        if section == "speed":
            lines += _speed(results["speed"])
    if results["parity"]:
        header = ("models", "check", "dtype", "error", "bound", "ULP", "passed")
        lines += ["## Parity", "", *_table(header, map(_parity_row, results["parity"])), ""]
        lines += ["Errors are relative to the largest value of the tensor.", ""]
    lines += ["## Environment", ""]
    lines += [f"- {key}: {value}" for key, value in environment.items() if key != "command"]
    path = folder / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _categories(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The accuracy in each category, a column for each run; nothing without categories."""
    names = runs[0]["categories"]
    if not names:
        return []
    header = ("category", "reviews", *(f"{run['framework']} {run['model']}" for run in runs))
    rows = []
    for name, found in names.items():
        of_runs = [run["categories"][name] for run in runs]
        rows.append((name, f"{found['support']:,}", *map(_accuracy, of_runs)))
    return ["## Accuracy by category", "", *_table(header, rows), ""]


def _speed(found: Mapping[str, Any]) -> list[str]:
    """What was measured on every task, in reviews of each length, and on the homework's recipe."""
    header = ("task", "implementation", "tokens/s", "quartiles", "ratio", "of the machine's peak")
    rows = [
        (
            task_name(row),
            row["contender"],
            f"{row['tokens_per_second']:,.0f}",
            "{:,.0f} to {:,.0f}".format(*row["quartiles"]),
            f"{row['ratio']:.2f}",
            f"{row['peak_fraction']:.0%}",
        )
        for row in found["rows"]
    ]
    recipe = [
        (
            row["contender"],
            f"{row['reviews_per_second']:,.1f}",
            f"{row['projected_seconds']:,.0f} s",
        )
        for row in found["recipe"]
    ]
    lengths = [
        (row["contender"], f"{row['T']:,}", f"{row['nanoseconds_per_token']:,.0f}")
        for row in found["lengths"]
    ]
    return [
        *_table(header, rows),
        "",
        "The kernel alone, by the length of the reviews.",
        "",
        *_table(("implementation", "T", "nanoseconds a token"), lengths),
        "",
        "The homework's recipe: batch 1, Adam, 4 epochs of 14,227 reviews.",
        "",
        *_table(("implementation", "reviews/s", "projected"), recipe),
        "",
    ]


def _accuracy(found: Mapping[str, Any]) -> str:
    low, high = found["accuracy_interval"]
    return f"{found['accuracy']:.2%} ± {(high - low) / 2:.2%}"


def _parity_row(check: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        " / ".join(check["models"]),
        check["check"],
        check["dtype"],
        f"{check['error']:.1e}",
        f"{check['bound']:.1e}",
        f"{check['ulp']:.1f}",
        "yes" if check["passed"] else "**NO**",
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |" for cells in lines]
