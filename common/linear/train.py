"""Train the baseline, a linear model of word n-grams, on the reviews that a GRU trains on.

python -m common.linear.train --preset full --out runs/linear
"""

if __name__ == "__main__":
    from common.program import start

    start("train")

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common import files, metrics
from common.cores import cores
from common.data.corpus import EncodedSplit
from common.errors import InputError, exit_on_input_error
from common.linear import model, run
from common.linear.model import Linear
from common.linear.run import FRAMEWORK, NAME, LinearConfig
from common.training import run_directory
from common.training.data import example, load_texts
from common.training.memory import peak_bytes
from common.training.options import parse_options

print_line = partial(print, flush=True)


def main() -> None:
    """The command line."""
    with exit_on_input_error():
        options = parse_options(LinearConfig, "python -m common.linear.train")
        options.check()
        train(options)


def train(options: LinearConfig) -> dict[str, Any]:
    """Train, test, and write the run directory; returns the content of metrics.json.

    A finished run with the same options is not changed. Raises InputError.
    """
    out = options.out or Path("runs") / f"{FRAMEWORK}-{NAME}"
    with run_directory.lock(out):
        if options.restart:
            run_directory.clear(out)
        elif done := run.finished(out, options):
            print_line(f"Accuracy: {done['accuracy']:.2%}")
            print_line(f"{out}: this run was finished before (--restart replaces it)")
            return done
        elif problem := _problem(out, options):
            raise InputError(f"{out}: {problem}; --restart replaces it")
        return _train(options, out)


def _problem(out: Path, options: LinearConfig) -> str:
    """The reason why a run with these options must not be written there, or nothing."""
    if run_directory.framework_of(out) == FRAMEWORK:  # which a crash may have left incomplete
        about = run.parse_about(files.read(out / run_directory.CONFIG), out / run_directory.CONFIG)
        different = run_directory.differences(about.options, options)
        return f"holds another run: {', '.join(different)}" if different else ""
    there = (out / run_directory.CONFIG).exists() or (out / "checkpoints").exists()
    return "holds another run" if there else ""


def _train(options: LinearConfig, out: Path) -> dict[str, Any]:
    import sklearn.svm  # noqa: F401  so that the training time does not include the import

    texts, training, test, validation = load_texts(options, print_line)
    print_line(
        f"{FRAMEWORK} {NAME} (NB-SVM) on {texts.name}: {len(training):,} reviews to train on, "
        f"{len(test):,} to test on"
    )
    started = time.perf_counter()
    fit = partial(
        model.fit,
        words=len(texts.vocabulary),
        classes=texts.classes,
        longest=options.ngrams,
        fewest=options.min_reviews,
        smoothing=options.smoothing,
        c=options.c,
    )
    fitted = fit(training)
    temperature = None if options.temperature and len(validation) else calibrate(fit, training)
    seconds = time.perf_counter() - started
    print_line(f"Total training time: {seconds:.0f} secs, {fitted.weight.shape[1]:,} n-grams")
    held_out = None
    if len(validation):
        logits = fitted.logits(validation)
        held_out = float((logits.argmax(1) == validation.labels).mean())
        print_line(f"validation accuracy: {held_out:.2%}")
        if options.temperature:
            temperature = metrics.fit_temperature(logits, validation.labels)
            print_line(metrics.describe_temperature(temperature))
    if temperature:
        weights = (each / np.float32(temperature) for each in (fitted.weight, fitted.bias))
        fitted = Linear(fitted.words, fitted.codes, *weights)
    evaluated = metrics.evaluate(
        fitted.logits(test), test.labels, texts.classes, test.categories, texts.categories
    )
    results = {
        "framework": FRAMEWORK,
        "model": NAME,
        "implementation": "NB-SVM",
        **evaluated,
        "validation_accuracy": held_out,
        "temperature": temperature or 1.0,
        "train_seconds": seconds,
        "cores": cores(),
        "tokens_per_second": float(training.lengths.sum() / seconds),
        "peak_memory_bytes": peak_bytes(),
        "parameters": fitted.weight.size + fitted.bias.size,
        "data": {
            "name": texts.name,
            "train": len(training),
            "test": len(test),
            "left_out": texts.left_out,
            "vectors": "none",
            "vocabulary": len(texts.vocabulary),
        },
    }
    about = run.About(options, texts.classes, example=example(texts.vocabulary, training, test))
    run.write(out, about, texts.vocabulary, fitted, results)
    return results


def calibrate(fit: Callable[[EncodedSplit], Linear], training: EncodedSplit) -> float | None:
    """The temperature that calibrates the margins as logits of probabilities.

    It is fitted to the margins of a fifth of the texts, from a machine that is trained on the
    others. None if these are too few for training.
    """
    others, fifth = training.hold_out(len(training) // 5)
    if not len(fifth):
        return None
    try:
        return metrics.fit_temperature(fit(others).logits(fifth), fifth.labels)
    except InputError:
        return None


if __name__ == "__main__":
    main()
