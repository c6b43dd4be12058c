"""The one training loop: it drives a learner of either framework and writes its run directory."""

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from common import checkpoint, corpus, metrics, params, vectors
from common.batches import Batch, Batches
from common.config import TrainConfig, parse_options
from common.errors import InputError, exit_on_input_error
from common.report import figures
from common.tensorboard import Scalars


class Learner(Protocol):
    """A classifier, its loss and its optimizer in some framework; arrays come and go as NumPy."""

    implementation: str
    """What computes the GRU: loop, scan, nn.GRU."""
    compilations: int
    """How often the training step was compiled."""

    def step(self, batch: Batch) -> Any:
        """Take one optimizer step; returns the loss, which may still be being computed."""

    def logits(self, batch: Batch) -> np.ndarray: ...

    def explain(self, batch: Batch) -> dict[str, np.ndarray]: ...

    def parameters(self) -> dict[str, np.ndarray]: ...

    def optimizer_state(self) -> dict[str, np.ndarray]: ...


class Framework(Protocol):
    """The module of a twin that has its learner, torch_impl.learner or jax_impl.learner."""

    __name__: str
    FRAMEWORK: str
    MODELS: tuple[str, ...]
    Learner: Any

    def find_device(self, name: str) -> Any:
        """The device of this name. Raises InputError where the machine has none."""

    def resolve(self, implementation: str, device: str = "cpu") -> str:
        """The implementation that is meant. Raises InputError where there is none."""


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run trains and tests on."""

    name: str
    classes: tuple[str, ...]
    vectors: vectors.WordVectors
    train: Batches
    test: Batches


def load_data(options: TrainConfig, report: Callable[[str], None]) -> Data:
    """The data set and word vectors that the options name, as batches.

    report is told, in a line of text, of work that takes seconds.
    """
    texts = corpus.load(options.data, report)
    train, test = texts.train.subset(options.train_size), texts.test.subset(options.test_size)
    found = vectors.load(options.vectors, texts, train, report)
    ids = {word: number for number, word in enumerate(found.words)}
    new_ids = np.array([ids.get(word, -1) for word in texts.vocabulary], np.int32)
    train, test = train.renumber(new_ids), test.renumber(new_ids)
    train_batches = Batches(
        train,
        options.batch_size,
        max_length=options.max_length,
        seed=options.seed,
        longest=int(test.lengths.max(initial=0)),
    )
    test_batches = Batches(
        test,
        options.batch_size,
        max_length=options.max_length,
        in_order=True,
        shapes=train_batches.shapes,
    )
    return Data(texts.name, texts.classes, found, train_batches, test_batches)


def main(framework: Framework) -> None:
    """The command line of `python -m torch_impl.train` and `python -m jax_impl.train`."""
    with exit_on_input_error():
        folder = framework.__name__.partition(".")[0]
        options = parse_options(TrainConfig, f"python -m {folder}.train")
        options.check()
        if options.model not in framework.MODELS:
            raise InputError(
                f"--model {options.model}: {framework.FRAMEWORK} has {', '.join(framework.MODELS)}"
            )
        framework.find_device(options.device)
        framework.resolve(options.implementation)
        train(framework, options)


def train(framework: Framework, options: TrainConfig) -> dict[str, Any]:
    """Train a classifier, test it, and write its run directory; returns what metrics.json holds."""
    out = options.out or Path("runs") / f"{framework.FRAMEWORK}-{options.model}"
    options = dataclasses.replace(options, out=out)
    checkpoint.prepare(out)
    console = Console()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    data = load_data(options, say)
    model = options.model_config(
        input_size=data.vectors.matrix.shape[1],
        classes=len(data.classes),
        vocabulary_size=len(data.vectors.words),
        train_vectors=data.vectors.trained_with_model,
    )
    started = time.perf_counter()
    learner = framework.Learner(model, options, data.vectors.matrix)
    say(
        f"{framework.FRAMEWORK} {options.model} ({learner.implementation}) on {data.name}: "
        f"{len(data.train.split):,} reviews to train on, {len(data.test.split):,} to test on, "
        f"{len(data.vectors.words):,} words with a vector"
    )
    checkpoint.save_setup(
        out,
        options,
        model,
        data.classes,
        framework.FRAMEWORK,
        data.vectors.words,
        data.vectors.matrix,
    )
    scalars = Scalars(out / "tensorboard") if options.tensorboard else None
    history = fit(learner, data.train, options, console, out / "log.jsonl", started, scalars)
    say(f"Total training time: {history['train_seconds']:.0f} secs")
    state = {"epoch": options.epochs, "step": options.epochs * len(data.train)}
    checkpoint.save_model(out, learner.parameters(), learner.optimizer_state(), state)

    logits, labels = predict(learner, data.test)
    results = {
        "framework": framework.FRAMEWORK,
        "model": options.model,
        "implementation": learner.implementation,
        **metrics.evaluate(logits, labels, data.classes),
        **history,
        "compilations": learner.compilations,
        "peak_memory_bytes": _peak_memory(),
        "parameters": sum(int(np.prod(shape)) for shape in params.shapes(model).values()),
        "data": {
            "name": data.name,
            "train": len(data.train.split),
            "test": len(data.test.split),
            "vectors": options.vectors,
            "vocabulary": len(data.vectors.words),
        },
    }
    low, high = results["accuracy_interval"]
    say(f"Accuracy: {results['accuracy']:.2%}")
    say(f"95 % interval: {low:.2%} to {high:.2%}   run directory: {out}")
    checkpoint.write_json(out / "metrics.json", results)
    if scalars:
        scalars.write(state["step"], {"test_accuracy": results["accuracy"]})
        scalars.close()
    title = f"{framework.FRAMEWORK} {options.model} on {data.name}"
    figures.loss_curves(
        out / "figures" / "loss.png",
        {options.model: (results["loss_epochs"], results["losses"])},
        f"Training loss: {title}",
        options.epochs,
    )
    figures.confusion(
        out / "figures" / "confusion.png",
        results["confusion"],
        data.classes,
        f"{title}: {results['accuracy']:.2%} correct",
    )
    return results


def fit(
    learner: Learner,
    batches: Batches,
    options: TrainConfig,
    console: Console,
    log: Path,
    started: float,
    scalars: Scalars | None = None,
) -> dict[str, Any]:
    """Run the epochs; every log_every iterations, a log line, a line in the file `log`, scalars.

    Returns losses (the mean between two log lines), loss_epochs (the epochs done by then),
    train_seconds and first_step_seconds (both from `started`, with compilation), and
    tokens_per_second, the median over the stretches between two log lines.
    """
    losses, loss_epochs, speeds = [], [], []
    first_step_seconds = None
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with progress, log.open("w") as file:
        task = progress.add_task("training", total=options.epochs * len(batches), speed="")
        for epoch in range(options.epochs):
            window: list[Any] = []
            words, since = 0, time.perf_counter()
            for iteration, batch in enumerate(batches.epoch(epoch), 1):
                window.append(learner.step(batch))
                words += batch.words
                if first_step_seconds is None:
                    float(window[0])  # waits for it
                    first_step_seconds = time.perf_counter() - started
                progress.advance(task)
                if iteration % options.log_every and iteration != len(batches):
                    continue
                steps = [float(loss) for loss in window]  # waits for them
                now = time.perf_counter()
                losses.append(float(np.mean(steps)))
                loss_epochs.append(epoch + iteration / len(batches))
                speeds.append(words / (now - since))
                progress.update(task, speed=f"{speeds[-1]:,.0f} tokens/s")
                line = (
                    f"[epoch:{epoch + 1}/{options.epochs}] [iter:{iteration:4d}] "
                    f"elapsed time:{now - started:4.0f} secs   loss: {losses[-1]:.5f}"
                )
                console.print(line, markup=False, highlight=False, soft_wrap=True)
                about = {"epoch": epoch + 1, "iteration": iteration, "seconds": now - started}
                file.write(json.dumps({**about, "loss": losses[-1], "step_losses": steps}) + "\n")
                file.flush()
                if scalars:
                    done = epoch * len(batches) + iteration
                    scalars.write(done, {"loss": losses[-1], "tokens_per_second": speeds[-1]})
                window, words, since = [], 0, now
    return {
        "losses": losses,
        "loss_epochs": loss_epochs,
        "train_seconds": time.perf_counter() - started,
        "first_step_seconds": first_step_seconds,
        "tokens_per_second": float(np.median(speeds)),
    }


def predict(learner: Learner, batches: Batches) -> tuple[np.ndarray, np.ndarray]:
    """The logits [N, C] of all reviews and their labels [N], in the order of the split."""
    logits: np.ndarray | None = None
    for batch in batches.epoch():
        found, real = learner.logits(batch), batch.reviews >= 0
        if logits is None:
            logits = np.zeros((len(batches.split), found.shape[1]), found.dtype)
        logits[batch.reviews[real]] = found[real]
    assert logits is not None, "a split has at least one review"
    return logits, np.asarray(batches.split.labels)


def _peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
