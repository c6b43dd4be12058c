"""A linear model's run directory: that of common/training/run_directory.py, without vectors.

model.safetensors      the arrays of Linear in model.py: weight [R, F], bias [R], codes.1 to codes.n
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
    """Train the baseline NB-SVM: a support vector machine whose features are word n-grams.

    The preset selects only the reviews. A run takes seconds and is saved at its end; an interrupted
    run starts again.
    """

    ngrams: Annotated[int, Meta(ge=1, le=10)] = 3
    """The largest number of words of an n-gram."""
    min_reviews: Count = 2
    """The smallest number of training reviews with an n-gram; rarer n-grams are ignored."""
    smoothing: Annotated[float, Meta(ge=1e-6, le=1e6)] = 1.0
    """Added to the number of reviews of a class with an n-gram."""
    c: Annotated[float, Meta(ge=1e-6, le=1e3)] = 0.01
    """The cost of a misclassified training review relative to the size of the weights."""


@dataclass(frozen=True)
class About:
    """The content of config.json."""

    options: LinearConfig
    classes: tuple[str, ...]
    example: str = field(default="", kw_only=True)
    framework: str = field(default=FRAMEWORK, kw_only=True)
    format: int = field(default=FORMAT, kw_only=True)


@dataclass(frozen=True)
class Run(About):
    """The model of a run directory."""

    vocabulary: list[str] = field(repr=False)
    model: Linear = field(repr=False)

    def predict(self, texts: Iterable[str]) -> list[Prediction]:
        """The answer to each text; its probabilities are the softmax of the margins."""
        encoded = self.encode(texts)
        logits = self.model.logits(encoded)
        return answers(self.classes, logits, (int((ids >= 0).sum()) for ids in encoded))

    def explain(self, text: str) -> dict[str, Any]:
        """Explain the answer to a text, word by word, ready for JSON:

        words          the words that occurred in training
        all_words      all words of the text; places: the index in these of each of `words`
        predicted      the predicted class; probability: its probability
        contribution   the sum of the weights of the n-grams that end at each word, for that class
        """
        (ids,), (answer,) = self.encode([text]), self.predict([text])
        places = np.flatnonzero(ids >= 0)
        contributions = self.model.contributions(ids)
        best = self.classes.index(answer.label)
        of_best = (
            contributions[:, 0] * (1 if best else -1)
            if len(self.classes) == 2
            else contributions[:, best]
        )
        return {
            "words": [self.vocabulary[word] for word in ids[places].tolist()],
            "all_words": words_of(text),
            "places": places.tolist(),
            "predicted": answer.label,
            "probability": answer.probability,
            "contribution": of_best[places].tolist(),
        }

    def encode(self, texts: Iterable[str]) -> list[Int32[np.ndarray, " words"]]:
        """The ids of each text's words; -1 for a word that did not occur in training."""
        ids, read = self._ids, map(words_of, texts_of(texts))
        return [np.array([ids.get(word, -1) for word in words], np.int32) for words in read]

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.vocabulary)}


def parse_about(content: bytes, path: Path) -> About:
    """Parse the config.json of a linear model. Raises InputError for any other."""
    about = run_directory.parse(About, content, path)
    if (about.framework, about.format) != (FRAMEWORK, FORMAT):
        raise InputError(f"{path}: not that of a linear model of format {FORMAT}")
    run_directory.check_classes(about.classes, path)
    if len(about.classes) < 2:
        raise InputError(f"{path}: classes: expected the names of two or more")
    return about


def finished(folder: Path, options: LinearConfig) -> dict[str, Any] | None:
    """The metrics of the finished run with the same options in this folder, if there is one."""
    return run_directory.finished(folder, FRAMEWORK, options, RUN_FILES, parse_about)


def write(
    folder: Path, about: About, vocabulary: Sequence[str], model: Linear, metrics: dict[str, Any]
) -> None:
    """Write the files of a finished run: see run_directory.write."""
    codes = {f"codes.{n}": each for n, each in enumerate(model.codes, 1)}
    tensors = {"weight": model.weight, "bias": model.bias, **codes}
    run_directory.write(folder, about, vocabulary, metrics, {MODEL: tensors})


def load(folder: str | Path) -> Run:
    """Read a finished run directory of a linear model.

    Raises InputError naming the file that is missing, damaged or inconsistent with the others.
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
