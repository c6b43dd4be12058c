"""The figures, each defined once: drawn live in report.html, and saved as PNG and SVG.

A figure's title says what was found, in words computed from its numbers. Altair writes the
definition; vl-convert, which needs no browser, draws the files.
"""

import json
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import altair as alt
import msgspec
import numpy as np
import vl_convert

from common.metrics import MOST_DRAWN
from common.report.schema import (
    FEWEST_SEEDS,
    Gates,
    Interval,
    Latency,
    Pair,
    Part,
    Run,
    Timed,
    Trial,
    Tuning,
    Vanishing,
)

# Told apart by people who confuse red and green too (Okabe and Ito 2008); the first four also stand
# out, 3 to 1, from white and from a dark page.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
# A model has the same colour in every chart.
COLOURED = ("gru", "bigru", "nn.gru", "nn.bigru", "linear", "rnn", "birnn")
FEW_CLASSES = 5
VEGA_LITE = alt.SCHEMA_VERSION.removeprefix("v").rpartition(".")[0]  # that Altair writes for
Chart = alt.Chart | alt.LayerChart | alt.FacetChart  # the last is only Altair's type of a sum
# Text and lines in the colour of the page around them; black in a file.
INK = "currentColor"
CONFIG: dict[str, Any] = {
    "font": "system-ui, sans-serif",
    "style": {
        "guide-label": {"fontSize": 12, "fill": INK},
        "guide-title": {"fontSize": 12, "fill": INK, "fontWeight": "normal"},
    },
    "axis": {
        **{f"{part}Color": INK for part in ("grid", "domain", "tick")},
        "gridOpacity": 0.15,
        "labelLimit": 220,
    },
    "legend": {"orient": "top", "labelLimit": 400, "symbolStrokeWidth": 3, "symbolSize": 220},
    "title": {"anchor": "start", "fontSize": 14, "color": INK, "offset": 12},
    "view": {"stroke": None},
    "range": {"category": COLOURS},  # from the beginning again after the last
    "text": {"color": INK},
    "rule": {"color": INK},
}


@dataclass(frozen=True)
class Figure:
    """A chart, its file name without suffix, its title, and how wide it is in a file, in pixels.

    Infinities and NaN become null, as JSON has it, and are not drawn.
    """

    name: str
    title: str
    chart: Chart
    width: int = 680
    wide: bool = False
    """Whether half of the page is too narrow for it."""

    def spec(self, **properties: Any) -> dict[str, Any]:
        """For a page, as wide as its container, or as the properties say."""
        page = {"width": "container", "background": "transparent", "description": self.title}
        chart = self.chart.properties(**page | properties).configure(**CONFIG)
        return chart.to_dict(validate=False)  # which takes longer than to write it

    def _repr_svg_(self) -> str:
        """The chart as SVG with its title. Jupyter displays a Figure by this method."""
        title = textwrap.wrap(self.title, self.width // 8)
        spec = self.spec(width=self.width, background="white", title=title)
        return vl_convert.vegalite_to_svg(spec, VEGA_LITE)

    def save(self, path: Path) -> None:
        """Write the chart as PNG to path, and as SVG beside it."""
        svg = self._repr_svg_()
        path.with_suffix(".svg").write_text(svg, encoding="utf-8")
        path.write_bytes(vl_convert.svg_to_png(svg, scale=2))


# What the homework calls its networks; it has no title of this kind for the last two.
HOMEWORK_NAMES = {
    "gru": "MyGRU",
    "nn.gru": "nn.GRU",
    "bigru": "MyGRU, bidirectional",
    "nn.bigru": "nn.GRU, bidirectional",
}


def of_run(folder: Path, results: Mapping[str, Any], classes: Sequence[str], preset: str) -> None:
    """Draw loss.png, if there are losses, and confusion.png of a run, from what metrics.json holds.

    Of more than MOST_DRAWN classes, confusion.png has the most frequent mistakes, and classes.png
    the recall of the largest classes. With the preset `homework` the figures are titled and
    normalised as the homework's are (docs/homework.md).
    """
    model, homework = results["model"], preset == "homework"
    title = f"{results['framework']} {model} on {results['data']['name']}"
    if "losses" in results:
        epochs, means = np.array(results["loss_epochs"]), np.array(results["losses"])
        if homework:  # the mean of the few iterations left at the end of an epoch is mostly noise
            whole = np.isclose(np.diff(epochs, prepend=0), epochs[0])
            epochs, means = epochs[whole], means[whole]
        name = HOMEWORK_NAMES.get(model, model)
        title_of_loss = f"Loss (using {name})" if homework else f"Training loss: {title}"
        curve = (epochs.tolist(), means.tolist())
        loss_curves({model: curve}, title_of_loss).save(folder / "loss.png")
    correct = "" if homework else f"{title}: {results['accuracy']:.2%} correct"
    if len(classes) > MOST_DRAWN:
        run = msgspec.convert(results, Run)
        matrix = mistakes("confusion", correct, run, classes)
        largest("classes", correct, run, classes).save(folder / "classes.png")
    else:
        matrix = confusion(
            "confusion", correct, results["confusion"], classes, "predicted" if homework else "true"
        )
    matrix.save(folder / "confusion.png")


def _intervals(
    rows: Sequence[Mapping[str, Any]],
    x: alt.X,
    numbers: str,
    groups: Sequence[str] = (),
    colours: alt.Scale | None = None,
) -> Chart:
    """A line for each name: the dot is a row's value, the stroke goes from its low to its high.

    Hovering tells them, in the format `numbers`, and "n", if there is one. With groups, a row has a
    "group", which gives its colour and its place among those of its name. Without, `colours` are
    those of the names. Labels break at " · ".
    """
    names = list(dict.fromkeys(row["name"] for row in rows))
    broken = "split(datum.label, ' · ')"
    axis = alt.Axis(grid=bool(groups), labelExpr=broken, labelLimit=140)
    step = 12 * len(groups) + 16 if groups else 40
    base = alt.Chart(alt.Data(values=rows), height=step * len(names)).encode(
        y=alt.Y("name:N", sort=names, title=None, axis=axis),
        tooltip=[
            *(["name:N", "group:N"] if groups else ["name:N"]),
            *_numbers(numbers, "value", "low", "high"),
            *(_numbers(",", "n") if "n" in rows[0] else []),
        ],
    )
    if groups:
        legend = alt.Legend(title=None, columns=1, symbolSize=110, labelExpr=broken)
        base = base.encode(
            yOffset=alt.YOffset("group:N", sort=groups),
            color=alt.Color("group:N", scale=alt.Scale(domain=groups), legend=legend),
        )
    if colours:
        base = base.encode(color=alt.Color("name:N", scale=colours, legend=None))
    stroke = base.mark_rule(strokeWidth=2).encode(x=x, x2="high:Q")
    dot = base.mark_point(filled=True, size=70 if groups else 110, color=COLOURS[0], opacity=1)
    return stroke + dot.encode(x="value:Q")


def _numbers(numbers: str, *names: str) -> list[alt.Tooltip]:
    """What hovering tells of these fields."""
    return [alt.Tooltip(f"{name}:Q", format=numbers) for name in names]


def _upright(value: float) -> alt.Chart:
    """A dashed line to compare with: no difference, the same speed."""
    return alt.Chart(alt.Data(values=[{"x": value}])).mark_rule(strokeDash=[4, 4]).encode(x="x:Q")


def _row(name: str, value: float, interval: Interval, **more: Any) -> dict[str, Any]:
    """What `_intervals` draws a line of."""
    return {"name": name, "value": value, "low": interval[0], "high": interval[1], **more}


def accuracy(runs: Sequence[Run], reviews: int) -> Figure:
    """The runs' accuracies on so many test reviews."""
    rows = [
        _row(run.name, run.accuracy, run.accuracy_interval, label=f"{run.accuracy:.2%}")
        for run in sorted(runs, key=lambda run: -run.accuracy)
    ]
    ends = dict.fromkeys(f"{row['label']} ({row['name']})" for row in (rows[-1], rows[0]))
    title = f"{' to '.join(ends)} of {reviews:,} reviews right"
    if rows[1:]:
        best, second = rows[:2]
        if best["low"] > second["high"]:
            title += f"; the 95 % interval of {best['name']} is above that of the next"
        else:
            title += f"; {best['name']} and {second['name']} cannot be told apart: "
            title += "their 95 % intervals overlap"
    x = alt.X("low:Q", title="accuracy, 95 % interval (Wilson)")
    x = x.axis(format="~%", tickCount=8).scale(zero=False, padding=20)
    label = alt.Chart(alt.Data(values=rows)).mark_text(dy=-11)
    label = label.encode(x="value:Q", y=alt.Y("name:N", sort=None), text="label:N")
    colours = _colours([row["name"] for row in rows])
    return Figure("accuracy", title, _intervals(rows, x, ".2%", colours=colours) + label)


def losses(runs: Sequence[Run]) -> Figure:
    """The runs' training losses."""
    order = sorted(runs, key=lambda run: run.losses[-1])
    ends = dict.fromkeys(f"{run.losses[-1]:.3f} ({run.name})" for run in (order[0], order[-1]))
    title = f"Training ends at a loss of {' to '.join(ends)}"
    return loss_curves({run.name: (run.loss_epochs, run.losses) for run in runs}, title)


def loss_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str
) -> Figure:
    """Training losses. curves: name -> (epochs done at each point, mean loss up to there).

    Several curves can be switched on and off, and zoomed into; hovering tells the nearest.
    """
    rows = [
        {"name": name, "epochs": x, "loss": y}
        for name, points in curves.items()
        for x, y in zip(*points, strict=True)
    ]
    names, end = list(curves), round(max(x[-1] for x, _ in curves.values()))
    colour, dash = _styles(names)
    zoom = alt.selection_interval(
        name="zoom", bind="scales", encodings=["x"], zoom="wheel![event.ctrlKey]"
    )
    nearest = alt.selection_point(
        name="nearest", on="pointerover", nearest=True, clear="pointerout", empty=False
    )
    base = alt.Chart(alt.Data(values=rows), height=340).encode(
        x=alt.X("epochs:Q", scale=alt.Scale(domain=[0, end], nice=False), title="epochs"),
        y=alt.Y("loss:Q", scale=alt.Scale(zero=False), title="mean cross-entropy loss (nats)"),
        color=colour,
    )
    line = base.mark_line(strokeWidth=2.5, clip=True).encode(strokeDash=dash).add_params(zoom)
    point = base.mark_point(filled=True, size=70, clip=True).add_params(nearest)
    point = point.encode(
        opacity=alt.condition(nearest, alt.value(1), alt.value(0)),
        tooltip=["name:N", *_numbers(".2f", "epochs"), *_numbers(".5f", "loss")],
    )
    chart = line + point
    if len(names) > 1:
        switches = [
            alt.param(name=f"show_{i}", value=True, bind=alt.binding_checkbox(name=name))
            for i, name in enumerate(names)
        ]
        shown = [f"(datum.name === {json.dumps(n)} && show_{i})" for i, n in enumerate(names)]
        chart = chart.add_params(*switches).transform_filter(" || ".join(shown))
    return Figure("loss", title, chart)


def _colours(names: Sequence[str]) -> alt.Scale:
    """The colour of each run's model."""
    colours = _colours_of([name.rpartition(" ")[2] for name in names])
    return alt.Scale(domain=list(names), range=colours)


def _colours_of(models: Sequence[str]) -> list[str]:
    """The colour of each model; models that COLOURED does not name get the last colours."""
    others = dict.fromkeys(model for model in models if model not in COLOURED)
    of_models = dict(zip(COLOURED, COLOURS, strict=True))
    of_models |= zip(others, COLOURS[::-1] * len(models), strict=False)
    return [of_models[model] for model in models]


def _styles(names: Sequence[str]) -> tuple[alt.Color, alt.StrokeDash]:
    """The colour of each run's model, and how its line is drawn; with a legend, if it needs one.

    The framework twins lie on top of each other: one is dashed so that both show.
    """
    dashes = [[5, 3] if name.startswith("jax") else [1, 0] for name in names]
    dashed = alt.Scale(domain=list(names), range=dashes)
    legend = alt.Legend(title=None, symbolType="stroke", columns=2) if names[1:] else None
    return (
        alt.Color("name:N", scale=_colours(names), legend=legend),
        alt.StrokeDash("name:N", scale=dashed, legend=legend),
    )


def reliability(runs: Sequence[Run]) -> Figure:
    """How often the runs' answers are right, by their probability."""
    rows = [
        {"name": run.name, **msgspec.to_builtins(each)} for run in runs for each in run.reliability
    ]
    best, worst = (of(runs, key=lambda run: run.calibration_error or 0) for of in (min, max))
    title = f"The probabilities of {best.name} are off by {best.miscalibration} points"
    title += f", those of {worst.name} by {worst.miscalibration}" if len(runs) > 1 else ""
    low = min(min(row["confidence"], row["accuracy"]) for row in rows)
    ends = [math.floor(10 * low) / 10, 1]
    scale = alt.Scale(domain=ends, nice=False, zero=False)
    x = alt.X("confidence:Q", title="probability of the answer", scale=scale).axis(format="~%")
    y = alt.Y("accuracy:Q", title="share that is right", scale=scale).axis(format="~%")
    colour, dash = _styles([run.name for run in runs])
    base = alt.Chart(alt.Data(values=rows), height=340).encode(x=x, y=y, color=colour)
    line = base.mark_line(strokeWidth=2).encode(strokeDash=dash)
    tooltip = ["name:N", *_numbers(".1%", "confidence", "accuracy"), *_numbers(",", "count")]
    point = base.mark_point(filled=True, opacity=0.8)
    point = point.encode(size=alt.Size("count:Q", legend=None), tooltip=tooltip)
    perfect = alt.Chart(alt.Data(values=[{"confidence": e, "accuracy": e} for e in ends]))
    perfect = perfect.mark_line(strokeDash=[2, 4], color=INK, opacity=0.6).encode(x=x, y=y)
    return Figure("reliability", title, perfect + line + point)


def confusion_of_run(run: Run, classes: Sequence[str]) -> Figure:
    """The confusion matrix of a run; of more than MOST_DRAWN classes, the most frequent mistakes.

    The title names the most frequent mistake.
    """
    name = f"confusion-{run.framework}-{run.model}"
    title = f"{run.name}: {run.accuracy:.2%} correct"
    if run.most_mistaken:
        true, predicted, count = run.most_mistaken[0]
        title += f"; {count:,} of {run.recalls[true][0]:,} {classes[true]} "
        title += f"taken for {classes[predicted]}"
    if len(classes) > MOST_DRAWN:
        return mistakes(name, title, run, classes)
    return confusion(name, title, run.confusion, classes)


def mistakes(name: str, title: str, run: Run, classes: Sequence[str]) -> Figure:
    """The most frequent mistakes of a run, at most MOST_DRAWN."""
    recalls = run.recalls
    rows = [
        {
            "name": f"{classes[true]} → {classes[predicted]}",
            "true": classes[true],
            "predicted": classes[predicted],
            "value": count,
            "label": f"{count:,} of {recalls[true][0]:,}",
        }
        for true, predicted, count in run.most_mistaken[:MOST_DRAWN]
    ]
    what = f"the {len(rows)} most frequent mistakes among {len(classes):,} classes"
    x = alt.X("value:Q", title=["reviews (true class → predicted class)", what])
    x = x.axis(tickMinStep=1, format=",")
    bars = _bars(run, rows, x, ["true:N", "predicted:N", "label:N"])
    return Figure(name, title, bars, wide=True)


def largest(name: str, title: str, run: Run, classes: Sequence[str]) -> Figure:
    """The recall of the classes with the most test reviews, at most MOST_DRAWN."""
    recalls = run.recalls
    rows = [
        {"name": classes[at], "value": recall, "label": f"{recall:.0%} of {count:,}"}
        for at in run.by_size[:MOST_DRAWN]
        for count, recall in [recalls[at]]
    ]
    what = f"recall of the {len(rows)} largest of {len(classes):,} classes"
    x = alt.X("value:Q", title=what).scale(domain=[0, 1]).axis(format="~%")
    return Figure(name, title, _bars(run, rows, x, ["name:N", "label:N"]))


def _bars(run: Run, rows: Sequence[Mapping[str, Any]], x: alt.X, tooltip: Sequence[str]) -> Chart:
    """A bar for each row, in their order: a "name", a "value" and the "label" at its end."""
    (colour,) = _colours_of([run.model])
    y = alt.Y("name:N", sort=None, title=None, axis=alt.Axis(labelLimit=360))
    base = alt.Chart(alt.Data(values=rows), height=18 * max(len(rows), 1))
    base = base.encode(x=x, y=y, tooltip=tooltip)
    label = base.mark_text(align="left", dx=4).encode(text="label:N")
    return base.mark_bar(color=colour) + label


def confusion(
    name: str,
    title: str,
    matrix: Sequence[Sequence[int]],
    classes: Sequence[str],
    of: Literal["true", "predicted"] = "true",
) -> Figure:
    """A confusion matrix (row: true class, column: predicted), counts and shares.

    `of` says what a share is of: all reviews of its true class (row), or of its predicted class
    (column), as in the homework's figures.
    """
    counts = np.asarray(matrix)
    few = len(classes) <= FEW_CLASSES  # of many there is only room for the share, if that
    shares = counts / np.maximum(counts.sum(axis=1 if of == "true" else 0, keepdims=True), 1)
    rows = [
        {
            "true": classes[row],
            "predicted": classes[column],
            "count": int(counts[row, column]),
            "share": float(share),
            "label": [f"{counts[row, column]:,}", f"{share:.1%}"] if few else f"{100 * share:.0f}",
        }
        for (row, column), share in np.ndenumerate(shares)
    ]
    size = max(300 // len(classes), 44)
    upright = any(7 * len(name) > size for name in classes)
    axis = alt.Axis(labelAngle=-90 if upright else 0)
    base = alt.Chart(alt.Data(values=rows), height=size * len(classes)).encode(
        x=alt.X("predicted:N", sort=None, title="predicted class", axis=axis),
        y=alt.Y("true:N", sort=None, title="true class"),
        tooltip=["true:N", "predicted:N", "count:Q", *_numbers(".1%", "share")],
    )
    what = [f"share of the {of} class", *([] if few else ["(numbers: in %)"])]
    legend = alt.Legend(title=what, format="~%", gradientLength=150)
    scale = alt.Scale(domain=[0, 1], range=["#ffffff", "#004070"], interpolate="rgb")
    cell = base.mark_rect(stroke=INK, strokeOpacity=0.3)
    cell = cell.encode(color=alt.Color("share:Q", scale=scale, legend=legend))
    # Either ink has a contrast of at least 4.5 to 1 on its side of this share.
    ink = alt.condition("datum.share > 0.7", alt.value("white"), alt.value("black"))
    label = base.mark_text(lineBreak="\n", dy=-6 if few else 0, fontSize=12).encode(
        text="label:N",
        color=ink,
        opacity=alt.condition(f"width < {18 * len(classes)}", alt.value(0), alt.value(1)),
    )
    return Figure(name, title, cell + label, size * len(classes) + 60, wide=not few)


def ratios(
    name: str, start: str, rows: Sequence[Timed] | Sequence[Latency], reference: str, line: str
) -> Figure:
    """How many times as fast as the reference everything is, on every task. start: of the title;
    line: what the stroke stands for."""
    tasks = list(dict.fromkeys(row.name for row in rows))
    few = len(tasks) <= len(COLOURS)  # of many, those of one batch size stand together
    of_contender: dict[str, list[float]] = {}
    found: dict[tuple[str, str], list[Timed | Latency]] = {}
    for row in rows:
        of_contender.setdefault(row.contender, []).append(row.ratio)
        found.setdefault((row.contender, row.name if few else f"B {row.B}"), []).append(row)
    medians = {each: float(np.median(of_tasks)) for each, of_tasks in of_contender.items()}
    values = []
    for (each, group), timed in sorted(found.items(), key=lambda item: -medians[item[0][0]]):
        value = float(np.median([row.ratio for row in timed]))
        ends = [end for row in timed for end in row.ratios]
        label = each.replace(", ", " · ")
        values.append(_row(label, value, (min(ends), max(ends)), group=group))
    best = max(medians, key=lambda each: medians[each])
    title = f"{start}{best} is the fastest: {medians[best]:.2f} times {reference}"
    if len(tasks) > 1:
        title += f", the median of {len(of_contender[best])} tasks"
    stroke = f"line: {line}" if few else "dot: median, line: all tasks of that B"
    x = alt.X("low:Q", title=[f"times {reference} (logarithmic)", stroke])
    x = x.scale(type="log", base=2, nice=False, padding=20)
    x = x.axis(format="~r", values=[2.0**n for n in range(-10, 11)])
    groups = list(dict.fromkeys(group for _, group in found))
    return Figure(name, title, _upright(1) + _intervals(values, x, ".2f", groups))


def trials(tuning: Tuning) -> Figure:
    """The trials in their order, and the lowest loss up to each."""
    rows, lowest = [], math.inf
    for each in sorted(tuning.trials, key=lambda each: each.number):
        lowest = min(lowest, each.loss if each.state == "complete" else math.inf)
        rows.append({**_tried(each), "lowest": lowest if lowest < math.inf else None})
    title = f"No trial of {len(rows)} came to its end"
    if best := tuning.best:
        title = (
            f"Of {len(rows)} trials, {best.number} has the lowest validation loss, {best.loss:.4g}"
        )
        begun = next((t for t in tuning.trials if t.given and t is not best), None)
        if begun and begun.state == "complete":
            title += f"; the options that were given have {begun.loss:.4g}"
    for state, what in (("pruned", "were given up"), ("failed", "failed")):
        if count := sum(each.state == state for each in tuning.trials):
            title += f"; {count} {what}"
    x = alt.X("number:Q", title="trial", axis=alt.Axis(tickMinStep=1, format="d"))
    point = _loss_points(rows).encode(x=x)
    line = alt.Chart(alt.Data(values=rows)).mark_line(interpolate="step-after", color=COLOURS[1])
    line = line.encode(x=x, y=alt.Y("lowest:Q", scale=alt.Scale(zero=False)))
    return Figure("tuning", title, line + point)


def searched(tuning: Tuning) -> list[Figure]:
    """The loss by each option that was searched."""
    found = []
    for name in tuning.trials[0].options:
        what = name.replace("_", " ")
        title = what.capitalize()
        if best := tuning.best:
            title += f": {best.options[name]:.3g} in the best trial"
        scale = alt.Scale(type="log") if name == "learning_rate" else alt.Scale(zero=False)
        axis = alt.Axis(tickCount=5, format="~g" if name == "learning_rate" else "~r")
        x = alt.X(f"{name}:Q", title=what, scale=scale, axis=axis)
        chart = _loss_points([_tried(each) for each in tuning.trials]).encode(x=x)
        found.append(Figure(f"tuning-{name.replace('_', '-')}", title, chart, width=420))
    return found


def _tried(trial: Trial) -> dict[str, Any]:
    loss = trial.loss if trial.losses else None
    return {"number": trial.number, "state": trial.state, "loss": loss, **trial.options}


def _loss_points(rows: Sequence[Mapping[str, Any]]) -> alt.Chart:
    """A mark for each trial. Those that are far worse than most stand at the upper edge."""
    losses = sorted(row["loss"] for row in rows if row["loss"] is not None) or [0.0, 1.0]
    most = losses[0] + 4 * (losses[len(losses) // 2] - losses[0]) or losses[-1]
    domain = [losses[0] - 0.05 * (min(most, losses[-1]) - losses[0]), min(most, losses[-1])]
    scale = alt.Scale(zero=False, domain=domain, clamp=True, nice=False)
    states = alt.Scale(domain=["complete", "pruned"], range=["circle", "triangle-up"])
    numbers = [name for name in rows[0] if name not in ("state", "loss")]
    return (
        alt.Chart(alt.Data(values=[row for row in rows if row["loss"] is not None]), height=220)
        .mark_point(size=60, opacity=0.9, strokeWidth=2)
        .encode(
            y=alt.Y("loss:Q", title="validation loss", scale=scale),
            shape=alt.Shape("state:N", scale=states, legend=alt.Legend(title=None, symbolSize=80)),
            color=alt.value(COLOURS[0]),
            tooltip=["state:N", *_numbers(".4~g", *numbers), *_numbers(".4~g", "loss")],
        )
    )


def vanishing(found: Vanishing) -> Figure:
    """How the gradient shrinks. Points that are 0, which have no logarithm, are left out."""
    rows = [
        {"name": s.name, "distance": distance, "norm": median, "low": low or None, "high": high}
        for s in found.series
        for distance, median, low, high in zip(
            found.distances, s.median, s.low, s.high, strict=True
        )
        if median > 0
    ]
    changes = [f"{_fold(s.median[0], s.median[-1])} in the {s.name}" for s in found.series]
    title = f"From {found.distances[0]} to {found.distances[-1]} words before the end the gradient "
    title += f"shrinks {_listed(changes)}"
    what = [
        "distance to the end of the review (words)",
        f"line: median, band: quartiles, of {found.reviews:,} reviews",
    ]
    legend = alt.Legend(title=None, columns=1, symbolType="stroke", symbolOpacity=1)
    names = [series.name for series in found.series]
    # "GRU, trained" and "tanh RNN, untrained": gru and rnn.
    models = [name.partition(",")[0].rpartition(" ")[2].lower() for name in names]
    scale = alt.Scale(domain=names, range=_colours_of(models))
    dashes = alt.Scale(domain=names, range=[[5, 3] if "untrained" in n else [1, 0] for n in names])
    base = alt.Chart(alt.Data(values=rows), height=340).encode(
        x=alt.X("distance:Q", title=what), color=alt.Color("name:N", scale=scale, legend=legend)
    )
    band = base.mark_area(opacity=0.15).encode(y=alt.Y("low:Q").scale(type="log"), y2="high:Q")
    y = alt.Y("norm:Q", title="norm of dLoss/dh").scale(type="log").axis(format="~e", tickCount=8)
    line = base.mark_line(strokeWidth=2.5, point=len(found.distances) <= 30)
    line = line.encode(strokeDash=alt.StrokeDash("name:N", scale=dashes, legend=legend))
    tooltip = ["name:N", "distance:Q", *_numbers(".2e", "norm", "low", "high")]
    return Figure("vanishing-gradients", title, band + line.encode(y=y, tooltip=tooltip))


def _fold(first: float, last: float) -> str:
    """6.69-fold, 299-fold, 10^9-fold."""
    if not last > 0:
        return "to nothing"
    factor = first / last
    return f"{factor:.3g}-fold" if factor < 1000 else f"10^{math.log10(factor):.0f}-fold"


def gates(found: Gates) -> list[Figure]:
    """What the gates do at each group of words; none of a language without our stop words."""
    if not found.groups:
        return []
    return [
        _gate(found, "z", "update gate z", "mean of z"),
        _gate(found, "change", "change of the state", "change relative to the state's norm"),
    ]


def _gate(found: Gates, quantity: str, what: str, axis_title: str) -> Figure:
    rows = [
        _row(each.group, getattr(each, quantity), getattr(each, f"{quantity}_interval"), n=each.n)
        for each in found.groups
    ]
    order = sorted(rows, key=lambda row: row["value"])
    bottom, top = order[0], order[-1]
    title = f"The {what} is largest at {top['name']} ({top['value']:.3g}) "
    title += f"and smallest at {bottom['name']} ({bottom['value']:.3g})"
    if found.seeds < FEWEST_SEEDS:
        title = f"The {what}: too few seeds to tell where it is largest"
    x = alt.X("low:Q", title=[axis_title, "line: 95 % interval"]).scale(zero=False, padding=20)
    return Figure(f"gates-{quantity}", title, _intervals(rows, x, ".4f"))


def differences(pairs: Sequence[Pair]) -> list[Figure]:
    """How far two models are apart: on all reviews, where a small mark is one seed; by the length
    of the review; by category."""
    rows = [_in_points(f"{pair.b} · - {pair.a}", pair) for pair in pairs]
    kinds = ["mean of the seeds, 95 % interval", "one seed"]
    seeds = [
        {"name": row["name"], "kind": kinds[1], "difference": 100 * difference}
        for row, pair in zip(rows, pairs, strict=True)
        for difference in pair.difference_by_seed
    ]
    legend = alt.Legend(title=None, columns=1, symbolSize=110)
    shapes = alt.Scale(domain=kinds, range=["circle", "diamond"])
    marks = alt.Chart(alt.Data(values=seeds)).encode(
        x="difference:Q",
        y=alt.Y("name:N", sort=None),
        color=alt.Color("kind:N", scale=alt.Scale(domain=kinds), legend=legend),
        shape=alt.Shape("kind:N", scale=shapes, legend=legend),
        tooltip=["name:N", *_numbers("+.2f", "difference")],
    )
    marks = marks.mark_point(filled=True, size=40, opacity=1, yOffset=10)
    told = [
        f"{pair.b} {row['value']:+.2f} points against {pair.a}"
        for row, pair in zip(rows, pairs, strict=True)
        if not row["low"] <= 0 <= row["high"]
    ]
    title = f"A difference can be told in {len(told)} of {len(pairs)} pairs"
    title += f": {_listed(told)}" if told else ""
    if _too_few(pairs):
        title = "Too few seeds to tell differences in accuracy"
    lengths = [
        (pair, part, f"{part.start:,} to {part.to - 1:,} words")
        for pair in pairs
        for part in pair.by_length
    ]
    categories = [(pair, part, part.category) for pair in pairs for part in pair.by_category]
    return [
        Figure("comparisons", title, _apart(rows) + marks),
        *_differences_by("length", "By the length of the review", lengths),
        *_differences_by("category", "By category", categories),
    ]


def _differences_by(
    key: str, what: str, parts: Sequence[tuple[Pair, Part, str]]
) -> Iterator[Figure]:
    """All pairs on parts of the reviews, each with its name; none where there are no parts."""
    rows = [
        _in_points(name, part, group=f"{pair.b} · - {pair.a}", n=part.n)
        for pair, part, name in parts
    ]
    if rows:
        told = sum(not row["low"] <= 0 <= row["high"] for row in rows)
        title = f"{what}, {told} of {len(rows)} intervals exclude zero; "
        title += f"by chance alone {len(rows) / 20:.2g} would"
        if _too_few([pair for pair, *_ in parts]):
            title = f"{what}: too few seeds to tell"
        groups = list(dict.fromkeys(row["group"] for row in rows))
        yield Figure(f"comparisons-by-{key}", title, _apart(rows, groups))


def _too_few(pairs: Sequence[Pair]) -> bool:
    return min(pair.seeds for pair in pairs) < FEWEST_SEEDS


def _in_points(name: str, found: Pair | Part, **more: Any) -> dict[str, Any]:
    low, high = found.interval
    return _row(name, 100 * found.difference, (100 * low, 100 * high), **more)


def _apart(rows: Sequence[Mapping[str, Any]], groups: Sequence[str] = ()) -> Chart:
    stroke = ["line: 95 % interval"] if groups else []
    x = alt.X("low:Q", title=["difference in accuracy", "(percentage points)", *stroke])
    x = x.axis(format="+~r").scale(padding=10)
    return _upright(0) + _intervals(rows, x, "+.2f", groups)


def running() -> Figure:
    """The explorer's probability after each word: the page fills in its data and the word."""
    word = alt.param(name="word", value=0)
    placeholder = [{"word": 0, "probability": 0}, {"word": 1, "probability": 0}]
    base = alt.Chart(alt.InlineData(values=placeholder, name="words"), height=150)
    x = alt.X("word:Q", title="word").scale(nice=False, zero=False)
    line = base.mark_line(color=COLOURS[0], strokeWidth=2).add_params(word)
    line = line.encode(
        x=x.axis(format="d", tickMinStep=1),
        y=alt.Y("probability:Q").scale(domain=[0, 1]).axis(format="~%"),
    )
    rule = base.mark_rule(strokeWidth=2).encode(x="word:Q").transform_filter("datum.word === word")
    return Figure("running", "The probability after each word", line + rule)


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
