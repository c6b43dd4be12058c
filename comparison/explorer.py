"""The reviews of the gate explorer: some that models get wrong and some that none does."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

import torch_impl.learner
from common.data import corpus
from common.data.batches import Batches
from common.data.corpus import join
from common.inference import explanation
from common.inference.prediction import load_learner
from common.training.data import load_data
from common.training.learner import predict
from common.training.options import TrainConfig
from common.training.run_directory import load_run

REVIEWS = 12
ROWS = 64  # reviews in a batch
LONGEST = 120  # words: what one takes in at a glance
DIGITS = 4  # significant ones: what shows


def explore(
    options: TrainConfig, runs: Sequence[dict[str, Any]], report: Callable[[str], None]
) -> dict[str, Any]:
    """Explain REVIEWS test reviews with every trained model.

    runs: the entries of "runs" in results.json. Returns its entry "explorer":
    {"classes": [...], "reviews": [{"text", "true", "words", "models": {"torch gru": {...}}}]}, a
    model's part is what common/inference/explanation.py returns of it; text is the review as the
    tokenizer split it. All are computed by PyTorch's handwritten GRU, which reads what
    either framework trained, as in predict, and need not be compiled.
    """
    framework = torch_impl.learner
    data = load_data(options, report)
    split = data.test.split
    short = candidates(data.test.lengths)
    questions = Batches(
        join([split[number] for number in short], split.labels[short]),
        ROWS,
        max_length=options.max_length,
        in_order=True,
    )
    trained = {}
    correct = []
    for run in runs:
        read = load_run(Path(run["run_dir"]))
        trained[f"{run['framework']} {run['model']}"] = read
        logits, labels = predict(load_learner(framework, read, options.device), questions)
        correct.append(logits.argmax(axis=1) == labels)
    chosen = short[choose(np.array(correct))]
    words = corpus.load(options.data)
    texts = words.test.subset(options.test_size)
    reviews: list[dict[str, Any]] = [
        {
            "text": " ".join(words.vocabulary[token] for token in texts[number]),
            "true": data.classes[split.labels[number]],
            "models": {},
        }
        for number in chosen
    ]
    ids = [split[number] for number in chosen]
    for name, read in trained.items():
        for review, found in zip(
            reviews, explanation.explain(framework, read, ids, options.device), strict=True
        ):
            review["words"] = found.pop("words")
            review["models"][name] = _rounded(found)
    return {"classes": list(data.classes), "reviews": reviews}


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


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return value
