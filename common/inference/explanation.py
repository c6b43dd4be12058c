"""Why a trained model answered as it did, word by word: both twins' explain, and the explorer."""

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from jaxtyping import Float, Int
from rich import box
from rich.console import Console
from rich.progress import track
from rich.style import Style
from rich.table import Column, Table
from rich.text import Text
from scipy.special import softmax

from common import files
from common.data.batches import Shape
from common.data.text import clean, tokenize
from common.errors import InputError, exit_on_input_error
from common.inference.prediction import encode, load_learner, questions
from common.params import DIRECTIONS
from common.training.learner import Framework, Learner, predict
from common.training.options import Device, parse_options
from common.training.run_directory import Run, load_run

ROWS = 64  # reviews in a batch of questions
PATIENCE = 2_000_000  # so many words to read, padding counted, take seconds
# What a word can be tinted by, and what that says.
MEASURES = {
    "z": "update gate: how much of the candidate is let in, the mean over the units",
    "change": "how far the word moves the state: the norm of the difference",
    "gradient": "gradient x input of the predicted class's logit",
    "leave_out": "how much the predicted class's logit falls when the word is left out",
}
# Told apart by people who confuse red and green too (Okabe and Ito 2008).
FOR, AGAINST = (0, 114, 178), (213, 94, 0)


@dataclasses.dataclass(frozen=True)
class ExplainOptions:
    """Explain a trained model's answer word by word: gates, state changes, influence.

    Of a model with several layers, the gates and states are those of the last one.
    """

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """The run directory of a trained model, of either framework."""
    text: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
    """The text to classify."""
    by: Literal["z", "change", "gradient", "leave_out"] = "z"
    """What the words are tinted by: z (mean update gate), change (of the state), gradient (x input,
    of the predicted class's logit) or leave_out (fall of that logit when the word is left out)."""
    json: Path | None = None
    """Write everything to this file, too."""
    device: Device = "auto"
    """Where to compute: auto, cpu, cuda or mps."""


def main(framework: Framework) -> None:
    """The command line of `python -m torch_impl.explain` and `python -m jax_impl.explain`."""
    with exit_on_input_error():
        program = f"python -m {framework.__name__.partition('.')[0]}.explain"
        options = parse_options(ExplainOptions, program)
        if not options.text.strip():
            raise InputError("the text is empty")
        run = load_run(options.run_dir)
        if options.by == "z" and run.model.cell == "rnn":
            raise InputError("--by z: an RNN has no gates; tint by change, gradient, leave_out")
        written = tokenize(clean(options.text))
        (known,) = encode(run, [written])
        (found,) = explain(framework, run, [known], options.device)
        if options.json is not None:
            about = {"run_dir": options.run_dir, "text": options.text, "classes": run.classes}
            files.write_json(options.json, about | found)
        _print(run, found, options.by, len(written), len(known))


def explain(
    framework: Framework,
    run: Run,
    texts: Sequence[Int[np.ndarray, " words"]],
    device: Device = "auto",
    dtype: str = "float32",
) -> list[dict[str, Any]]:
    """Explain the answer to each text (ids of words in run.vocabulary), ready for JSON.

    Each text gives a dict with
        words        those that the model reads: the last max_length of the known ones
        predicted    the class, probability that class's probability
        z, r         of a GRU: the mean over the units of update and reset gate at each word
        change       the norm of the difference that the word makes to the state
        gradient     gradient x input of the predicted class's logit
        leave_out    how much that logit falls when the word is left out
        running      the probability of the second class (of more than two classes: of the
                     predicted one), had the text ended with this word
    z, r and change are of the last layer; with two directions they are dicts, forward and backward.
    All others are lists with an entry a word, so empty where no word is known.
    dtype: float64 works where the framework computes in it (in JAX, with its x64 mode on).
    """
    limit = run.options.max_length
    texts = [text[-limit:] if limit else text for text in texts]
    learner = load_learner(framework, run, device, dtype)
    # One shape fits all that is asked, so that JAX compiles once.
    shape = Shape(max(1, *map(len, texts)), max(len(np.unique(np.concatenate(texts))), 1))
    return [_explain(learner, run, text, shape) for text in texts]


def _explain(
    learner: Learner, run: Run, text: Int[np.ndarray, " n"], shape: Shape
) -> dict[str, Any]:
    """What `explain` returns of one text."""
    n = len(text)
    without = (np.delete(text, i) for i in range(n))
    up_to = (text[: i + 1] for i in range(n))
    logits = _logits(learner, run, chain([text], without, up_to), 2 * n + 1, shape)
    probabilities = softmax(logits.astype(np.float64), axis=1)
    best = int(logits[0].argmax())
    running = 1 if len(run.classes) == 2 else best

    (batch,) = questions(run, [text], 1, np.array([best]), shapes=[shape]).epoch()
    insides = learner.explain(batch)
    layer = {name: insides[name][:, :n, 0].mean(axis=-1) for name in "zr" if name in insides}
    states, start = insides["states"][:, :n, 0], insides["states"].dtype.type(0)
    moves = [np.diff(states[0], axis=0, prepend=start)]
    moves += [np.diff(backward, axis=0, append=start) for backward in states[1:]]
    layer["change"] = np.linalg.norm(moves, axis=-1)
    return {
        "words": [run.vocabulary[word] for word in text.tolist()],
        "predicted": run.classes[best],
        "probability": float(probabilities[0, best]),
        **{
            name: values[0].tolist()
            if len(values) == 1
            else dict(zip(DIRECTIONS, values.tolist(), strict=True))
            for name, values in layer.items()
        },
        "gradient": insides["influence"][:n, 0].tolist(),
        "leave_out": (logits[0, best] - logits[1 : n + 1, best]).tolist(),
        "running": probabilities[n + 1 :, running].tolist(),
    }


def _logits(
    learner: Learner,
    run: Run,
    texts: Iterator[Int[np.ndarray, " words"]],
    count: int,
    shape: Shape,
) -> Float[np.ndarray, "count C"]:
    """The logits of many texts, never all of them in memory; a progress bar where it takes long."""
    found = []
    bar = track(
        range(0, count, ROWS),
        "leaving out a word at a time",
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty() or count * shape.steps < PATIENCE,
    )
    for start in bar:
        chunk = list(islice(texts, min(ROWS, count - start)))
        found.append(predict(learner, questions(run, chunk, ROWS, shapes=[shape]))[0])
    return np.concatenate(found)


def _print(run: Run, found: Mapping[str, Any], by: str, written: int, known: int) -> None:
    """A table with a line a word and, where there is colour, the text itself, tinted."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    say(f"{found['predicted']}, probability {found['probability']:.4f}")
    words = found["words"]
    say(
        f"{written:,} words, {written - known:,} of them without a vector and so left out"
        + (f"; read: the last {len(words):,}" if len(words) < known else "")
    )
    if not words:
        say("no word to explain: this is the answer to an empty review")
        return
    sides = {name: each if isinstance(each, dict) else {"": each} for name, each in found.items()}
    columns = {
        f"{name} {side}".strip(): numbers
        for name in ("z", "r", "change")
        for side, numbers in sides.get(name, {}).items()
    }
    columns |= {"gradient x input": found["gradient"], "leave-one-out": found["leave_out"]}
    reads = run.classes[1] if len(run.classes) == 2 else found["predicted"]
    columns[f"running P({reads})"] = found["running"]
    weights = np.mean(list(sides[by].values()), axis=0)
    signed = by in ("gradient", "leave_out")
    tinted = _tinted(words, weights, signed=signed)
    table = Table(Column("word", overflow="fold"), box=box.SIMPLE_HEAD, padding=0)
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    for word, numbers in zip(tinted, zip(*columns.values(), strict=True), strict=True):
        table.add_row(word, *(f"{number:.3f}" for number in numbers))
    console.print(table)
    if console.color_system:
        console.print(Text(" ").join(tinted))
    say(f"tinted by {by}: {MEASURES[by]}")
    if signed:
        strongest = abs(weights).max()
        say(f"blue: for the predicted class, orange: against it; full tint: {strongest:.3f}")
    else:
        say(f"no tint: {weights.min():.3f}, full tint: {weights.max():.3f}")


def _tinted(words: Sequence[str], weights: Float[np.ndarray, " n"], *, signed: bool) -> list[Text]:
    """The words on backgrounds from white to a full colour, in letters that stand out."""
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
