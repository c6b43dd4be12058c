"""Classify texts with a trained model: the command line of both twins' predict."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro
from jaxtyping import Float, Int32
from scipy.special import softmax

from common.data.batches import Batches
from common.data.corpus import join
from common.data.text import clean, tokenize
from common.errors import InputError, exit_on_input_error
from common.training.learner import Framework, Learner, predict
from common.training.options import Device, parse_options
from common.training.run_directory import Run, load_run


@dataclasses.dataclass(frozen=True)
class PredictOptions:
    """Print label and probability of texts, given here or as the lines of standard input."""

    run_dir: tyro.conf.Positional[Path]
    """The run directory of a trained model, of either framework."""
    texts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts to classify; none: each line of standard input is one."""
    device: Device = "auto"
    """Where to compute: auto, cpu, cuda or mps."""


def main(framework: Framework) -> None:
    """The command line of `python -m torch_impl.predict` and `python -m jax_impl.predict`."""
    with exit_on_input_error():
        program = f"python -m {framework.__name__.partition('.')[0]}.predict"
        options = parse_options(PredictOptions, program)
        run = load_run(options.run_dir)
        texts = options.texts
        if not texts:
            if sys.stdin.isatty():
                print("one text a line, end with Ctrl-D:", file=sys.stderr)
            texts = tuple(sys.stdin.buffer.read().decode("utf-8", "replace").splitlines())
        if not texts:
            raise InputError("no text: give some as arguments, or as lines of standard input")
        for number, text in enumerate(texts, 1):
            if not text.strip():
                raise InputError(f"text {number} is empty")
        answers = classify(framework, run, texts, options.device)
        for probabilities, text in zip(answers, texts, strict=True):
            best = int(probabilities.argmax())
            print(f"{run.classes[best]}\t{probabilities[best]:.4f}\t{text}")


def classify(
    framework: Framework, run: Run, texts: tuple[str, ...], device: Device = "auto"
) -> Float[np.ndarray, "N C"]:
    """The probability of each class for each text.

    A model of the built-in layer is computed by the handwritten GRU, which both frameworks have.
    Words without a vector are left out; a text of such words alone is legal.
    """
    known = encode(run, [tokenize(clean(text)) for text in texts])
    split, limit = join(known, np.zeros(len(texts))), run.options.max_length
    batches = Batches(split, min(len(texts), 32), max_length=limit, in_order=True)
    logits, _ = predict(load_learner(framework, run, device), batches)
    return softmax(logits.astype(np.float64), axis=1)


def encode(run: Run, texts: Sequence[list[str]]) -> list[Int32[np.ndarray, " known"]]:
    """The ids of each text's words, in their order, without those that have no vector."""
    ids = {word: number for number, word in enumerate(run.vocabulary)}
    return [np.array([ids[word] for word in text if word in ids], np.int32) for text in texts]


def load_learner(
    framework: Framework, run: Run, device: Device = "auto", dtype: str = "float32"
) -> Learner:
    """The trained model, ready to answer; a built-in layer is computed by the handwritten GRU."""
    model = dataclasses.replace(run.model, builtin=False, implementation="auto")
    options = dataclasses.replace(run.options, device=device)
    parameters = {name: value.astype(dtype) for name, value in run.parameters.items()}
    return framework.Learner(model, options, run.vectors, parameters, dtype=dtype)
