"""The parity checks as a table for a terminal.

Not in comparison/parity.py, which imports every framework.
"""

from collections.abc import Iterable

from rich import box
from rich.console import Group
from rich.table import Table

from common.report.schema import Check

# What is summed up in one column of the table, and how the names of its tensors start.
QUANTITIES = {
    "outputs": ("outputs",),
    "last states": ("h_last",),
    "loss": ("loss", "logits"),
    "d x": ("d x",),
    "d h0": ("d h0",),
    "d params": ("d gru.", "d head."),
}


def table(rows: Iterable[Check]) -> Group:
    """The rows of comparison.parity.run: a line a model, a column a quantity."""
    rows = list(rows)
    tables = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        title = f"{dtype}: largest difference from the oracle, relative to the largest value (ULP)"
        result = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=0)
        result.add_column("model", no_wrap=True)
        result.add_column("reset")
        for quantity in QUANTITIES:
            result.add_column(quantity, justify="right")
        lines: dict[tuple[str, str], dict[str, str]] = {}
        for row in rows:
            quantity, kind = row["check"].split(", reset ")
            cell = f"{row['error']:.0e} ({row['ulp']:.1f})"
            if not row["passed"]:
                cell = f"[red]{cell} > {row['bound']:.0e}[/red]"
            if row["dtype"] == dtype:
                lines.setdefault((kind, row["models"][0]), {})[quantity] = cell
        for (kind, model), cells in lines.items():
            result.add_row(model, kind, *(cells.get(quantity, "") for quantity in QUANTITIES))
        tables.append(result)
    return Group(*tables)
