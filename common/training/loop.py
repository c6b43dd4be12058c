"""The one training loop: it drives a learner of either framework and writes its run directory."""

import dataclasses
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from common import files, metrics, params
from common.data import corpus, sources, vectors
from common.data.batches import Batch, Batches
from common.data.encoding import cores
from common.errors import InputError, NotFiniteError, Stopped, exit_on_input_error
from common.signals import stop_requests
from common.training import checkpoint
from common.training.checkpoint import About, LogLine, State
from common.training.memory import keep_freed_memory
from common.training.options import MODELS, TrainConfig, parse_options
from common.training.tensorboard import Scalars


class Learner(Protocol):
    """A classifier, its loss and its optimizer in some framework; arrays come and go as NumPy."""

    implementation: str
    """What computes the GRU: loop, scan, nn.GRU."""
    compilations: int
    """How often the training step was compiled."""
    gradient_norm: Any
    """Of the last step, over all parameters, before clipping; may still be being computed."""

    def step(self, batch: Batch) -> Any:
        """Take one optimizer step; returns the loss, which may still be being computed."""

    def logits(self, batch: Batch) -> np.ndarray: ...

    def explain(self, batch: Batch) -> dict[str, np.ndarray]: ...

    def parameters(self) -> dict[str, np.ndarray]: ...

    def optimizer_state(self) -> dict[str, np.ndarray]: ...

    def load(
        self,
        parameters: dict[str, np.ndarray],
        optimizer_state: dict[str, np.ndarray] | None = None,
    ) -> None: ...


class Framework(Protocol):
    """The module of a twin that has its learner, torch_impl.learner or jax_impl.learner."""

    __name__: str
    FRAMEWORK: str
    Learner: Any

    def make_deterministic(self) -> None:
        """Have the framework compute the same numbers each time on a GPU, too."""

    def find_device(self, name: str) -> Any:
        """The device of this name. Raises InputError where the machine has none."""

    def resolve(self, implementation: str, device: str = "cpu") -> str:
        """The implementation that is meant. Raises InputError where there is none."""


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run trains and tests on."""

    name: str
    classes: tuple[str, ...]
    categories: tuple[str, ...]
    vectors: vectors.WordVectors
    train: Batches
    test: Batches
    validation: Batches | None = None


def load_data(options: TrainConfig, report: Callable[[str], None]) -> Data:
    """The data set and word vectors that the options name, as batches.

    report is told, in a line of text, of work that takes seconds.
    """
    texts = corpus.load(options.data, report)
    train, test = texts.train.subset(options.train_size), texts.test.subset(options.test_size)
    if options.validation_size >= len(train):
        raise InputError(
            f"--validation-size {options.validation_size}: leaves nothing of {len(train)} reviews"
        )
    train, validation = train.hold_out(options.validation_size)
    found = vectors.load(
        options.vectors, texts, train, report, train_with_model=options.train_vectors
    )
    ids = {word: number for number, word in enumerate(found.words)}
    new_ids = np.array([ids.get(word, -1) for word in texts.vocabulary], np.int32)
    train, test = train.renumber(new_ids), test.renumber(new_ids)
    validation = validation.renumber(new_ids)
    train_batches = Batches(
        train,
        options.batch_size,
        max_length=options.max_length,
        seed=options.seed,
        longest=int(max(test.lengths.max(initial=0), validation.lengths.max(initial=0))),
    )
    test_batches, validation_batches = (
        Batches(
            split,
            options.batch_size,
            max_length=options.max_length,
            in_order=True,
            shapes=train_batches.shapes,
        )
        for split in (test, validation)
    )
    return Data(
        texts.name,
        texts.classes,
        texts.categories,
        found,
        train_batches,
        test_batches,
        validation_batches if options.validation_size else None,
    )


def fingerprint_of(options: TrainConfig, data: Data) -> str:
    """What a checkpoint says of its data and word vectors, to go on with no others."""
    return checkpoint.fingerprint(
        json.dumps(sources.fingerprint(options.data)).encode(),
        "\n".join(data.vectors.words).encode(),
        data.vectors.matrix,
        data.train.lengths,
        data.train.split.labels,
    )


def main(framework: Framework) -> None:
    """The command line of `python -m torch_impl.train` and `python -m jax_impl.train`."""
    with exit_on_input_error():
        program = f"python -m {framework.__name__.partition('.')[0]}.train"
        options = parse_options(TrainConfig, program)
        if options.resume is not None:
            options = _resumed(options.resume, program)
        options.check()
        if options.model not in (models := MODELS[framework.FRAMEWORK]):
            raise InputError(
                f"--model {options.model}: {framework.FRAMEWORK} has {', '.join(models)}"
            )
        if options.deterministic:
            framework.make_deterministic()
        framework.find_device(options.device)
        framework.resolve(options.implementation)
        keep_freed_memory()
        train(framework, options)


def _resumed(folder: Path, program: str) -> TrainConfig:
    """The options of a run, and what the command line changes of them."""
    saved = checkpoint.newest(folder, warn=lambda line: None)
    if saved is None:
        raise InputError(f"--resume {folder}: there is no checkpoint to go on from")
    options = parse_options(
        TrainConfig, program, default=dataclasses.replace(saved.about.options, out=None)
    )
    if options.out is not None:
        raise InputError(f"--out {options.out}: --resume {folder} says where already")
    return dataclasses.replace(options, out=folder)


def train(framework: Framework, options: TrainConfig) -> dict[str, Any]:
    """Train a classifier, test it, and write its run directory; returns what metrics.json holds.

    A run of the same options that was interrupted in that directory goes on; one that is finished
    is left as it is.
    """
    out = options.out or Path("runs") / f"{framework.FRAMEWORK}-{options.model}"
    checkpoint.prepare(out)
    with checkpoint.lock(out):
        return _train(framework, options, out)


def _train(framework: Framework, options: TrainConfig, out: Path) -> dict[str, Any]:
    console = Console()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    if options.restart:
        checkpoint.clear(out)
    elif done := checkpoint.finished(out, framework.FRAMEWORK, options):
        say(f"Accuracy: {done['accuracy']:.2%}")
        say(f"{out}: this run was finished before (--epochs trains on, --restart anew)")
        return done
    saved = checkpoint.newest(out, say)
    if saved is None:
        if (out / "config.json").exists():
            raise InputError(
                f"{out}: holds a run without checkpoints; --restart trains anew in its place"
            )
    else:
        checkpoint.check_same(saved, options)
        if options.resume is None and saved.about.framework != framework.FRAMEWORK:
            raise InputError(
                f"{out}: holds a run of {saved.about.framework}; --resume {out} goes on with it in "
                f"{framework.FRAMEWORK}, --restart trains anew in its place"
            )
    options = dataclasses.replace(options, out=out, resume=None, restart=False)

    data = load_data(options, say)
    model = options.model_config(
        input_size=data.vectors.matrix.shape[1],
        classes=len(data.classes),
        vocabulary_size=len(data.vectors.words),
        train_vectors=data.vectors.trained_with_model,
    )
    about = About(framework.FRAMEWORK, data.classes, model, options, checkpoint.FORMAT)
    fingerprint = fingerprint_of(options, data)
    if saved and (saved.about.model, saved.state.data) != (model, fingerprint):
        raise InputError(f"{saved.path}: is of other data or word vectors than there are now")

    started = time.perf_counter()
    learner = framework.Learner(model, options, data.vectors.matrix, saved and saved.parameters)
    say(
        f"{framework.FRAMEWORK} {options.model} ({learner.implementation}) on {data.name}: "
        f"{len(data.train.split):,} reviews to train on, {len(data.test.split):,} to test on, "
        f"{len(data.vectors.words):,} words with a vector"
    )
    best: dict[str, np.ndarray] = {}
    if saved is None:
        state, lines = State(data=fingerprint, implementation=learner.implementation), []
    else:
        state, lines, best = saved.state, saved.lines(), saved.best or {}
        learner.load(saved.parameters, saved.optimizer_state)
        say(f"going on after step {state.step:,}, from {saved.path}")
        was, now = (
            (saved.about.framework, state.implementation),
            (framework.FRAMEWORK, learner.implementation),
        )
        if state.step and was != now:
            say(f"begun with {' '.join(was)}: with {' '.join(now)} the last bits will differ")
        state.implementation = learner.implementation
    with files.writing(out / "log.jsonl"):
        files.replace(out / "log.jsonl", saved.log if saved else b"")

    def save() -> Path:
        return checkpoint.save_checkpoint(
            out,
            about,
            state,
            learner.parameters(),
            learner.optimizer_state(),
            best or None,
            options.keep,
        )

    scalars = Scalars(out / "tensorboard", state.step + 1) if options.tensorboard else None
    begun = started - state.seconds
    fit(learner, data, options, console, out, begun, state, lines, best, save, scalars)
    say(f"Total training time: {state.seconds:.0f} secs")
    if best:
        learner.load(best)

    logits, labels = predict(learner, data.test)
    results = {
        "framework": framework.FRAMEWORK,
        "model": options.model,
        "implementation": learner.implementation,
        **metrics.evaluate(
            logits, labels, data.classes, data.test.split.categories, data.categories
        ),
        "losses": [line.loss for line in lines],
        "loss_epochs": [line.epoch - 1 + line.iteration / len(data.train) for line in lines],
        "epochs": state.epoch,
        "validation_loss": state.best_loss,
        "train_seconds": state.seconds,
        "cores": cores(),
        "first_step_seconds": state.first_step_seconds,
        "tokens_per_second": float(np.median([line.tokens_per_second for line in lines])),
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
    from common.report import figures  # Altair takes a second and a half to import

    with files.writing(out / "figures"):
        figures.of_run(out / "figures", results, data.classes, options.preset)
    checkpoint.finish(
        out, about, data.vectors.words, data.vectors.matrix, learner.parameters(), results
    )
    say(f"Accuracy: {results['accuracy']:.2%}")
    say(f"95 % interval: {low:.2%} to {high:.2%}   run directory: {out}")
    if scalars:
        scalars.write(state.step, {"test_accuracy": results["accuracy"]})
        scalars.close()
    return results


def fit(
    learner: Learner,
    data: Data,
    options: TrainConfig,
    console: Console,
    out: Path,
    started: float,
    state: State,
    lines: list[LogLine],
    best: dict[str, np.ndarray],
    save: Callable[[], Path],
    scalars: Scalars | None = None,
) -> None:
    """Run the epochs, from where `state` stands.

    Every log_every iterations it prints a log line and adds one to `lines` and out/log.jsonl; every
    checkpoint_seconds, and at the end, it calls save(). state, lines and best (the parameters with
    the lowest validation loss) are kept up to date for that. `started` is when training began, on
    the clock of time.perf_counter, without interruptions; the times include compilation.

    Raises NotFiniteError for a loss or gradient that is not finite, at the next log line or
    checkpoint; Stopped after a SIGINT or SIGTERM, when the step at work is done and saved.
    """
    batches = data.train
    if (state.epoch, state.iteration) > (options.epochs, 0):
        raise InputError(
            f"--epochs {options.epochs}: {out} is in its epoch {state.epoch + 1} already"
        )
    pending: list[tuple[Any, Any]] = []  # loss and gradient norm of steps that may not be done yet
    saved_step, saved_at = state.step, time.perf_counter()
    since = saved_at - state.words_seconds
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    def settle() -> None:
        """Wait for the steps taken, and see that their numbers are finite."""
        for number, (loss, norm) in enumerate(pending, state.iteration - len(pending)):
            for what, value in (("loss", float(loss)), ("norm of the gradient", float(norm))):
                if math.isfinite(value):
                    continue
                reviews = batches.plan(state.epoch)[number]
                raise NotFiniteError(
                    f"the {what} is {value} in step {state.step - state.iteration + number + 1} "
                    f"(epoch {state.epoch + 1}, iteration {number + 1}), on the training reviews "
                    f"{' '.join(str(review) for review in reviews if review >= 0)}; the last good "
                    f"checkpoint is {checkpoint.last(out) or 'none'}"
                )
            state.losses.append(float(loss))
            state.gradient_norms.append(float(norm))
        pending.clear()

    def log_line(ended: bool) -> None:
        """Print and write it; at the end of an epoch, with the validation."""
        nonlocal since
        settle()
        now = time.perf_counter()
        line = LogLine(
            epoch=state.epoch + 1,
            iteration=state.iteration,
            seconds=now - started,
            loss=float(np.mean(state.losses)),
            gradient_norm=float(np.mean(state.gradient_norms)),
            tokens_per_second=state.words / (now - since),
        )
        progress.update(task, speed=f"{line.tokens_per_second:,.0f} tokens/s")
        say(
            f"[epoch:{line.epoch}/{options.epochs}] [iter:{line.iteration:4d}] "
            f"elapsed time:{line.seconds:4.0f} secs   loss: {line.loss:.5f}"
        )
        if ended and data.validation:
            loss, accuracy = validate(learner, data.validation)
            say(f"validation loss: {loss:.5f}   accuracy: {accuracy:.2%}")
            line = dataclasses.replace(line, validation_loss=loss, validation_accuracy=accuracy)
            state.epochs_since_best += 1
            if state.best_loss is None or loss < state.best_loss:
                state.best_loss, state.epochs_since_best = loss, 0
                best.update(learner.parameters())
        lines.append(line)
        about = {**dataclasses.asdict(line), "step_losses": state.losses}
        with files.writing(out / "log.jsonl"), (out / "log.jsonl").open("a") as file:
            file.write(json.dumps(about) + "\n")
        if scalars:
            told = {"loss": line.loss, "tokens_per_second": line.tokens_per_second}
            scalars.write(state.step, told)
        state.losses, state.gradient_norms, state.words = [], [], 0
        since = time.perf_counter()

    def keep() -> None:
        nonlocal saved_step, saved_at
        settle()
        now = time.perf_counter()
        state.seconds, state.words_seconds = now - started, now - since
        if state.step != saved_step:
            save()
        saved_step, saved_at = state.step, time.perf_counter()

    with progress, stop_requests() as asked:
        total = options.epochs * len(batches)
        task = progress.add_task("training", total=total, completed=state.step, speed="")
        while state.epoch < options.epochs:
            if options.patience and state.epochs_since_best >= options.patience:
                say(f"no lower validation loss in {state.epochs_since_best} epochs: stopping")
                break
            for batch in batches.epoch(state.epoch, state.iteration):
                pending.append((learner.step(batch), learner.gradient_norm))
                state.step += 1
                state.iteration += 1
                state.words += batch.words
                if state.first_step_seconds is None:
                    float(pending[0][0])  # waits for it
                    state.first_step_seconds = time.perf_counter() - started
                progress.advance(task)
                ended = state.iteration == len(batches)
                if ended or state.iteration % options.log_every == 0:
                    log_line(ended)
                if ended:
                    state.epoch, state.iteration = state.epoch + 1, 0
                if asked or time.perf_counter() - saved_at >= options.checkpoint_seconds:
                    keep()
                if asked:
                    raise Stopped(
                        asked[0], f" after step {state.step:,}; the same command goes on from there"
                    )
        keep()


def validate(learner: Learner, batches: Batches) -> tuple[float, float]:
    """The mean cross-entropy and the accuracy on a split."""
    from scipy.special import log_softmax  # slow to import

    logits, labels = predict(learner, batches)
    losses = -log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels]
    if not np.isfinite(losses).all():
        raise NotFiniteError("the loss on the validation reviews is not finite")
    return float(losses.mean()), float((logits.argmax(axis=1) == labels).mean())


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
