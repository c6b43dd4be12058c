"""The figures, each defined once: report.html draws them live, and files hold them as PNG and SVG.

The title of a figure states its result, in words computed from its numbers. Altair writes the
specification; vl-convert, which needs no browser, draws the files.
"""

import json
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
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
    Metrics,
    Pair,
    Part,
    Run,
    Timed,
    Tuning,
    Vanishing,
)

# Distinguishable with a red-green deficiency (Okabe and Ito 2008); the first four also have a
# contrast of at least 3 to 1 with white and with a dark page.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
# A model has the same colour in every chart.
COLOURED = ("gru", "bigru", "nn.gru", "nn.bigru", "linear", "rnn", "birnn")
FEW_CLASSES = 5
# The version that Altair writes.
VEGA_LITE = alt.SCHEMA_VERSION.removeprefix("v").rpartition(".")[0]
Chart = alt.Chart | alt.LayerChart | alt.FacetChart  # FacetChart: the declared type of a sum
Rows = Sequence[Mapping[str, Any]]
Base = Literal["true", "predicted"]
"""The class whose reviews are 100 % in a confusion matrix."""
INK = "currentColor"  # text and lines have the colour of the page around them; black in a file
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
    "range": {"category": COLOURS},  # Vega repeats them for further categories
    "text": {"color": INK},
    "rule": {"color": INK},
}


@dataclass(frozen=True)
class Figure:
    """A chart with its title; `width` in a file is in pixels, `name` has no suffix.

    Infinities and NaN become null in JSON and are not drawn.
    """

    name: str
    title: str
    chart: Chart
    width: int = 680
    wide: bool = False
    """Whether the chart is too wide for half of the page."""

    def spec(self, **properties: Any) -> dict[str, Any]:
        """The Vega-Lite specification, by default for a page, as wide as its container."""
        page = {"width": "container", "background": "transparent", "description": self.title}
        chart = self.chart.properties(**page | properties).configure(**CONFIG)
        return chart.to_dict(validate=False)  # validation takes longer than conversion

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


# The homework's names of its networks; it has no such title for the last two.
HOMEWORK_NAMES = {
    "gru": "MyGRU",
    "nn.gru": "nn.GRU",
    "bigru": "MyGRU, bidirectional",
    "nn.bigru": "nn.GRU, bidirectional",
}


def draw_run(folder: Path, run: Metrics, classes: Sequence[str], preset: str) -> None:
    """Draw loss.png, if there are losses, and confusion.png of a run.

    With more than MOST_DRAWN classes, confusion.png has the most frequent mistakes, and classes.png
    the recall of the largest classes. With the preset `homework`, the figures have the titles and
    the normalisation of the homework's (docs/homework.md).
    """
    homework = preset == "homework"
    title = f"{run.name} on {run.data.name}"
    if run.losses:
        epochs, means = np.array(run.loss_epochs), np.array(run.losses)
        title_of_loss = f"Training loss: {title}"
        if homework:  # the mean of the few iterations left at the end of an epoch is mostly noise
            whole = np.isclose(np.diff(epochs, prepend=0), epochs[0])
            epochs, means = epochs[whole], means[whole]
            title_of_loss = f"Loss (using {HOMEWORK_NAMES.get(run.model, run.model)})"
        curves = {run.model: (epochs.tolist(), means.tolist())}
        loss_curves(curves, title_of_loss).save(folder / "loss.png")
    correct = "" if homework else f"{title}: {run.accuracy:.2%} correct"
    if len(classes) > MOST_DRAWN:
        largest("classes", correct, run, classes).save(folder / "classes.png")
    base: Base = "predicted" if homework else "true"
    _confusion_of("confusion", correct, run, classes, base).save(folder / "confusion.png")


def _chart(rows: Rows, **properties: Any) -> alt.Chart:
    return alt.Chart(alt.Data(values=rows), **properties)


def _tooltip(*fields: str, **formats: str) -> list[alt.Tooltip]:
    """The fields of a tooltip; those with a format are numbers."""
    numbers = (alt.Tooltip(f"{name}:Q", format=form) for name, form in formats.items())
    return [*map(alt.Tooltip, fields), *numbers]


def _row(name: str, value: float, interval: Interval, **more: Any) -> dict[str, Any]:
    """A row of `_intervals`."""
    return {"name": name, "value": value, "low": interval[0], "high": interval[1], **more}


def _intervals(rows: Rows, x: alt.X, form: str, colours: alt.Scale | None = None) -> Chart:
    """A line per name, with a dot at the value and a stroke from low to high.

    form: the number format of the tooltip, which also has "n" if the rows do. Rows may have a
    "group", which determines their colour and their position among those of the same name; without
    groups, `colours` are those of the names. Labels break at " · ".
    """
    names = list(dict.fromkeys(row["name"] for row in rows))
    groups = list(dict.fromkeys(row["group"] for row in rows if "group" in row))
    broken = "split(datum.label, ' · ')"
    axis = alt.Axis(grid=bool(groups), labelExpr=broken, labelLimit=140)
    formats = {"value": form, "low": form, "high": form, **({"n": ","} if "n" in rows[0] else {})}
    base = _chart(rows, height=(12 * len(groups) + 16 if groups else 40) * len(names)).encode(
        y=alt.Y("name:N", sort=names, title=None, axis=axis),
        tooltip=_tooltip("name:N", *(["group:N"] if groups else []), **formats),
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


def _reference(value: float) -> alt.Chart:
    """A dashed vertical line at the value that stands for no difference."""
    return _chart([{"x": value}]).mark_rule(strokeDash=[4, 4]).encode(x="x:Q")


def _range(*ends: str) -> str:
    return " to ".join(dict.fromkeys(ends))


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def accuracy(runs: Sequence[Run], reviews: int) -> Figure:
    """The accuracies of the runs on this number of test reviews."""
    best, *others = sorted(runs, key=lambda run: -run.accuracy)
    rows = [
        _row(run.name, run.accuracy, run.accuracy_interval, label=f"{run.accuracy:.2%}")
        for run in (best, *others)
    ]
    ends = _range(*(f"{row['label']} ({row['name']})" for row in (rows[-1], rows[0])))
    title = f"{ends} of {reviews:,} reviews are classified correctly"
    if others and best.accuracy_interval[0] > others[0].accuracy_interval[1]:
        title += f"; the 95 % interval of {best.name} is above that of the next"
    elif others:
        title += f"; {best.name} and {others[0].name} cannot be told apart: "
        title += "their 95 % intervals overlap"
    x = alt.X("low:Q", title="accuracy, 95 % interval (Wilson)")
    x = x.axis(format="~%", tickCount=8).scale(zero=False, padding=20)
    label = _chart(rows).mark_text(dy=-11)
    label = label.encode(x="value:Q", y=alt.Y("name:N", sort=None), text="label:N")
    colours = _colours([row["name"] for row in rows])
    return Figure("accuracy", title, _intervals(rows, x, ".2%", colours) + label)


def losses(runs: Sequence[Run]) -> Figure:
    """The training losses of the runs."""
    order = sorted(runs, key=lambda run: run.losses[-1])
    ends = _range(*(f"{run.losses[-1]:.3f} ({run.name})" for run in (order[0], order[-1])))
    curves = {run.name: (run.loss_epochs, run.losses) for run in runs}
    return loss_curves(curves, f"Training ends at a loss of {ends}")


def loss_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str
) -> Figure:
    """Training losses. curves: name -> (epochs at each point, mean loss since the previous point).

    If there are several curves, each can be hidden. The chart can be zoomed; the tooltip shows the
    nearest point.
    """
    rows = [
        {"name": name, "epochs": x, "loss": y}
        for name, points in curves.items()
        for x, y in zip(*points, strict=True)
    ]
    end = round(max(x[-1] for x, _ in curves.values()))
    color, dash = _styles(list(curves))
    zoom = alt.selection_interval(
        name="zoom", bind="scales", encodings=["x"], zoom="wheel![event.ctrlKey]"
    )
    nearest = alt.selection_point(
        name="nearest", on="pointerover", nearest=True, clear="pointerout", empty=False
    )
    base = _chart(rows, height=340).encode(
        x=alt.X("epochs:Q", title="epochs").scale(domain=[0, end], nice=False),
        y=alt.Y("loss:Q", title="mean cross-entropy loss (nats)").scale(zero=False),
        color=color,
    )
    line = base.mark_line(strokeWidth=2.5, clip=True).encode(strokeDash=dash).add_params(zoom)
    point = base.mark_point(filled=True, size=70, clip=True).add_params(nearest)
    point = point.encode(
        opacity=alt.condition(nearest, alt.value(1), alt.value(0)),
        tooltip=_tooltip("name:N", epochs=".2f", loss=".5f"),
    )
    chart = line + point
    if len(curves) > 1:
        boxes = {f"show_{i}": name for i, name in enumerate(curves)}
        shown = (f"(datum.name === {json.dumps(name)} && {box})" for box, name in boxes.items())
        chart = chart.transform_filter(" || ".join(shown)).add_params(
            *(
                alt.param(name=box, value=True, bind=alt.binding_checkbox(name=name))
                for box, name in boxes.items()
            )
        )
    return Figure("loss", title, chart)


def _colours(names: Sequence[str]) -> alt.Scale:
    """The colours of "gru", "torch gru" or "GRU, trained", which are those of the model.

    Models that COLOURED does not name have the last colours.
    """
    models = [name.partition(",")[0].rpartition(" ")[2].lower() for name in names]
    others = dict.fromkeys(model for model in models if model not in COLOURED)
    colours = dict(zip(COLOURED, COLOURS, strict=True))
    colours |= zip(others, COLOURS[::-1] * len(models), strict=False)
    return alt.Scale(domain=names, range=[colours[model] for model in models])


def _styles(names: Sequence[str], columns: int = 2) -> tuple[alt.Color, alt.StrokeDash]:
    """The colour and the dashes of each line; several lines have a legend.

    The curves of the twins coincide, so those of JAX are dashed; so are those of untrained models.
    """
    legend = None
    if names[1:]:
        legend = alt.Legend(title=None, symbolType="stroke", symbolOpacity=1, columns=columns)
    dashes = [[5, 3] if name.startswith("jax") or "untrained" in name else [1, 0] for name in names]
    return (
        alt.Color("name:N", scale=_colours(names), legend=legend),
        alt.StrokeDash("name:N", legend=legend).scale(domain=names, range=dashes),
    )


def reliability(runs: Sequence[Run]) -> Figure:
    """The accuracy of the predictions of the runs by their probability."""
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
    y = alt.Y("accuracy:Q", title="accuracy", scale=scale).axis(format="~%")
    color, dash = _styles([run.name for run in runs])
    base = _chart(rows, height=340).encode(x=x, y=y, color=color)
    point = base.mark_point(filled=True, opacity=0.8).encode(
        size=alt.Size("count:Q", legend=None),
        tooltip=_tooltip("name:N", confidence=".1%", accuracy=".1%", count=","),
    )
    line = base.mark_line(strokeWidth=2).encode(strokeDash=dash)
    perfect = _chart([{"confidence": end, "accuracy": end} for end in ends]).encode(x=x, y=y)
    perfect = perfect.mark_line(strokeDash=[2, 4], color=INK, opacity=0.6)
    return Figure("reliability", title, perfect + line + point)


def confusion_of_run(run: Run, classes: Sequence[str]) -> Figure:
    """The confusion matrix of a run or, of more than MOST_DRAWN classes, the frequent mistakes.

    The title names the most frequent mistake.
    """
    title = f"{run.name}: {run.accuracy:.2%} correct"
    if run.most_mistaken:
        true, predicted, count = run.most_mistaken[0]
        title += f"; {count:,} of {run.recalls[true][0]:,} {classes[true]} "
        title += f"taken for {classes[predicted]}"
    return _confusion_of(f"confusion-{run.framework}-{run.model}", title, run, classes)


def _confusion_of(
    name: str, title: str, run: Run, classes: Sequence[str], base: Base = "true"
) -> Figure:
    if len(classes) <= MOST_DRAWN:
        return confusion(name, title, run.confusion, classes, base)
    rows = [
        {
            "name": f"{classes[true]} → {classes[predicted]}",
            "true": classes[true],
            "predicted": classes[predicted],
            "value": count,
            "label": f"{count:,} of {run.recalls[true][0]:,}",
        }
        for true, predicted, count in run.most_mistaken[:MOST_DRAWN]
    ]
    what = f"the {len(rows)} most frequent mistakes among {len(classes):,} classes"
    x = alt.X("value:Q", title=["reviews (true class → predicted class)", what])
    x = x.axis(tickMinStep=1, format=",")
    chart = _bars(run, rows, x, ["true:N", "predicted:N", "label:N"])
    return Figure(name, title, chart, wide=True)


def largest(name: str, title: str, run: Run, classes: Sequence[str]) -> Figure:
    """The recall of the classes with the most test reviews, at most MOST_DRAWN."""
    rows = [
        {"name": classes[at], "value": recall, "label": f"{recall:.0%} of {count:,}"}
        for at in run.by_size[:MOST_DRAWN]
        for count, recall in [run.recalls[at]]
    ]
    what = f"recall of the {len(rows)} largest of {len(classes):,} classes"
    x = alt.X("value:Q", title=what).scale(domain=[0, 1]).axis(format="~%")
    return Figure(name, title, _bars(run, rows, x, ["name:N", "label:N"]))


def _bars(run: Run, rows: Rows, x: alt.X, tooltip: Sequence[str]) -> Chart:
    """A bar for each row, in their order: a "name", a "value" and the "label" at its end."""
    y = alt.Y("name:N", sort=None, title=None, axis=alt.Axis(labelLimit=360))
    base = _chart(rows, height=18 * max(len(rows), 1)).encode(x=x, y=y, tooltip=tooltip)
    label = base.mark_text(align="left", dx=4).encode(text="label:N")
    return base.mark_bar(color=_colours([run.model])["range"][0]) + label


def confusion(
    name: str,
    title: str,
    matrix: Sequence[Sequence[int]],
    classes: Sequence[str],
    base: Base = "true",
) -> Figure:
    """A confusion matrix (row: true class, column: predicted class), counts and shares.

    The homework's base is the predicted class.
    """
    counts = np.asarray(matrix)
    few = len(classes) <= FEW_CLASSES  # with more, a cell has only room for the share
    shares = counts / np.maximum(counts.sum(axis=1 if base == "true" else 0, keepdims=True), 1)
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
    chart = _chart(rows, height=size * len(classes)).encode(
        x=alt.X("predicted:N", sort=None, title="predicted class", axis=axis),
        y=alt.Y("true:N", sort=None, title="true class"),
        tooltip=_tooltip("true:N", "predicted:N", "count:Q", share=".1%"),
    )
    what = [f"share of the {base} class", *([] if few else ["(numbers: in %)"])]
    legend = alt.Legend(title=what, format="~%", gradientLength=150)
    scale = alt.Scale(domain=[0, 1], range=["#ffffff", "#004070"], interpolate="rgb")
    cell = chart.mark_rect(stroke=INK, strokeOpacity=0.3)
    cell = cell.encode(color=alt.Color("share:Q", scale=scale, legend=legend))
    label = chart.mark_text(dy=-6 if few else 0, fontSize=12).encode(
        text="label:N",
        # On either side of this share, the contrast is at least 4.5 to 1.
        color=alt.condition("datum.share > 0.7", alt.value("white"), alt.value("black")),
        opacity=alt.condition(f"width < {18 * len(classes)}", alt.value(0), alt.value(1)),
    )
    return Figure(name, title, cell + label, size * len(classes) + 60, wide=not few)


def ratios(
    name: str, start: str, rows: Sequence[Timed] | Sequence[Latency], reference: str, line: str
) -> Figure:
    """The speed of every implementation relative to the reference, on every task.

    start: the beginning of the title. line: the meaning of the stroke.
    """
    few = len({row.name for row in rows}) <= len(COLOURS)  # more tasks are grouped by batch size
    of_contender: dict[str, list[float]] = {}
    timed: dict[tuple[str, str], list[Timed | Latency]] = {}
    for row in rows:
        of_contender.setdefault(row.contender, []).append(row.ratio)
        timed.setdefault((row.contender, row.name if few else f"B {row.B}"), []).append(row)
    medians = {each: float(np.median(of_tasks)) for each, of_tasks in of_contender.items()}
    values = []
    for (each, group), of_group in sorted(timed.items(), key=lambda item: -medians[item[0][0]]):
        value = float(np.median([row.ratio for row in of_group]))
        ends = [end for row in of_group for end in row.ratios]
        label = each.replace(", ", " · ")
        values.append(_row(label, value, (min(ends), max(ends)), group=group))
    best = max(medians, key=medians.__getitem__)
    title = f"{start}{best} is the fastest: {medians[best]:.2f} times {reference}"
    if len({row.name for row in rows}) > 1:
        title += f", the median of {len(of_contender[best])} tasks"
    stroke = f"line: {line}" if few else "dot: median, line: all tasks of that B"
    x = alt.X("low:Q", title=[f"times {reference} (logarithmic)", stroke])
    x = x.scale(type="log", base=2, nice=False, padding=20)
    x = x.axis(format="~r", values=[2.0**n for n in range(-10, 11)])
    return Figure(name, title, _reference(1) + _intervals(values, x, ".2f"))


def trials(tuning: Tuning) -> Figure:
    """The trials in order, and the lowest loss so far."""
    count = len(tuning.trials)
    title = f"No trial of {count} was completed"
    if best := tuning.best:
        title = f"Of {count} trials, {best.number} has the lowest validation loss, {best.loss:.4g}"
        begun = next((t for t in tuning.trials if t.given and t is not best), None)
        if begun and begun.state == "complete":
            title += f"; the loss of the initial options is {begun.loss:.4g}"
    for state, what in (("pruned", "were pruned"), ("failed", "failed")):
        if count := sum(each.state == state for each in tuning.trials):
            title += f"; {count} {what}"
    x = alt.X("number:Q", title="trial", axis=alt.Axis(tickMinStep=1, format="d"))
    line = _chart(_trial_rows(tuning)).mark_line(interpolate="step-after", color=COLOURS[1])
    line = line.encode(x=x, y=alt.Y("lowest:Q", scale=alt.Scale(zero=False)))
    return Figure("tuning", title, line + _loss_points(tuning, x))


def searched(tuning: Tuning) -> list[Figure]:
    """The loss by each option of the search space."""
    figures = []
    for name in tuning.trials[0].options:
        is_rate, label = name == "learning_rate", name.replace("_", " ")
        title = label.capitalize()
        if best := tuning.best:
            title += f": {best.options[name]:.3g} in the best trial"
        scale = alt.Scale(type="log") if is_rate else alt.Scale(zero=False)
        axis = alt.Axis(tickCount=5, format="~g" if is_rate else "~r")
        chart = _loss_points(tuning, alt.X(f"{name}:Q", title=label, scale=scale, axis=axis))
        figures.append(Figure(f"tuning-{name.replace('_', '-')}", title, chart, width=420))
    return figures


def _trial_rows(tuning: Tuning) -> Rows:
    """The trials in order, with the lowest loss so far."""
    trials = sorted(tuning.trials, key=lambda each: each.number)
    complete = (trial.loss if trial.state == "complete" else math.inf for trial in trials)
    return [
        {"number": t.number, "state": t.state, "loss": t.loss, **t.options, "lowest": lowest}
        for t, lowest in zip(trials, accumulate(complete, min), strict=True)
    ]


def _loss_points(tuning: Tuning, x: alt.X) -> alt.Chart:
    """A mark per trial with a loss; the marks of far higher losses are at the upper edge."""
    rows = [row for row in _trial_rows(tuning) if row["loss"] < math.inf]
    values = sorted(row["loss"] for row in rows) or [0.0, 1.0]
    lowest, median, highest = values[0], values[len(values) // 2], values[-1]
    upper = min(lowest + 4 * (median - lowest), highest) if median > lowest else highest
    domain = [lowest - 0.05 * (upper - lowest), upper]
    scale = alt.Scale(zero=False, domain=domain, clamp=True, nice=False)
    marks = {"complete": "circle", "pruned": "triangle-up", "failed": "cross"}
    states = [state for state in marks if any(row["state"] == state for row in rows)]
    shapes = alt.Scale(domain=states, range=[marks[state] for state in states])
    formats = dict.fromkeys(("number", *tuning.trials[0].options, "lowest", "loss"), ".4~g")
    return (
        _chart(rows, height=220)
        .mark_point(size=60, opacity=0.9, strokeWidth=2)
        .encode(
            x=x,
            y=alt.Y("loss:Q", title="validation loss", scale=scale),
            shape=alt.Shape("state:N", scale=shapes, legend=alt.Legend(title=None, symbolSize=80)),
            color=alt.value(COLOURS[0]),
            tooltip=_tooltip("state:N", **formats),
        )
    )


def vanishing(results: Vanishing) -> Figure:
    """The gradient norm by the distance to the end. Zeros, which have no logarithm, are omitted."""
    distances = results.distances
    rows = [
        {"name": s.name, "distance": distance, "norm": median, "low": low or None, "high": high}
        for s in results.series
        for distance, median, low, high in zip(distances, s.median, s.low, s.high, strict=True)
        if median > 0
    ]
    folds = [f"{_fold(s.median[0], s.median[-1])} in the {s.name}" for s in results.series]
    title = f"From {distances[0]} to {distances[-1]} words before the end the gradient "
    title += _listed(folds)
    what = [
        "distance to the end of the review (words)",
        f"line: median, band: quartiles, of {results.reviews:,} reviews",
    ]
    color, dash = _styles([series.name for series in results.series], columns=1)
    base = _chart(rows, height=340).encode(x=alt.X("distance:Q", title=what), color=color)
    band = base.mark_area(opacity=0.15).encode(y=alt.Y("low:Q").scale(type="log"), y2="high:Q")
    line = base.mark_line(strokeWidth=2.5, point=len(distances) <= 30).encode(
        strokeDash=dash,
        y=alt.Y("norm:Q", title="norm of dLoss/dh")
        .scale(type="log")
        .axis(format="~e", tickCount=8),
        tooltip=_tooltip("name:N", "distance:Q", norm=".2e", low=".2e", high=".2e"),
    )
    return Figure("vanishing-gradients", title, band + line)


def _fold(first: float, last: float) -> str:
    """The change from first to last, such as "shrinks 6.69-fold" or "grows 10^9-fold"."""
    if not last > 0:
        return "shrinks to nothing"
    factor, verb = (first / last, "shrinks") if first >= last else (last / first, "grows")
    amount = f"{factor:.3g}" if factor < 1000 else f"10^{math.log10(factor):.0f}"
    return f"{verb} {amount}-fold"


def gates(results: Gates) -> list[Figure]:
    """The gates at each group of words; none in a language other than that of the stop words."""
    if not results.groups:
        return []
    return [
        _gate(results, "z", "update gate z", "mean of z"),
        _gate(results, "change", "change of the state", "change relative to the state's norm"),
    ]


def _gate(results: Gates, quantity: str, name: str, axis_title: str) -> Figure:
    rows = [
        _row(each.group, getattr(each, quantity), getattr(each, f"{quantity}_interval"), n=each.n)
        for each in results.groups
    ]
    low, high = (of(rows, key=lambda row: row["value"]) for of in (min, max))
    title = f"The {name} is largest at {high['name']} ({high['value']:.3g}) "
    title += f"and smallest at {low['name']} ({low['value']:.3g})"
    if results.seeds < FEWEST_SEEDS:
        title = f"The {name}: too few seeds to tell where it is largest"
    x = alt.X("low:Q", title=[axis_title, "line: 95 % interval"]).scale(zero=False, padding=20)
    return Figure(f"gates-{quantity}", title, _intervals(rows, x, ".4f"))


def differences(pairs: Sequence[Pair]) -> list[Figure]:
    """The differences of the pairs of models: on all reviews, where a small mark is one seed; by
    the length of the review; by category."""
    rows = [_difference(f"{pair.b} · - {pair.a}", pair) for pair in pairs]
    kinds = ["mean of the seeds, 95 % interval", "one seed"]
    seeds = [
        {"name": row["name"], "kind": kinds[1], "difference": 100 * difference}
        for row, pair in zip(rows, pairs, strict=True)
        for difference in pair.difference_by_seed
    ]
    legend = alt.Legend(title=None, columns=1, symbolSize=110)
    shapes = alt.Scale(domain=kinds, range=["circle", "diamond"])
    marks = _chart(seeds).mark_point(filled=True, size=40, opacity=1, yOffset=10)
    marks = marks.encode(
        x="difference:Q",
        y=alt.Y("name:N", sort=None),
        color=alt.Color("kind:N", scale=alt.Scale(domain=kinds), legend=legend),
        shape=alt.Shape("kind:N", scale=shapes, legend=legend),
        tooltip=_tooltip("name:N", difference="+.2f"),
    )
    clear = [
        f"{pair.b} {row['value']:+.2f} points against {pair.a}"
        for row, pair in zip(rows, pairs, strict=True)
        if _excludes_zero(row)
    ]
    title = f"A difference can be told in {len(clear)} of {len(pairs)} pairs"
    title += f": {_listed(clear)}" if clear else ""
    if _too_few(pairs):
        title = "Too few seeds to tell differences in accuracy"
    return [
        Figure("comparisons", title, _difference_intervals(rows) + marks),
        *_differences_by("length", "By the length of the review", pairs),
        *_differences_by("category", "By category", pairs),
    ]


def _differences_by(key: str, what: str, pairs: Sequence[Pair]) -> Iterator[Figure]:
    """The differences of all pairs on each part of the reviews, if there are parts."""
    rows = [
        _difference(part.name, part, group=f"{pair.b} · - {pair.a}", n=part.n)
        for pair in pairs
        for part in getattr(pair, f"by_{key}")
    ]
    if rows:
        title = f"{what}, {sum(map(_excludes_zero, rows))} of {len(rows)} intervals exclude zero; "
        title += f"by chance alone {len(rows) / 20:.2g} would"
        if _too_few(pairs):
            title = f"{what}: too few seeds to tell"
        yield Figure(f"comparisons-by-{key}", title, _difference_intervals(rows))


def _too_few(pairs: Sequence[Pair]) -> bool:
    return min(pair.seeds for pair in pairs) < FEWEST_SEEDS


def _excludes_zero(row: Mapping[str, Any]) -> bool:
    return not row["low"] <= 0 <= row["high"]


def _difference(name: str, difference: Pair | Part, **more: Any) -> dict[str, Any]:
    """A row of `_intervals`, in percentage points."""
    low, high = difference.interval
    return _row(name, 100 * difference.difference, (100 * low, 100 * high), **more)


def _difference_intervals(rows: Rows) -> Chart:
    stroke = ["line: 95 % interval"] if "group" in rows[0] else []
    x = alt.X("low:Q", title=["difference in accuracy", "(percentage points)", *stroke])
    return _reference(0) + _intervals(rows, x.axis(format="+~r").scale(padding=10), "+.2f")


def running() -> Figure:
    """The explorer's probability after each word; the page sets the data and the current word."""
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
