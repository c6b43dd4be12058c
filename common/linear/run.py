"""A linear model's run directory: as common/training/run_directory.py has it, without vectors.

model.safetensors      what Linear in model.py holds: weight [R, F], bias [R], codes.1 to codes.n
vocabulary.txt         every word of the data set, in training and test
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Int32
from msgspec import Meta

from common import files
from common.data import ngrams
from common.errors import InputError
from common.inference.model import Prediction, answers, texts_of, words_of
from common.linear.model import Linear
from common.training import run_directory
from common.training.options import Count, DataConfig
from common.training.run_directory import CONFIG, FORMAT, METRICS, MODEL, VOCABULARY

FRAMEWORK, NAME = "sklearn", "linear"
RUN_FILES = (CONFIG, VOCABULARY, MODEL, METRICS)


@dataclass(frozen=True)
class LinearConfig(DataConfig):
    """Train the yardstick, NB-SVM: a support vector machine on which word n-grams a review has.

    A preset says which reviews, and nothing else. A run takes seconds and is not saved before its
    end: one that was interrupted begins again.
    """

    ngrams: Annotated[int, Meta(ge=1, le=10)] = 3
    """Words of an n-gram, at most."""
    min_reviews: Count = 2
    """Leave out an n-gram that fewer training reviews have."""
    smoothing: Annotated[float, Meta(ge=1e-6, le=1e6)] = 1.0
    """Added to how many reviews of a class have an n-gram."""
    c: Annotated[float, Meta(ge=1e-6, le=1e3)] = 0.01
    """What a training review on the wrong side costs, against the size of the weights."""


@dataclass(frozen=True)
class About:
    """What config.json holds."""

    options: LinearConfig
    classes: tuple[str, ...]
    example: str = field(default="", kw_only=True)
    framework: str = field(default=FRAMEWORK, kw_only=True)
    format: int = field(default=FORMAT, kw_only=True)


@dataclass(frozen=True)
class Run(About):
    """A run directory's model, read back."""

    vocabulary: list[str] = field(repr=False)
    model: Linear = field(repr=False)

    def predict(self, texts: Iterable[str]) -> list[Prediction]:
        """The answer to each text; its probabilities are the softmax of the margins."""
        encoded = self.encode(texts)
        logits = self.model.logits(encoded)
        return answers(self.classes, logits, (int((ids >= 0).sum()) for ids in encoded))

    def explain(self, text: str) -> dict[str, Any]:
        """Explain the answer to a text, word by word, ready for JSON:

        words          those that training has seen
        all_words      all words of the text; places: where in these each of `words` stands
        predicted      the class, probability that class's probability
        contribution   what the n-grams that end at each word add to the margin of that class
        """
        (ids,), (answer,) = self.encode([text]), self.predict([text])
        places = np.flatnonzero(ids >= 0)
        found = self.model.contributions(ids)
        best = self.classes.index(answer.label)
        of_best = found[:, 0] * (1 if best else -1) if len(self.classes) == 2 else found[:, best]
        return {
            "words": [self.vocabulary[word] for word in ids[places].tolist()],
            "all_words": words_of(text),
            "places": places.tolist(),
            "predicted": answer.label,
            "probability": answer.probability,
            "contribution": of_best[places].tolist(),
        }

    def encode(self, texts: Iterable[str]) -> list[Int32[np.ndarray, " words"]]:
        """The ids of each text's words; -1 is a word that was not seen."""
        ids, read = self._ids, map(words_of, texts_of(texts))
        return [np.array([ids.get(word, -1) for word in words], np.int32) for words in read]

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.vocabulary)}


def parse_about(content: bytes, path: Path) -> About:
    """A config.json of a linear model. Raises InputError for any other."""
    about = run_directory.parse(About, content, path)
    if (about.framework, about.format) != (FRAMEWORK, FORMAT):
        raise InputError(f"{path}: not that of a linear model of format {FORMAT}")
    run_directory.check_classes(about.classes, path)
    if len(about.classes) < 2:
        raise InputError(f"{path}: classes: expected the names of two or more")
    return about


def finished(folder: Path, options: LinearConfig) -> dict[str, Any] | None:
    """The metrics of the finished run of these very options in this folder, if there is one."""
    return run_directory.finished(folder, FRAMEWORK, options, RUN_FILES, parse_about)


def write(
    folder: Path, about: About, vocabulary: Sequence[str], model: Linear, metrics: dict[str, Any]
) -> None:
    """Write what a finished run leaves: see run_directory.write."""
    codes = {f"codes.{n}": each for n, each in enumerate(model.codes, 1)}
    tensors = {"weight": model.weight, "bias": model.bias, **codes}
    run_directory.write(folder, about, vocabulary, metrics, {MODEL: tensors})


def load(folder: str | Path) -> Run:
    """Read a finished run directory of a linear model.

    Raises InputError naming the file that is missing or damaged, or does not fit the others.
    """
    folder = Path(folder)
    if run_directory.framework_of(folder) not in ("", FRAMEWORK):
        raise InputError(f"{folder}: holds no linear model: torch_impl and jax_impl read it")
    contents = files.read_verified(folder, RUN_FILES)
    about = parse_about(contents[CONFIG], folder / CONFIG)
    vocabulary = run_directory.parse_vocabulary(contents[VOCABULARY], folder / VOCABULARY)
    rows = 1 if len(about.classes) == 2 else len(about.classes)
    names = [f"codes.{n}" for n in range(1, about.options.ngrams + 1)]
    shapes = {"weight": (rows, None), "bias": (rows,), **{name: (None,) for name in names}}
    tensors = files.parse_tensors(contents[MODEL], folder / MODEL, shapes)
    weight, bias, *codes = tensors.values()
    if weight.shape[1] != sum(map(len, codes)):
        raise InputError(f"{folder / MODEL}: expected a weight for each code")
    if problem := ngrams.problem_of(codes, len(vocabulary)):
        raise InputError(f"{folder / MODEL}: {problem}")
    model = Linear(len(vocabulary), codes, weight, bias)
    return Run(**vars(about), vocabulary=vocabulary, model=model)
