"""Selects and explains the reviews of the gate explorer: some that a model gets wrong, some not."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from jaxtyping import Bool, Int

from common.report.schema import Explained, Explorer, Review, Run
from common.training.data import load_data, load_texts
from common.training.options import TrainConfig
from torch_impl.predict import load

REVIEWS = 12
LONGEST = 120  # words, which fit on a screen


def explore(options: TrainConfig, runs: Sequence[Run]) -> Explorer:
    """Explain REVIEWS test reviews with every trained model.

    torch_impl, which needs no compilation, explains the models of both frameworks.
    """
    data = load_data(options, lambda line: None)  # the trainings have printed these lines
    labels = data.test.split.labels
    words, _, split, _ = load_texts(options, lambda line: None)
    short = candidates(data.test.lengths)
    texts = [" ".join(words.vocabulary[word] for word in split[number]) for number in short]
    trained = {run.name: load(Path(run.run_dir), options.device) for run in runs}
    predicted = [model.logits(texts).argmax(axis=1) for model in trained.values()]
    reviews = []
    for number in choose(np.array(predicted) == labels[short]):
        explained = {name: model.explain(texts[number]) for name, model in trained.items()}
        models = msgspec.convert(explained, dict[str, Explained])
        true = data.classes[labels[short[number]]]
        read = next(iter(explained.values()))["words"]
        reviews.append(Review(texts[number], read, true, models))
    return Explorer(list(data.classes), reviews)


def candidates(lengths: Int[np.ndarray, " N"]) -> Int[np.ndarray, " short"]:
    """The reviews of up to LONGEST words, or the shortest reviews, in a fixed random order."""
    length = max(LONGEST, np.sort(lengths)[: 2 * REVIEWS].max())
    short = np.flatnonzero((lengths > 0) & (lengths <= length))
    return np.random.default_rng(0).permutation(short)


def choose(correct: Bool[np.ndarray, "models N"]) -> Int[np.ndarray, " chosen"]:
    """The first REVIEWS reviews, if possible half of them classified wrongly by a model."""
    right = correct.all(axis=0)
    wrong_ones, right_ones = np.flatnonzero(~right), np.flatnonzero(right)
    most = min(len(wrong_ones), max(REVIEWS // 2, REVIEWS - len(right_ones)))
    return np.concatenate([wrong_ones[:most], right_ones[: REVIEWS - most]])
