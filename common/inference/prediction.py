"""Classify texts with trained models: the command line of every predict."""

import dataclasses
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from jaxtyping import Float, Int, Int32
from scipy.special import softmax

from common.data.batches import Batches
from common.data.corpus import join
from common.data.text import clean, tokenize
from common.errors import InputError, exit_on_input_error
from common.linear import run as linear
from common.training.learner import Framework, Learner, predict
from common.training.options import Device, parse_options
from common.training.run_directory import Run, framework_of, load_run


@dataclasses.dataclass(frozen=True)
class PredictOptions:
    """Print label and probability of texts, given here or as the lines of standard input.

    Of several run directories (RUN_DIR RUN_DIR ... TEXTS) the mean of their probabilities is taken:
    an ensemble. They may be of either framework, or of common.linear.train; common.linear.predict,
    which has no framework, reads those alone.
    """

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """The run directory of a trained model."""
    texts: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="[TEXT ...]", help_behavior_hint=""),
    ] = ()
    """Further run directories, then texts to classify; none: each line of standard input is one."""
    device: Annotated[Device, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """Where to compute: auto, cpu, cuda or mps."""


def main(framework: Framework | None = None) -> None:
    """The command line of `python -m torch_impl.predict`, and of jax_impl's and common.linear's.

    Without a framework, it reads linear models alone.
    """
    with exit_on_input_error():
        package = framework.__name__.rpartition(".")[0] if framework else "common.linear"
        options = parse_options(PredictOptions, f"python -m {package}.predict")
        further = [*takewhile(is_folder, options.texts)]
        runs = [load(folder, framework) for folder in (options.run_dir, *map(Path, further))]
        classes = runs[0].classes
        for run, folder in zip(runs[1:], further, strict=True):
            if sorted(run.classes) != sorted(classes):
                raise InputError(
                    f"{folder}: its classes are {', '.join(run.classes)}, those of "
                    f"{options.run_dir} {', '.join(classes)}"
                )
        texts = options.texts[len(further) :]
        if not texts:
            if sys.stdin.isatty():
                print("one text a line, end with Ctrl-D:", file=sys.stderr)
            texts = tuple(sys.stdin.buffer.read().decode("utf-8", "replace").splitlines())
        if not texts:
            raise InputError("no text: give some as arguments, or as lines of standard input")
        for number, text in enumerate(texts, 1):
            if not text.strip():
                raise InputError(f"text {number} is empty")
        if further:
            print(f"an ensemble of {len(runs)} runs: their mean probabilities", file=sys.stderr)
        found = [classify(framework, run, texts, options.device) for run in runs]
        orders = [[run.classes.index(name) for name in classes] for run in runs]
        answers = np.mean([each[:, o] for each, o in zip(found, orders, strict=True)], axis=0)
        for probabilities, text in zip(answers, texts, strict=True):
            best = int(probabilities.argmax())
            print(f"{classes[best]}\t{probabilities[best]:.4f}\t{text}")


def is_folder(text: str) -> bool:
    """Whether an argument is the name of a folder, and so no text."""
    try:
        return bool(text) and Path(text).is_dir()
    except (OSError, ValueError):  # too long for a name, or with a zero byte
        return False


def load(folder: Path, framework: Framework | None = None) -> Run | linear.Run:
    """Read a run directory, of a framework or linear. Raises InputError as load_run does."""
    if framework is None or framework_of(folder) == linear.FRAMEWORK:
        return linear.load(folder)
    return load_run(folder)


def classify(
    framework: Framework | None,
    run: Run | linear.Run,
    texts: tuple[str, ...],
    device: Device = "auto",
) -> Float[np.ndarray, "N C"]:
    """The probability of each class for each text; of a linear model, the softmax of its margins.

    A model of the built-in layer is computed by the handwritten GRU, which both frameworks have.
    Words without a vector are left out; a text of such words alone is legal.
    """
    if isinstance(run, linear.Run):
        return softmax(run.logits(texts).astype(np.float64), axis=1)
    assert framework is not None
    known = encode(run, [tokenize(clean(text)) for text in texts])
    rows, limit = min(len(texts), 32), run.options.max_length
    batches = questions(run, known, rows, max_length=limit)
    logits, _ = predict(load_learner(framework, run, device), batches)
    return softmax(logits.astype(np.float64), axis=1)


def encode(run: Run, texts: Sequence[list[str]]) -> list[Int32[np.ndarray, " known"]]:
    """The ids of each text's words, in their order, without those that have no vector."""
    ids = {word: number for number, word in enumerate(run.vocabulary)}
    return [np.array([ids[word] for word in text if word in ids], np.int32) for text in texts]


def questions(
    run: Run,
    texts: Sequence[Int[np.ndarray, " words"]],
    rows: int,
    labels: Int[np.ndarray, " N"] | None = None,
    **how: Any,
) -> Batches:
    """Texts, as ids of words in run.vocabulary, in batches that a model of the run can read."""
    split = join(texts, np.zeros(len(texts)) if labels is None else labels)
    split = run.ratios.beside(split) if run.ratios else split
    return Batches(split, rows, in_order=True, ngrams=run.model.ngrams, **how)


def load_learner(
    framework: Framework, run: Run, device: Device = "auto", dtype: str = "float32"
) -> Learner:
    """The trained model, ready to answer; a built-in layer is computed by the handwritten GRU."""
    model = dataclasses.replace(run.model, builtin=False, implementation="auto")
    options = dataclasses.replace(run.options, device=device)
    parameters = {name: value.astype(dtype) for name, value in run.parameters.items()}
    return framework.Learner(model, options, run.vectors, parameters, dtype=dtype)
