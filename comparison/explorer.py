"""The reviews of the gate explorer: some that models get wrong and some that none does."""

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
LONGEST = 120  # words: what one takes in at a glance


def explore(options: TrainConfig, runs: Sequence[Run]) -> Explorer:
    """Explain REVIEWS test reviews with every trained model.

    All are computed by PyTorch's handwritten GRU, which reads what either framework trained, as in
    predict, and need not be compiled.
    """
    data = load_data(options, lambda line: None)  # the runs have said it
    labels = data.test.split.labels
    words, _, split, _ = load_texts(options, lambda line: None)
    short = candidates(data.test.lengths)
    texts = [" ".join(words.vocabulary[word] for word in split[number]) for number in short]
    trained = {run.name: load(Path(run.run_dir), options.device) for run in runs}
    answers = [model.logits(texts).argmax(axis=1) for model in trained.values()]
    reviews = []
    for number in choose(np.array(answers) == labels[short]):
        found = {name: model.explain(texts[number]) for name, model in trained.items()}
        models = msgspec.convert(found, dict[str, Explained])
        true = data.classes[labels[short[number]]]
        read = next(iter(found.values()))["words"]
        reviews.append(Review(texts[number], read, true, models))
    return Explorer(list(data.classes), reviews)


def candidates(lengths: Int[np.ndarray, " N"]) -> Int[np.ndarray, " short"]:
    """Reviews of up to LONGEST words (or the shortest there are), in an order drawn once."""
    length = max(LONGEST, np.sort(lengths)[: 2 * REVIEWS].max())
    short = np.flatnonzero((lengths > 0) & (lengths <= length))
    return np.random.default_rng(0).permutation(short)


def choose(correct: Bool[np.ndarray, "models N"]) -> Int[np.ndarray, " chosen"]:
    """Which reviews: the first ones, half of them wrongly classified by some model.

    Where there are too few wrong or right ones, more of the others.
    """
    right = correct.all(axis=0)
    wrong_ones, right_ones = np.flatnonzero(~right), np.flatnonzero(right)
    most = min(len(wrong_ones), max(REVIEWS // 2, REVIEWS - len(right_ones)))
    return np.concatenate([wrong_ones[:most], right_ones[: REVIEWS - most]])
