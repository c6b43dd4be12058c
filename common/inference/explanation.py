"""Explanations of a trained model's answer, word by word: the explain programs and the explorer."""

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from jaxtyping import Float
from rich import box
from rich.console import Console
from rich.progress import track
from rich.style import Style
from rich.table import Column, Table
from rich.text import Text

from common import files
from common.errors import InputError, exit_on_input_error
from common.inference.model import Saved, load
from common.inference.predictor import Framework
from common.linear import run as linear
from common.training.options import Device, parse_options
from common.training.run_directory import framework_of

PATIENCE = 50  # the number of batches from which a progress bar is shown
# The quantities by which words can be tinted, and their descriptions.
MEASURES = {
    "z": "update gate: how much of the candidate is let in, the mean over the units",
    "change": "how far the word moves the state: the norm of the difference",
    "gradient": "gradient x input of the predicted class's logit",
    "leave_out": "how much the predicted class's logit falls when the word is left out",
}
# Distinguishable without red-green vision (Okabe and Ito 2008).
FOR, AGAINST = (0, 114, 178), (213, 94, 0)
UNREAD = " (grey, without numbers)"


@dataclasses.dataclass(frozen=True)
class ExplainOptions:
    """Explain a trained model's answer word by word: gates, state changes, influence.

    For a model with several layers, the gates and states are those of the last layer.
    """

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """The run directory of a trained model, of either framework."""
    text: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
    """The text to classify."""
    by: str | None = None
    """The quantity by which the words are tinted: z (mean update gate) or another gate of the
    cell, change (of the state), gradient (times input, of the predicted class's logit) or leave_out
    (decrease of that logit without the word). The default is the first gate of the cell, z for a
    GRU, or change for a cell without gates. The words of a linear model are tinted by their
    contributions."""
    json: Path | None = None
    """Write all values to this JSON file as well."""
    checkpoint: Saved | None = None
    """Read the last checkpoint of a run, which may be unfinished: its last parameters, or the best
    ones by the validation loss."""
    device: Device = "auto"
    """The device of the computation: auto, cpu, cuda or mps."""


def main(framework: Framework) -> None:
    """The command line of `python -m torch_impl.explain` and `python -m jax_impl.explain`."""
    with exit_on_input_error():
        program = f"python -m {framework.__name__.partition('.')[0]}.explain"
        options = parse_options(ExplainOptions, program)
        if framework_of(options.run_dir) == linear.FRAMEWORK:
            _explain_linear(options)
            return
        model = load(framework, options.run_dir, options.device, options.checkpoint)
        measures = [*model.gates, *(name for name in MEASURES if name != "z")]
        by = options.by or measures[0]
        if by not in measures:
            cell = model.run.model.cell
            raise InputError(f"--by {by}: expected, of the {cell}, {', '.join(measures)}")
        explanation = model.explain(options.text, track=_progress)
        if options.json is not None:
            about = {"run_dir": options.run_dir, "text": options.text, "classes": model.classes}
            files.write_json(options.json, about | explanation)
        (known,) = model.encode([options.text])
        _print(model.classes, model.gates, explanation, by, len(known))


def _explain_linear(options: ExplainOptions) -> None:
    """Print the contribution of each word to a linear model's answer."""
    for name, value in (("checkpoint", options.checkpoint), ("by", options.by)):
        if value is not None:
            raise InputError(f"--{name} {value}: {options.run_dir} is linear and has none")
    run = linear.load(options.run_dir)
    explanation = run.explain(options.text)
    if options.json is not None:
        about = {"run_dir": options.run_dir, "text": options.text, "classes": run.classes}
        files.write_json(options.json, about | explanation)
    console = Console(width=None if sys.stdout.isatty() else 120)
    print_line = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    print_line(f"{explanation['predicted']}, probability {explanation['probability']:.4f}")
    words, written = explanation["words"], len(explanation["all_words"])
    left_out = f"{written - len(words):,} of them not in the vocabulary and left out"
    print_line(f"{written:,} words, {left_out}{UNREAD if written > len(words) else ''}")
    if not words:
        return
    weights = np.array(explanation["contribution"])
    table = Table(Column("word", overflow="fold"), box=box.SIMPLE_HEAD, padding=0)
    table.add_column("contribution", justify="right")
    _add_rows(table, explanation, _tinted(words, weights, signed=True), [weights.tolist()], first=0)
    console.print(table)
    print_line(
        "contribution: what the n-grams that end at a word add to the predicted class's margin"
    )
    print_line(
        f"blue: for the predicted class, orange: against it; full tint: {abs(weights).max():.3f}"
    )


def _progress(chunks: Iterable[Any], count: int) -> Iterable[Any]:
    """A progress bar, if there are many batches."""
    console = Console(stderr=True)
    quick = not sys.stderr.isatty() or count < PATIENCE
    label = "leaving out a word at a time"
    return track(chunks, label, count, console=console, transient=True, disable=quick)


def _print(
    classes: Sequence[str],
    gates: Sequence[str],
    explanation: Mapping[str, Any],
    by: str,
    known: int,
) -> None:
    """A table with one line per word and, on a terminal with colours, the tinted text."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    print_line = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    print_line(f"{explanation['predicted']}, probability {explanation['probability']:.4f}")
    words, written = explanation["words"], len(explanation["all_words"])
    print_line(
        f"{written:,} words, {written - known:,} of them without a vector and so left out"
        + (UNREAD if written > known else "")
        + (f"; read: the last {len(words):,}" if len(words) < known else "")
    )
    if not words:
        print_line("no word to explain: this is the answer to an empty review")
        return
    sides = {
        name: each if isinstance(each, dict) else {"": each} for name, each in explanation.items()
    }
    columns = {
        f"{name} {side}".strip(): numbers
        for name in (*gates, "change")
        for side, numbers in sides.get(name, {}).items()
    }
    columns |= {
        "gradient x input": explanation["gradient"],
        "leave-one-out": explanation["leave_out"],
    }
    counted_class = classes[1] if len(classes) == 2 else explanation["predicted"]
    columns[f"running P({counted_class})"] = explanation["running"]
    weights = np.mean(list(sides[by].values()), axis=0)
    signed = by in ("gradient", "leave_out")
    tinted = _tinted(words, weights, signed=signed)
    table = Table(Column("word", overflow="fold"), box=box.SIMPLE_HEAD, padding=0)
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    first = explanation["places"][0] if len(words) < known else 0
    shown = _add_rows(table, explanation, tinted, [*columns.values()], first=first)
    console.print(table)
    if console.color_system:
        console.print(Text(" ").join(shown))
    print_line(f"tinted by {by}: {MEASURES.get(by, 'a gate of the cell: the mean over the units')}")
    if signed:
        strongest = abs(weights).max()
        print_line(f"blue: for the predicted class, orange: against it; full tint: {strongest:.3f}")
    else:
        print_line(f"no tint: {weights.min():.3f}, full tint: {weights.max():.3f}")


def _add_rows(
    table: Table,
    explanation: Mapping[str, Any],
    tinted: Sequence[Text],
    columns: Sequence[Sequence[float]],
    *,
    first: int,
) -> list[Text]:
    """Add a row for each word of the text from the first to show. Words that the model does not
    read are grey and have no numbers. Returns the words."""
    rows = dict(zip(explanation["places"], zip(tinted, *columns, strict=True), strict=True))
    shown = []
    for place in range(first, len(explanation["all_words"])):
        word, *numbers = rows.get(place, [Text(explanation["all_words"][place], "bright_black")])
        table.add_row(word, *(f"{number:.3f}" for number in numbers))
        shown.append(word)
    return shown


def _tinted(words: Sequence[str], weights: Float[np.ndarray, " n"], *, signed: bool) -> list[Text]:
    """The words on backgrounds from white to a full colour, with letters of sufficient contrast."""
    low = 0.0 if signed else weights.min()
    shares = (weights - low) / (abs(weights - low).max() or 1.0)
    tinted = []
    for word, share in zip(words, shares, strict=True):
        colour = FOR if share >= 0 else AGAINST
        red, green, blue = (round(255 - abs(share) * (255 - part)) for part in colour)
        # Luminance as in Rec. 601.
        letters = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else "black"
        tinted.append(Text(word, Style(color=letters, bgcolor=f"rgb({red},{green},{blue})")))
    return tinted
