"""The reviews of the gate explorer: some that models get wrong and some that none does."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from jaxtyping import Bool, Int

import torch_impl.learner
from common.inference import explanation
from common.inference.prediction import load_learner, questions
from common.report.schema import Explained, Explorer, Review, Run
from common.training import run_directory
from common.training.data import load_data, load_texts
from common.training.learner import predict
from common.training.options import TrainConfig

REVIEWS = 12
ROWS = 64  # reviews in a batch
LONGEST = 120  # words: what one takes in at a glance


def explore(options: TrainConfig, runs: Sequence[Run]) -> Explorer:
    """Explain REVIEWS test reviews with every trained model.

    All are computed by PyTorch's handwritten GRU, which reads what either framework trained, as in
    predict, and need not be compiled.
    """
    data = load_data(options, lambda line: None)  # the runs have said it
    split = data.test.split
    short = candidates(data.test.lengths)
    asked, limit = [split[number] for number in short], options.max_length
    trained = {run.name: run_directory.load_run(Path(run.run_dir)) for run in runs}
    correct = []
    for run in trained.values():
        batches = questions(run, asked, ROWS, split.labels[short], max_length=limit)
        logits, labels = predict(load_learner(torch_impl.learner, run, options.device), batches)
        correct.append(logits.argmax(axis=1) == labels)
    chosen = short[choose(np.array(correct))]
    ids = [split[number] for number in chosen]
    explained = {
        name: explanation.explain(torch_impl.learner, run, ids, options.device)
        for name, run in trained.items()
    }
    words, _, texts, _ = load_texts(options, lambda line: None)
    reviews = []
    for number, *found in zip(chosen, *explained.values(), strict=True):
        models = dict(zip(explained, msgspec.convert(found, list[Explained]), strict=True))
        text = " ".join(words.vocabulary[token] for token in texts[number])
        true = data.classes[split.labels[number]]
        reviews.append(Review(text, found[0]["words"], true, models))
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
