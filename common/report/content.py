"""The sections of the report, for report.md and report.html."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from common.metrics import MOST_DRAWN
from common.report import figures, schema, tables
from common.report.figures import Figure
from common.report.schema import Check, Data, Questions, Results, Run, Speed, Tuning

Text = Literal["heading", "finding", "note", "hint", "code"]
Kind = Text | Literal["table", "folded", "figures", "grid", "explorer", "facts", "twins"]
Block = tuple[Kind, Any]
Sections = Mapping[str, Sequence[Block]]
"""Blocks by section. heading, finding (a result in a sentence), note (an explanation), hint (how to
use the page) and code are text; table and folded (collapsed on the page) are a Table; figures and
grid (side by side on the page) are a list of Figure; facts is a dict. Only the page has explorer
(None) and twins (comparison/twins.py)."""


def introduction(results: Results) -> list[str]:
    """The data of the runs, and the verdict on parity."""
    lines = []
    if results.runs and (data := results.data):
        lines.append(
            f"{data.name}: {data.train:,} training reviews, {data.test:,} test reviews; word "
            f"vectors {data.vectors}, {data.vocabulary:,} words."
        )
    if count := len(results.parity):
        failed = sum(not check.passed for check in results.parity)
        verdict = f"**{failed} of {count} parity checks failed.**"
        lines.append(verdict if failed else f"All {count} parity checks passed.")
    if excesses := tables.excesses(results.parity):
        lines.append(excesses)
    return lines


def sections(results: Results) -> Sections:
    """The sections, by title, for which results.json has data."""
    blocks_of: dict[str, Iterable[Block]] = {}
    if results.runs and (data := results.data):
        blocks_of["Summary"] = _summary(results.runs, data)
        if stepwise := [run for run in results.runs if run.losses]:
            blocks_of["Loss"] = _loss(stepwise)
        matrices = [figures.confusion_of_run(run, data.classes) for run in results.runs]
        blocks_of["Confusion"] = [("grid", matrices), *_classes(results.runs, data.classes)]
        if calibrated := [run for run in results.runs if run.reliability]:
            blocks_of["Calibration"] = _calibration(calibrated)
    if results.speed:
        blocks_of["Speed"] = _speed(results.speed)
    if results.tuning:
        blocks_of["Tuning"] = _tuning(results.tuning)
    if results.parity:
        blocks_of["Parity"] = _parity(results.parity)
    if results.questions:
        blocks_of["Questions"] = _questions(results.questions)
    if results.explorer:
        blocks_of["Explorer"] = [("explorer", None)]
    blocks_of["Environment"] = _environment(results.environment)
    return {title: list(blocks) for title, blocks in blocks_of.items()}


def shown(sections: Sections) -> list[Figure]:
    """The figures in the sections."""
    blocks = itertools.chain(*sections.values())
    return [figure for kind, value in blocks if kind in ("figures", "grid") for figure in value]


def _summary(runs: Sequence[Run], data: Data) -> Iterator[Block]:
    yield "table", tables.summary(runs)
    yield (
        "note",
        "Accuracy ± half of its 95 % interval (Wilson). Cores: the number available to a training. "
        "Training: the wall time of all epochs, with compilation. tokens/s: the median over the "
        "periods between log lines, or, for the linear model, the mean over the training. First "
        "step: the time from building the model to its first update. Peak memory: of the process.",
    )
    yield "figures", [figures.accuracy(runs, data.test)]
    if runs[0].categories:
        yield "heading", "By category"
        yield "table", tables.categories(runs)


def _loss(runs: Sequence[Run]) -> Iterator[Block]:
    yield "figures", [figures.losses(runs)]
    yield (
        "note",
        "Each point is the mean over the steps since the previous point. Lines of JAX are dashed.",
    )
    yield (
        "hint",
        "Hover to read a point, drag to move, use Ctrl and wheel (or pinch) to zoom, double-click "
        "to reset the view.",
    )


def _classes(runs: Sequence[Run], classes: Sequence[str]) -> Iterator[Block]:
    """The scores of the largest classes, if there are too many for the figures."""
    if len(classes) > MOST_DRAWN:
        yield "heading", (table := tables.classes(runs, classes)).title
        yield "table", table
        yield "note", f"The scores of all {len(classes):,} classes are in results.json."


def _calibration(runs: Sequence[Run]) -> Iterator[Block]:
    yield "figures", [figures.reliability(runs)]
    yield (
        "note",
        "The accuracy of predictions of similar probability. On the line, probabilities equal the "
        "accuracy; below it, the model is overconfident. Larger dots have more "
        "predictions. The expected calibration error is the mean distance from the line (Guo et "
        "al. 2017).",
    )
    yield "table", tables.calibration(runs)


def _speed(speed: Speed) -> Iterator[Block]:
    yield "figures", [figures.ratios("speed", "", speed.rows, schema.REFERENCE, "quartiles")]
    yield (
        "note",
        "B reviews of up to T words through one layer of H units; medians of alternating "
        "measurements in one run. Denormals (below 1.2e-38), which are slow on Intel: nn.GRU has "
        "PyTorch's default, all others flush them to 0. The peak is a large matrix product's.",
    )
    yield "folded", tables.all_tasks("Speed on every task", speed.rows, tables.TIMED)
    for table in (tables.lengths(speed), tables.recipe(speed)):
        yield "heading", table.title
        yield "table", table
    if speed.inference:
        yield "heading", "Inference"
        arguments = (speed.inference, schema.BUILT_IN, "from p99 to p50")
        yield "figures", [figures.ratios("inference", "In inference, ", *arguments)]
        yield (
            "note",
            "One call at a time, forward only, on B reviews of T words without padding; the result "
            "is the last state. p50 and p99: the median and the 99th percentile of the calls; "
            "tokens/s at the median. Functions of JAX are compiled by jax.jit.",
        )
        yield "folded", tables.all_tasks("Inference", speed.inference, tables.LATENCY)
        yield "heading", (table := tables.calls(speed)).title
        yield "table", table
        yield "note", "A call with one word, one input dimension and one hidden unit."


def _tuning(tuning: Tuning) -> Iterator[Block]:
    yield "figures", [figures.trials(tuning)]
    if tuning.command:
        yield "code", tuning.command
    yield (
        "note",
        "Each trial trains with different options; its loss is the lowest validation loss after "
        "any epoch. Optuna chooses the options, and prunes a trial if most others were better "
        "after the same number of epochs. No test review was read.",
    )
    yield "grid", figures.searched(tuning)
    yield "folded", tables.trials(tuning)


def _parity(checks: Sequence[Check]) -> Iterator[Block]:
    finding = f"{sum(check.passed for check in checks)} of {len(checks)} checks passed."
    for owner, peer in (("this project's implementations", False), ("other libraries", True)):
        if owned := [check for check in checks if check.peer is peer]:
            tightest = max(owned, key=lambda check: check.strain)
            finding += (
                f" The largest error of {owner}, relative to its bound, is {tightest.strain:.0%}: "
                f"{' and '.join(tightest.models)}, {tightest.check}, {tightest.dtype}."
            )
    yield "finding", finding
    yield (
        "note",
        "Errors are relative to the largest value of the tensor; ULP is the unit in the last place "
        "of that value. The bounds apply to this project. Layers of other libraries are measured "
        "too; because their rounding is not a fault of this project, their checks fail only above "
        f"{schema.PEER_BOUNDS} times the bound.",
    )
    yield "table", tables.parity(checks)


def _questions(questions: Questions) -> Iterator[Block]:
    if vanishing := questions.vanishing:
        yield "heading", "Do gradients vanish?"
        yield "finding", vanishing.conclusion
        yield "figures", [figures.vanishing(vanishing)]
        yield "folded", tables.vanishing(vanishing)
    if gates := questions.gates:
        yield "heading", "Does the state change less at irrelevant words?"
        yield "finding", gates.conclusion
        yield "grid", figures.gates(gates)
        yield from (("table", table) for table in tables.gates(gates))
    if pairs := questions.comparisons:
        yield "heading", "Which of two models is better?"
        for pair in pairs:
            yield "finding", f"{pair.title}: {pair.conclusion}"
        yield "figures", figures.differences(pairs)
        yield "table", tables.pairs(pairs)
        yield (
            "note",
            "Paired: the same seeds, splits and reviews. Differences are in percentage points. The "
            "interval applies to new seeds and new reviews, p (McNemar's test) to these models. "
            "Training: the median over the seeds.",
        )
    if questions.commands:
        yield "code", "\n".join(questions.commands)


def _environment(environment: Mapping[str, str | int]) -> Iterator[Block]:
    yield "code", str(environment["command"])
    yield "facts", {key: value for key, value in environment.items() if key != "command"}
    yield (
        "hint",
        "All data is in results.json; the same folder has the figures as PNG and SVG. "
        "To write this page again: python compare.py report DIR",
    )
