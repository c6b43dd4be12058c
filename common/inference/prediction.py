"""Classify texts with trained models: the command line of every predict."""

import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from common import metrics
from common.data import sources
from common.errors import InputError, exit_on_input_error
from common.inference import model
from common.inference.model import Model, Prediction, Saved
from common.inference.predictor import Framework
from common.linear import run as linear
from common.training.options import Device, parse_options
from common.training.run_directory import framework_of

CHUNK_TEXTS = 1024  # texts that are classified before the next ones are read


@dataclasses.dataclass(frozen=True)
class PredictOptions:
    """Print label and probability of texts, given as arguments or as lines of standard input.

    With several run directories (RUN_DIR RUN_DIR ... TEXTS), an ensemble, their probabilities are
    averaged. They may come from either framework or from common.linear.train;
    common.linear.predict, which uses no framework, reads only the latter.
    """

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """The run directory of a trained model."""
    texts: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="[TEXT ...]", help_behavior_hint=""),
    ] = ()
    """Further run directories, then texts to classify. With -, or without texts, each line of
    standard input is a text."""
    data: Annotated[str | None, tyro.conf.arg(metavar="SPEC")] = None
    """Classify the texts of a data set instead, named as for training: csv:FILE, jsonl:FILE, ...
    (docs/data.md). If they have labels, accuracy, macro F1 and the scores of each class are printed
    on standard error at the end."""
    skip_bad_rows: bool = False
    """Leave out rows of --data that cannot be used, and print how many."""
    json: bool = False
    """Print one JSON object per line: text, label, probabilities of all classes, known_words."""
    strict: bool = False
    """End with an error at a text without a known word, instead of printing the answer to an empty
    text."""
    checkpoint: Saved | None = None
    """Read the last checkpoint of each run, which may be unfinished: its last parameters, or the
    best ones by the validation loss."""
    device: Annotated[Device, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """The device of the computation: auto, cpu, cuda or mps."""


def main(framework: Framework | None = None) -> None:
    """The command line of `python -m torch_impl.predict`, and of jax_impl's and common.linear's.

    Without a framework, it reads only linear models.
    """
    with exit_on_input_error():
        package = framework.__name__.rpartition(".")[0] if framework else "common.linear"
        options = parse_options(PredictOptions, f"python -m {package}.predict")
        further = [*takewhile(is_folder, options.texts)]
        folders = [options.run_dir, *map(Path, further)]
        models = [load(framework, folder, options.device, options.checkpoint) for folder in folders]
        for each, folder in zip(models, folders, strict=True):
            if sorted(each.classes) != sorted(models[0].classes):
                raise InputError(
                    f"{folder}: its classes are {', '.join(each.classes)}, those of "
                    f"{folders[0]} {', '.join(models[0].classes)}"
                )
        if further:
            print(f"an ensemble of {len(models)} runs: their mean probabilities", file=sys.stderr)
        left_out = Counter[str]() if options.skip_bad_rows else None
        examples = _examples(options, options.texts[len(further) :], left_out)
        numbers = {name: number for number, name in enumerate(models[0].classes)}
        number, answers, labels = 0, [], []
        while chunk := list(islice(examples, CHUNK_TEXTS)):
            texts = [text for text, _ in chunk]
            for (text, label), answer in zip(chunk, predict(models, texts), strict=True):
                number += 1
                if options.strict and not answer.known_words:
                    raise InputError(f"text {number}: has no word that the model knows: {text!r}")
                if label and label not in numbers:
                    raise InputError(
                        f"--data {options.data}: text {number}: its label {label!r} is no class of "
                        f"the run ({', '.join(numbers)}); ?label= ignores the labels"
                    )
                print(_line(text, answer, as_json=options.json))
                if label:
                    labels.append(numbers[label])
                    answers.append((numbers[answer.label], answer.probability, np.nan))
        if left_out:
            rows = f"{left_out.total():,} bad rows left out (--skip-bad-rows)"
            print(f"{options.data}: {rows}", file=sys.stderr)
        if not number:
            if options.data is not None:
                raise InputError(f"--data {options.data}: contains no text")
            raise InputError("no text: give some as arguments, or as lines of standard input")
        if labels:
            sys.stdout.flush()
            answered, classes = np.array(answers), models[0].classes
            evaluated = metrics.evaluate_answers(answered, np.array(labels), classes)
            print(metrics.table(evaluated), file=sys.stderr)


def _examples(
    options: PredictOptions, texts: Sequence[str], left_out: Counter[str] | None
) -> Iterator[tuple[str, str]]:
    """Each text to classify with its label, which may be empty."""
    for text in texts:
        if text != "-" and _is(Path.is_file, text):
            raise InputError(
                f"{text}: is a file, not a text: --data csv:{text} or --data jsonl:{text} reads "
                f"its texts, and < {text} one text a line"
            )
    if options.data is None:
        yield from ((text, "") for text in chain.from_iterable(map(_lines, texts or ["-"])))
        return
    if texts:
        raise InputError(f"--data {options.data}: {texts[0]!r}: give either --data or texts")
    for example in sources.load_unlabelled(options.data).examples(left_out):
        yield example.text, example.label


def is_folder(text: str) -> bool:
    """Whether an argument is the name of a folder, and therefore no text."""
    return _is(Path.is_dir, text)


def _is(kind: Callable[[Path], bool], text: str) -> bool:
    """Whether an argument names a file or folder of this kind."""
    try:
        return bool(text) and kind(Path(text))
    except (OSError, ValueError):  # the name is too long or contains a zero byte
        return False


def load(
    framework: Framework | None, folder: Path, device: Device, checkpoint: Saved | None
) -> Model | linear.Run:
    """Read a run directory of a framework or a linear model. Raises InputError."""
    if framework is None or framework_of(folder) == linear.FRAMEWORK:
        if checkpoint:
            raise InputError(f"--checkpoint {checkpoint}: {folder} is linear and has none")
        return linear.load(folder)
    return model.load(framework, folder, device, checkpoint)


def predict(models: Sequence[Model | linear.Run], texts: Sequence[str]) -> list[Prediction]:
    """The answers of an ensemble: the mean of the models' probabilities."""
    answers = []
    for each in zip(*(one.predict(texts) for one in models), strict=True):
        names = each[0].probabilities
        mean = {name: float(np.mean([one.probabilities[name] for one in each])) for name in names}
        known = max(one.known_words for one in each)
        answers.append(Prediction(max(mean, key=mean.__getitem__), mean, known))
    return answers


def _lines(text: str) -> Iterator[str]:
    """A text of the command line, or those of standard input."""
    if text != "-":
        yield text
        return
    if sys.stdin is None:
        raise InputError("no text: standard input is closed")
    if sys.stdin.isatty():
        print("one text a line, end with Ctrl-D:", file=sys.stderr)
    for line in sys.stdin.buffer:
        yield line.decode("utf-8", "replace").rstrip("\r\n")


def _line(text: str, answer: Prediction, *, as_json: bool) -> str:
    if as_json:
        return json.dumps({"text": text, **vars(answer)}, ensure_ascii=False)
    text = re.sub(r"[\r\n]+", " ", text)  # one line per text
    unknown = "" if answer.known_words else "\t(no known word: the answer to an empty text)"
    return f"{answer.label}\t{answer.probability:.4f}\t{text}{unknown}"
