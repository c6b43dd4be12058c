"""The training loop. It drives the learner of either framework and writes the run directory."""

import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
from jaxtyping import Float, Int
from rich.progress import MofNCompleteColumn, Progress

from common import files, metrics, params
from common.cores import cores
from common.errors import InputError, NotFiniteError, Stopped, exit_on_input_error
from common.signals import stop_requests
from common.training import checkpoint, run_directory
from common.training.checkpoint import Checkpoint, LogLine, State
from common.training.data import Data, fingerprint_of, load_data
from common.training.learner import Framework, predict, validate
from common.training.memory import give_back, keep_freed_memory, peak_bytes
from common.training.options import MODELS, TrainConfig, option, parse_options
from common.training.recipe import recipe_of
from common.training.run_directory import About
from common.training.world import ALONE, World, joined, launched, restarted

print_line = partial(print, flush=True)


def main(framework: Framework) -> None:
    """The command line of `python -m torch_impl.train` and `python -m jax_impl.train`."""
    with exit_on_input_error():
        # With several workers, the steps of XLA run in other threads, because they wait for the
        # exchange of gradients.
        keep_freed_memory(by_all_threads=launched())
        with joined(framework) as world:
            options = world.call_in_all(lambda: _options(framework))[world.rank]
            train(framework, options, world)


def _options(framework: Framework) -> TrainConfig:
    """The validated options of the command line."""
    name = framework.FRAMEWORK
    options = parse_options(TrainConfig, f"python -m {name}_impl.train")
    if options.resume is not None:
        options = _resumed(options.resume, f"python -m {name}_impl.train")
    options.check()
    if options.model not in MODELS[name]:
        raise InputError(f"--model {options.model}: {name} has {', '.join(MODELS[name])}")
    if options.deterministic:
        framework.make_deterministic()
    framework.check(options)
    return options


def _resumed(folder: Path, program: str) -> TrainConfig:
    """The options of a saved run, updated by those of the command line."""
    saved = checkpoint.newest(folder, warn=lambda line: None)
    if saved is None:
        raise InputError(f"--resume {folder}: has no checkpoint")
    # Trainer uses the shares of the checkpoint, unless there are more workers.
    defaults = dataclasses.replace(saved.about.options, out=None, shares=None)
    options = parse_options(TrainConfig, program, default=defaults)
    if options.out is not None:
        raise InputError(f"--out {options.out}: --resume {folder} already names the run directory")
    return dataclasses.replace(options, out=folder)


def train(framework: Framework, options: TrainConfig, world: World = ALONE) -> dict[str, Any]:
    """Train and test a classifier and write its run directory; returns the content of metrics.json.

    If that directory has a run with the same options, an interrupted run is continued, and a
    finished one is not changed. Raises the exceptions of Trainer.
    """
    world.same("options", options)
    out = options.out or Path("runs") / f"{framework.FRAMEWORK}-{options.model}"

    def begin() -> Checkpoint | dict[str, Any] | None:
        """The checkpoint to resume from, or the metrics of the finished run."""
        locked.enter_context(run_directory.lock(out))
        if options.restart and not restarted():
            run_directory.clear(out)
        elif done := run_directory.finished(out, framework.FRAMEWORK, options):
            print_line(f"Accuracy: {done['accuracy']:.2%}")
            print_line(
                f"{out}: this run was finished before (--epochs continues, --restart replaces it)"
            )
            return done
        saved = checkpoint.newest(out, print_line)
        if problem := _problem(framework.FRAMEWORK, options, out, saved):
            raise InputError(f"{out}: {problem}; --restart replaces it")
        return saved

    with ExitStack() as locked:
        start = world.call_in_first(begin)
        if isinstance(start, dict):
            return start
        return Trainer(framework, options, out, start, world).run()


def _problem(framework: str, options: TrainConfig, out: Path, saved: Checkpoint | None) -> str:
    """The reason why a run with these options cannot resume from the checkpoint, or ""."""
    if saved is None:
        return "holds a run without checkpoints" if (out / run_directory.CONFIG).exists() else ""
    if saved.removed_options:
        removed = ", ".join(f"{option(n)} {v}" for n, v in saved.removed_options.items())
        path = saved.path.relative_to(out) / run_directory.CONFIG
        return f"{path} has {removed}, which this release no longer has"
    changeable = run_directory.MAY_CHANGE
    if options.scheduled:
        changeable = changeable - {"epochs"}  # a learning rate depends on the number of all steps
    if different := run_directory.differences(saved.about.options, options, changeable):
        reason = " (its learning rates depend on --epochs)" if "epochs" not in changeable else ""
        return f"holds another run: {', '.join(different)}{reason}"
    if options.resume is None and saved.about.framework != framework:
        was = saved.about.framework
        return f"holds a run of {was}; --resume {out} continues it in {framework}"
    if (saved.state.epoch, saved.state.iteration) > (options.epochs, 0):
        return f"is already in epoch {saved.state.epoch + 1}, after --epochs {options.epochs}"
    return ""


def load_by_all(world: World, options: TrainConfig) -> Data:
    """Load the data in each worker; preprocessing takes place once and is cached."""
    data: list[Data] = []
    world.call_in_all(lambda: data.append(load_data(options, print_line)))
    give_back()
    return data[0]


class Trainer:
    """One run, from the beginning or a checkpoint to the end.

    framework: the module of a twin. out: the run directory, which is locked. saved: the checkpoint
    to resume from. world: the workers, each of which has a Trainer; only the first worker writes.
    Every log_every iterations, a line is printed and appended to log.jsonl. Every
    checkpoint_seconds, and at the end, a checkpoint is written.

    Raises InputError if the data differ from those of the checkpoint and for a file that cannot be
    written; NotFiniteError for a loss or gradient that is not finite, at the next log line or
    checkpoint; Stopped after a SIGINT or SIGTERM, when the current step is complete and saved.
    """

    def __init__(
        self,
        framework: Framework,
        options: TrainConfig,
        out: Path,
        saved: Checkpoint | None,
        world: World = ALONE,
    ) -> None:
        self.out, self.world = out, world
        before = saved.about.options.shares or 1 if saved else None
        shares = self.shares_of(options, before)
        options = dataclasses.replace(options, out=out, resume=None, restart=False, shares=shares)
        self.options = options
        self.data = data = load_by_all(world, options)
        shape, classes = data.vectors.matrix.shape, len(data.classes)
        model = options.model_config(shape, classes, data.vectors.trained_with_model)
        name = framework.FRAMEWORK
        self.about = About(model, self.options, data.classes, name, example=data.example)
        fingerprint = fingerprint_of(options, data)
        world.same("data or word vectors", fingerprint)
        if saved and (saved.about.model, saved.state.data) != (model, fingerprint):
            raise InputError(f"{saved.path}: the data or the word vectors have changed since")

        self.started = time.perf_counter()  # _resume subtracts the time before the interruption
        steps, labels = options.epochs * len(data.train), data.train.split.labels
        recipe = recipe_of(options, steps, labels, classes)
        matrix = data.vectors.matrix
        self.learner = framework.Learner(model, options, matrix, recipe=recipe, world=world)
        implementation = self.learner.implementation
        kind = "" if options.dtype == "float32" else f", {options.dtype}"
        print_line(
            f"{framework.FRAMEWORK} {options.model} ({implementation}{kind}) on {data.name}: "
            f"{len(data.train.split):,} reviews to train on, {len(data.test.split):,} to test on, "
            f"{shape[0]:,} words with a vector"
        )
        is_auto = options.dtype == "bfloat16" and options.implementation == "auto"
        if is_auto and implementation == "scan":
            print_line("bfloat16: computed by scan, because no kernel on this machine supports it")
        self.state = State(fingerprint, implementation)
        self.temperature = 1.0
        self.lines: list[LogLine] = []
        self.best: dict[str, np.ndarray] = {}  # the parameters with the lowest validation loss
        self.pending: list[tuple[SupportsFloat, SupportsFloat]] = []  # losses and norms of steps
        if saved:
            self._resume(saved, f"{framework.FRAMEWORK} {implementation}")
        if world.first:
            with files.writing(out / "log.jsonl"):
                files.replace(out / "log.jsonl", saved.log if saved else b"")
        self.scalars = None
        if options.tensorboard and world.first:
            from tensorboardX import SummaryWriter  # an extra

            # Events of later steps, which the interrupted run has written, are invalid.
            start = self.state.step + 1
            self.scalars = SummaryWriter(str(out / "tensorboard"), purge_step=start)
        self.progress = Progress(
            *Progress.get_default_columns(), MofNCompleteColumn(), disable=not sys.stdout.isatty()
        )
        self.saved_step, self.saved_at = self.state.step, time.perf_counter()
        self.logged_at = self.saved_at - self.state.words_seconds

    def _resume(self, saved: Checkpoint, now: str) -> None:
        """Resume from a checkpoint. now: the framework and the implementation of this run."""
        self.learner.load(saved.parameters, saved.optimizer_state)
        print_line(f"resuming after step {saved.state.step:,}, from {saved.path}")
        was = f"{saved.about.framework} {saved.state.implementation}"
        if saved.state.step and was != now:
            print_line(f"the run was begun with {was}: with {now}, results differ by rounding")
        before, shares = saved.about.options.shares or 1, self.options.shares
        if before != shares:
            print_line(
                f"the run was begun with {before} shares: with {shares}, results differ by rounding"
            )
        self.state = dataclasses.replace(saved.state, implementation=self.state.implementation)
        self.lines, self.best = list(saved.lines()), saved.best
        self.started -= saved.state.seconds

    def shares_of(self, options: TrainConfig, before: int | None) -> int:
        """The number of shares of a batch. before: that of the checkpoint."""
        size = self.world.size
        if options.shares is None:
            return before if before and before >= size else size
        if options.shares < size:
            raise InputError(f"--shares {options.shares}: fewer than the {size} workers")
        return options.shares

    def run(self) -> dict[str, Any]:
        """Train to the end, test, and write the run directory; returns the metrics."""
        state, options, batches = self.state, self.options, self.data.train
        steps = options.epochs * len(batches)
        self.task = self.progress.add_task("training", total=steps, completed=state.step)
        with self.progress, stop_requests() as signals:
            while state.epoch < options.epochs:
                if options.patience and state.epochs_since_best >= options.patience:
                    print_line(
                        f"stopping: no lower validation loss in {state.epochs_since_best} epochs"
                    )
                    break
                for rows in batches.plan(state.epoch)[state.iteration :]:
                    stop = self.step(rows, signals)
                    ended = state.iteration == len(batches)
                    if ended or state.iteration % options.log_every == 0:
                        self.log(ended)
                    if ended:
                        state.epoch, state.iteration = state.epoch + 1, 0
                    due = time.perf_counter() - self.saved_at >= options.checkpoint_seconds
                    if stop or (due and self.world.first):
                        self.save()
                    if stop:
                        number = signals[0] if signals else signal.SIGTERM
                        hint = "the same command continues the run"
                        raise Stopped(number, f" after step {state.step:,}; {hint}")
            self.save()
        print_line(f"Total training time: {state.seconds:.0f} secs")
        return self.finish()

    def step(self, rows: Int[np.ndarray, " B"], signals: Sequence[int]) -> bool:
        """Take a step. Its loss may be computed asynchronously: `check_pending` waits for the loss.

        signals: those that have requested a stop of this worker. Returns whether all workers
        stop now.
        """
        state, batches = self.state, self.data.train
        shares = [batches.share(rows, k) for k in self.world.shares(batches.shares)]
        before = self.learner.stop_requests
        loss = self.learner.step(*shares, stop_requested=bool(signals))
        self.pending.append((loss, self.learner.gradient_norm))
        state.step += 1
        state.iteration += 1
        state.words += batches.words(rows)
        if state.first_step_seconds is None:
            float(self.pending[0][0])  # waits for the step
            state.first_step_seconds = time.perf_counter() - self.started
        self.progress.advance(self.task)
        # The value of the step before, because this step may still be computed.
        return bool(signals) if self.world.size == 1 else float(before) > 0

    def check_pending(self) -> None:
        """Wait for the pending steps. Raises NotFiniteError unless their numbers are finite."""
        state = self.state
        for iteration, pair in enumerate(self.pending, state.iteration - len(self.pending) + 1):
            loss, norm = map(float, pair)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                step = state.step - state.iteration + iteration
                reviews = self.data.train.plan(state.epoch)[iteration - 1]
                raise NotFiniteError(
                    f"the loss is {loss}, the norm of the gradient {norm} in step {step} "
                    f"(epoch {state.epoch + 1}, iteration {iteration}), on the training reviews "
                    f"{' '.join(map(str, reviews[reviews >= 0]))}; the last good checkpoint is "
                    f"{checkpoint.last(self.out) or 'none'}"
                )
            state.losses.append(loss)
            state.gradient_norms.append(norm)
        self.pending.clear()

    def log(self, ended: bool) -> None:
        """Print and write a log line for the steps since the last one; after an epoch, validate."""
        self.check_pending()
        state, now = self.state, time.perf_counter()
        line = LogLine(
            epoch=state.epoch + 1,
            iteration=state.iteration,
            seconds=now - self.started,
            loss=float(np.mean(state.losses)),
            gradient_norm=float(np.mean(state.gradient_norms)),
            tokens_per_second=state.words / (now - self.logged_at),
        )
        speed = f"training, {line.tokens_per_second:,.0f} tokens/s"
        self.progress.update(self.task, description=speed)
        print_line(
            f"[epoch:{line.epoch}/{self.options.epochs}] [iter:{line.iteration:4d}] "
            f"elapsed time:{line.seconds:4.0f} secs   loss: {line.loss:.5f}"
        )
        if ended and self.data.validation:
            loss, accuracy = validate(self.learner, self.data.validation)
            line = dataclasses.replace(line, validation_loss=loss, validation_accuracy=accuracy)
            print_line(f"validation loss: {loss:.5f}   accuracy: {accuracy:.2%}")
            state.epochs_since_best += 1
            if state.best_loss is None or loss < state.best_loss:
                state.best_loss, state.epochs_since_best = loss, 0
                self.best = self.learner.parameters()
        self.lines.append(line)
        path = self.out / "log.jsonl"
        if self.world.first:
            with files.writing(path), path.open("a") as file:
                file.write(json.dumps({**vars(line), "step_losses": state.losses}) + "\n")
        self.write_scalars(loss=line.loss, tokens_per_second=line.tokens_per_second)
        state.losses, state.gradient_norms, state.words = [], [], 0
        self.logged_at = time.perf_counter()

    def write_scalars(self, **values: float) -> None:
        """Write values for TensorBoard, with --tensorboard, and flush them."""
        if self.scalars:
            for name, value in values.items():
                self.scalars.add_scalar(name, value, self.state.step)
            self.scalars.flush()

    def save(self) -> None:
        """Write a checkpoint if a step has been taken since the last one."""
        self.check_pending()
        state, learner, now = self.state, self.learner, time.perf_counter()
        state.seconds, state.words_seconds = now - self.started, now - self.logged_at
        if state.step != self.saved_step and self.world.first:
            tensors = learner.parameters(), learner.optimizer_state(), self.best
            checkpoint.save_checkpoint(self.out, self.about, state, *tensors)
        self.saved_step, self.saved_at = state.step, time.perf_counter()

    def finish(self) -> dict[str, Any]:
        """Test, and write the files of a finished run; returns the metrics."""
        if self.best:
            self.learner.load(self.best)
        if self.options.temperature and self.data.validation:
            self.calibrate(*predict(self.learner, self.data.validation, world=self.world))
        results, vectors = self.results(), self.data.vectors
        if not self.world.first:
            return results
        ratios = self.data.ratios.tensors() if self.data.ratios else {}
        tensors = {
            run_directory.VECTORS: {"vectors": vectors.matrix, **ratios},
            run_directory.MODEL: self.learner.parameters(),
        }
        run_directory.write(self.out, self.about, vectors.words, results, tensors)
        self.write_scalars(test_accuracy=results["accuracy"])
        if self.scalars:
            self.scalars.close()
        return results

    def calibrate(self, logits: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"]) -> None:
        """Fit a temperature to logits and labels, and divide the weights of the head by it."""
        self.temperature = metrics.fit_temperature(logits, labels)
        print_line(metrics.describe_temperature(self.temperature))
        parameters = self.learner.parameters()
        for name in ("head.weight", "head.bias"):
            parameters[name] = parameters[name] / np.float32(self.temperature)
        self.learner.load(parameters)

    def results(self) -> dict[str, Any]:
        """Test, and return the metrics of the test and of the training."""
        data, state, lines, test = self.data, self.state, self.lines, self.data.test.split
        groups = test.categories, data.categories
        if len(test) * len(data.classes) <= metrics.MOST_SCORES:
            logits, labels = predict(self.learner, data.test, world=self.world)
            evaluated = metrics.evaluate(logits, labels, data.classes, *groups)
        else:
            answers, labels = predict(self.learner, data.test, metrics.answers, self.world)
            evaluated = metrics.evaluate_answers(answers, labels, data.classes, *groups)
        return {
            "framework": self.about.framework,
            "model": self.options.model,
            "implementation": self.learner.implementation,
            **evaluated,
            "losses": [line.loss for line in lines],
            "loss_epochs": [line.epoch - 1 + line.iteration / len(data.train) for line in lines],
            "epochs": state.epoch,
            "validation_loss": state.best_loss,
            "temperature": self.temperature,
            "train_seconds": state.seconds,
            "cores": sum(self.world.gather_values(cores())),
            "first_step_seconds": state.first_step_seconds,
            "tokens_per_second": float(np.median([line.tokens_per_second for line in lines])),
            "compilations": self.learner.compilations,
            "peak_memory_bytes": sum(self.world.gather_values(peak_bytes())),
            "parameters": sum(map(math.prod, params.shapes(self.about.model).values())),
            "data": {
                "name": data.name,
                "train": len(data.train.split),
                "test": len(test),
                "left_out": data.left_out,
                "vectors": self.options.vectors,
                "vocabulary": len(data.vectors.words),
            },
        }
