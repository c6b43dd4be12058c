"""A table has the same content on the terminal, in report.md and on the page."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.report import html, tables
from common.report.content import introduction, sections
from common.report.schema import Check, Results, Speed, convert

HELD = Check.of(["torch fused", "oracle"], "outputs, reset before", "float64", 4e-13, 1e-12, 2e-16)
BROKEN = Check.of(["jax [/red] fused", "oracle"], "loss, reset before", "float64", 2.0, 1e-12, 0)
OF_A_PEER = ["flax.linen.GRUCell", "oracle"], "d params, reset after", "float32"


def shown(table: tables.Table) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_failed_check_is_highlighted_everywhere() -> None:
    table = tables.parity([HELD, BROKEN])
    assert [row[-1] for row in table.rows] == ["yes", "**NO**"]
    assert re.search(r"\x1b\[31m *NO\x1b", shown(table))
    assert "jax [/red] fused / oracle" in shown(table)
    assert table.markdown()[3].endswith("| 2.0 | **NO** |")
    template = html._environment().from_string("{{ cell is standing_out }} {{ cell | stripped }}")
    assert template.render(cell=table.rows[1][-1]) == "True NO"
    assert introduction(Results({"command": "x"}, parity=[HELD, BROKEN])) == [
        "**1 of 2 parity checks failed.**"
    ]


@pytest.mark.parametrize(
    ("peer", "share", "passed"), [(True, 1.02, True), (True, 4.1, False), (False, 1.02, False)]
)
def test_bound_is_strict_for_twins_and_loose_for_peers(
    peer: bool, share: float, passed: bool
) -> None:
    check = Check.of(*OF_A_PEER, share * 2e-7, 2e-7, 6e-8, peer)
    assert (check.passed, check.is_excess) == (passed, passed)
    assert check.strain == pytest.approx(share)


def test_a_peer_above_its_bound_is_shown_everywhere() -> None:
    checks = [HELD, Check.of(*OF_A_PEER, 2.04e-7, 2e-7, 6e-8, peer=True)]
    assert tables.parity(checks).rows[1][-3:] == ["102%", "3.4", "above the bound, not ours"]
    assert tables.oracle(checks)[1].rows[0][-1] == "2e-07 (3.4), 1.02 x bound"
    results = Results({"command": "x"}, parity=checks)
    verdict, excesses = introduction(results)
    assert verdict == "All 2 parity checks passed."
    assert "In 1 of those that passed, the error of another library's layer exceeds" in excesses
    assert "1.02 (flax.linen.GRUCell, d params, reset after, float32)" in excesses
    (_, finding), (_, note), _ = sections(results)["Parity"]
    assert "error of this project's implementations, relative to its bound, is 40%" in finding
    assert "error of other libraries, relative to its bound, is 102%" in finding
    assert "their checks fail only above 4 times the bound" in note


def test_the_suite_in_short_names_the_bound_that_does_not_hold() -> None:
    (table,) = tables.oracle([HELD, BROKEN])
    assert table.header == ["model", "reset", "outputs", "loss"]
    assert table.rows[0] == ["torch fused", "before", "4e-13 (2000.0)", ""]
    assert table.rows[1] == ["jax [/red] fused", "before", "", "**2e+00 (2.0) > 1e-12**"]


def test_latencies_are_listed_by_task_fastest_first(results: dict[str, Any]) -> None:
    result = convert(results["speed"], Speed, Path("results.json"))
    by_task = tables.tasks(result.inference, tables.LATENCY)
    assert [table.title.partition(", H")[0] for table in by_task] == [
        f"Inference: B {B}, T {T}" for T in (20, 200) for B in (1, 8, 64)
    ]
    first, *_, last = by_task[1].rows
    assert first == ["torch_impl.GRU", "1,600 µs", "2,400 µs", "100,000", "2.00"]
    assert last == ["Keras on torch", "32,000 µs", "48,000 µs", "5,000", "0.10"]
    assert tables.calls(result).rows[0] == ["torch_impl.GRU", "10 µs", "15 µs"]


@pytest.mark.parametrize("error", [float("inf"), float("nan")])
def test_nan_error_fails(error: Any) -> None:
    check = Check.of(["a", "b"], "x", "float32", error, 1.0, 1e-7)
    assert not check.passed
