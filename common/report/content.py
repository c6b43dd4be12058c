"""What the report says, section by section, for report.md and report.html alike."""

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
"""heading, finding (what was found, in a sentence), note (how to read it), hint (how to use the
page) and code: text; table, and folded, on the page: a Table; figures and grid, on the page side by
side: a list of Figure; explorer, on the page alone: nothing; facts: a dict; twins, on the page
alone: see comparison/twins.py."""


def introduction(results: Results) -> list[str]:
    """What was trained on what, and whether parity holds."""
    lines = []
    if results.runs and (data := results.data):
        lines.append(
            f"{data.name}: {data.train:,} reviews to train on, {data.test:,} to test on; word "
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
    """By its title, every section that results.json has the numbers for."""
    found: dict[str, Iterable[Block]] = {}
    if results.runs and (data := results.data):
        found["Summary"] = _summary(results.runs, data)
        if stepwise := [run for run in results.runs if run.losses]:
            found["Loss"] = _loss(stepwise)
        matrices = [figures.confusion_of_run(run, data.classes) for run in results.runs]
        found["Confusion"] = [("grid", matrices), *_classes(results.runs, data.classes)]
        if calibrated := [run for run in results.runs if run.reliability]:
            found["Calibration"] = _calibration(calibrated)
    if results.speed:
        found["Speed"] = _speed(results.speed)
    if results.tuning:
        found["Tuning"] = _tuning(results.tuning)
    if results.parity:
        found["Parity"] = _parity(results.parity)
    if results.questions:
        found["Questions"] = _questions(results.questions)
    if results.explorer:
        found["Explorer"] = [("explorer", None)]
    found["Environment"] = _environment(results.environment)
    return {title: list(blocks) for title, blocks in found.items()}


def shown(sections: Sections) -> list[Figure]:
    """The figures in the sections."""
    blocks = itertools.chain(*sections.values())
    return [figure for kind, it in blocks if kind in ("figures", "grid") for figure in it]


def _summary(runs: Sequence[Run], data: Data) -> Iterator[Block]:
    yield "table", tables.summary(runs)
    yield (
        "note",
        "Accuracy ± half of its 95 % interval (Wilson). Cores: how many a training could use. "
        "Training: the wall time of all epochs, compilation included. tokens/s: the median over "
        "the stretches between two log lines; of the linear model, over its whole training. First "
        "step: from building the model to its first "
        "update. Peak memory: of the process.",
    )
    yield "figures", [figures.accuracy(runs, data.test)]
    if runs[0].categories:
        yield "heading", "By category"
        yield "table", tables.categories(runs)


def _loss(runs: Sequence[Run]) -> Iterator[Block]:
    yield "figures", [figures.losses(runs)]
    yield "note", "Each point is the mean over the steps since the last; JAX is dashed."
    yield (
        "hint",
        "Hover for a point, drag to move, Ctrl and wheel (or pinch) to zoom, double-click to see "
        "all again.",
    )


def _classes(runs: Sequence[Run], classes: Sequence[str]) -> Iterator[Block]:
    """Of many classes, what the figures do not show."""
    if len(classes) > MOST_DRAWN:
        yield "heading", (table := tables.classes(runs, classes)).title
        yield "table", table
        yield "note", f"The scores of all {len(classes):,} classes are in results.json."


def _calibration(runs: Sequence[Run]) -> Iterator[Block]:
    yield "figures", [figures.reliability(runs)]
    yield (
        "note",
        "Of answers of about the same probability, the share that is right: on the line, "
        "probabilities mean what they say; below it, they are too sure. The larger a dot, the more "
        "answers. The expected calibration error is the mean distance (Guo et al. 2017).",
    )
    yield "table", tables.calibration(runs)


def _speed(speed: Speed) -> Iterator[Block]:
    yield "figures", [figures.ratios("speed", "", speed.rows, schema.REFERENCE, "quartiles")]
    yield (
        "note",
        "B reviews of up to T words through one layer of H units, measured in turns in one run; "
        "medians. Denormals: nn.GRU as PyTorch comes; all others take numbers below 1.2e-38, which "
        "are slow to compute with on Intel, for 0. The peak is that of a large matrix product.",
    )
    yield "folded", tables.all_tasks("Speed on every task", speed.rows, tables.TIMED)
    for table in (tables.lengths(speed), tables.recipe(speed)):
        yield "heading", table.title
        yield "table", table
    if speed.inference:
        yield "heading", "Inference"
        how = (speed.inference, schema.BUILT_IN, "from p99 to p50")
        yield "figures", [figures.ratios("inference", "In inference, ", *how)]
        yield (
            "note",
            "A call at a time, forward only, on B reviews of T words without padding; what is "
            "wanted is the last state. p50 and p99: the median and the 99th percentile of the "
            "calls; tokens/s at the median. Modules and sessions are called as they are, JAX's "
            "functions under jax.jit.",
        )
        yield "folded", tables.all_tasks("Inference", speed.inference, tables.LATENCY)
        yield "heading", (table := tables.calls(speed)).title
        yield "table", table
        yield "note", "Of one word, one input dimension and one hidden unit."


def _tuning(tuning: Tuning) -> Iterator[Block]:
    yield "figures", [figures.trials(tuning)]
    if tuning.command:
        yield "code", tuning.command
    yield (
        "note",
        "Each trial trains with other options; the loss is that on the validation reviews, the "
        "lowest after any epoch. Optuna chooses the options, and gives a trial up where most "
        "others had been better after as many epochs. No test review was read.",
    )
    yield "grid", figures.searched(tuning)
    yield "folded", tables.trials(tuning)


def _parity(checks: Sequence[Check]) -> Iterator[Block]:
    finding = f"{sum(check.passed for check in checks)} of {len(checks)} checks passed."
    for whose, peer in (("this project's implementations", False), ("other libraries", True)):
        if of_them := [check for check in checks if check.peer is peer]:
            tightest = max(of_them, key=lambda check: check.strain)
            finding += (
                f" Of {whose}, the error closest to its bound takes {tightest.strain:.0%} of it: "
                f"{' and '.join(tightest.models)}, {tightest.check}, {tightest.dtype}."
            )
    yield "finding", finding
    yield (
        "note",
        "Errors are relative to the largest value of the tensor, ULP is that value's unit in the "
        "last place. The bounds hold this project's implementations. The layers of other libraries "
        "are measured beside them, and their rounding is not a fault of this project: their checks "
        f"fail only where the error is more than {schema.PEER_BOUNDS} times the bound.",
    )
    yield "table", tables.parity(checks)


def _questions(questions: Questions) -> Iterator[Block]:
    if vanishing := questions.vanishing:
        yield "heading", "Do gradients vanish?"
        yield "finding", vanishing.conclusion
        yield "figures", [figures.vanishing(vanishing)]
        yield "folded", tables.vanishing(vanishing)
    if gates := questions.gates:
        yield "heading", "Does the state change less at words that do not matter?"
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
            "Paired: the same seeds, splits and reviews. Differences in percentage points; the "
            "interval is for new seeds and new reviews, p (McNemar's test) for these very models. "
            "Training: the median over the seeds.",
        )
    if questions.commands:
        yield "code", "\n".join(questions.commands)


def _environment(environment: Mapping[str, str | int]) -> Iterator[Block]:
    yield "code", str(environment["command"])
    yield "facts", {key: value for key, value in environment.items() if key != "command"}
    yield (
        "hint",
        "Everything here is in results.json; the figures are beside it as PNG and SVG. "
        "This page is written again by: python compare.py report DIR",
    )
