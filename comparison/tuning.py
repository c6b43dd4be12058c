"""Searches for better options on held-out training reviews: `python compare.py tune`.

Optuna chooses and prunes trials; processes and machines share its storage. A trial is a process on
its own core. It runs the training loop, reports to Optuna after each epoch, and tests nothing.
"""

if __name__ == "__main__":
    from common.program import start

    start()

import dataclasses
import hashlib
import json
import logging
import shlex
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from common.data import sources
from common.errors import InputError, NotFiniteError, Stopped, exit_on_input_error, masked
from common.extras import require
from common.report.schema import Trial, Tuning
from common.training.data import load_texts
from common.training.learner import Framework
from common.training.loop import Trainer
from common.training.memory import keep_freed_memory
from common.training.options import PRESETS, TrainConfig, option, parse_options, to_arguments
from common.training.recipe import recipe_of
from common.training.run_directory import MAY_CHANGE
from comparison import processes
from comparison.processes import Job, Place

if TYPE_CHECKING:
    import optuna

SIZES = {"hidden_size": (64, 128, 192, 256), "batch_size": (16, 32, 64)}
DROPOUT = {"word_dropout": 0.5, "vector_dropout": 0.5, "feature_dropout": 0.7}  # upper limits
LEARNING_RATES = (2e-4, 1e-2)
FEW = 200  # validation reviews, on which accuracy has a 95 % interval of up to ± 7 points
HEARTBEAT = 60  # seconds; a trial without a heartbeat for twice as long has failed
PREFIX = "trial "  # of the lines of a trial that are shown
print_line = partial(print, flush=True)


@dataclass(frozen=True)
class TrialConfig(TrainConfig):
    """Run one trial of a study; prints a line for each epoch."""

    framework: str = "torch"
    storage: str = ""
    study: str = ""
    trials: int = 0
    """The number of trials at which the study ends."""
    given: bool = False
    """Try these options unchanged, instead of options that Optuna chooses."""


def main() -> None:
    with exit_on_input_error():
        options = parse_options(TrialConfig, "python -m comparison.tuning")
        framework: Any = import_module(f"{options.framework}_impl.learner")
        keep_freed_memory()
        with optuna_of(options.storage) as optuna:
            storage, pruner = _storage(options.storage), optuna.pruners.MedianPruner()
            sampler = optuna.samplers.TPESampler()
            if options.given:
                fixed = {
                    name: getattr(options, name) for name in ("learning_rate", *SIZES, *DROPOUT)
                }
                sampler = optuna.samplers.PartialFixedSampler(fixed, sampler)
            study = optuna.load_study(
                study_name=options.study, storage=storage, sampler=sampler, pruner=pruner
            )
            optuna.storages.fail_stale_trials(study)
            if len(counted(study, running=True)) < options.trials:
                objective = partial(_try, options, framework)
                study.optimize(objective, n_trials=1, catch=(NotFiniteError,))


def _try(options: TrialConfig, framework: Framework, trial: "optuna.Trial") -> float:
    """Train with the options that Optuna suggests; returns the lowest validation loss."""
    from optuna import TrialPruned

    number, begun = trial.number, time.perf_counter()
    chosen = suggest(trial, options.plain())
    trial.set_user_attr("given", options.given)
    values = " ".join(f"{option(name)} {value}" for name, value in rounded(trial.params).items())
    print_line(f"{PREFIX}{number}: {values}")

    class TrialTrainer(Trainer):
        """A training loop that reports to Optuna, and neither tests nor saves checkpoints."""

        def log(self, ended: bool) -> None:
            super().log(ended)
            line = self.lines[-1]
            if ended and line.validation_loss is not None:
                trial.report(line.validation_loss, line.epoch)
                if line.validation_loss == self.state.best_loss:
                    trial.set_user_attr("accuracy", line.validation_accuracy)
                print_line(
                    f"{PREFIX}{number}: epoch {line.epoch} of {chosen.epochs}, validation loss "
                    f"{line.validation_loss:.5f}, accuracy {line.validation_accuracy:.2%}"
                )
                if line.epoch < chosen.epochs and trial.should_prune():
                    print_line(f"{PREFIX}{number}: pruned, worse than most trials at this epoch")
                    raise TrialPruned

        def save(self) -> None:
            self.check_pending()

        def finish(self) -> dict[str, Any]:
            return {}

    try:
        with tempfile.TemporaryDirectory(prefix=".trial-", dir=options.out) as name:
            trainer = TrialTrainer(framework, chosen, Path(name), None)
            trainer.run()
    except NotFiniteError as error:
        print_line(f"{PREFIX}{number}: failed: {error}")
        trial.set_user_attr("error", str(error))
        raise
    finally:
        trial.set_user_attr("seconds", time.perf_counter() - begun)
    best = trainer.state.best_loss
    assert best is not None
    print_line(f"{PREFIX}{number}: done, {best:.5f} in {time.perf_counter() - begun:.0f} s")
    return best


def suggest(trial: "optuna.Trial", options: TrainConfig) -> TrainConfig:
    """The options with suggested values; the search space contains the values of `options`."""
    rate, (low, high) = options.learning_rate, LEARNING_RATES
    trial.suggest_float("learning_rate", min(low, rate), max(high, rate), log=True)
    for name, sizes in SIZES.items():
        trial.suggest_categorical(name, sorted({*sizes, getattr(options, name)}))
    for name, limit in DROPOUT.items():
        trial.suggest_float(name, 0, max(limit, getattr(options, name)))
    return dataclasses.replace(options, **rounded(trial.params))


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Floats with three significant digits, for command lines."""
    return {name: float(f"{v:.3g}") if isinstance(v, float) else v for name, v in values.items()}


def tune(
    framework: str,
    options: TrainConfig,
    storage: str,
    trials: int,
    place: Place,
    report: Callable[[str], None],
) -> Tuning:
    """Continue the study of these options until it has `trials` trials; returns all of them.

    report receives lines of progress. Raises InputError if Optuna or the storage is unavailable,
    and as processes.run does.
    """
    require("tune", what="tune: ")
    texts, train, *_ = load_texts(options, report)
    if not options.validation_size:
        options = dataclasses.replace(options, validation_size=max(len(train) // 10, 1))
    if options.validation_size < FEW:
        few = f"{options.validation_size} validation reviews are few"
        report(f"{few}: the best options on them are mostly chance (--validation-size)")
    recipe_of(options, 1, train.labels, len(texts.classes))
    import_module(f"{framework}_impl.learner").check(options)
    name = f"{framework} {options.model} on {options.data}, {_digest(options)}"
    with optuna_of(storage) as optuna:
        database = _storage(storage)
        if options.restart and name in optuna.get_all_study_names(database):
            optuna.delete_study(study_name=name, storage=database)
        study = optuna.create_study(study_name=name, storage=database, load_if_exists=True)
        optuna.storages.fail_stale_trials(study)
    count = len(counted(study))
    report(f"{name}: {count} of {trials} trials exist in {masked(storage)}")
    arguments = to_arguments(dataclasses.replace(options, restart=False))
    arguments += ["--framework", framework, "--storage", storage, "--study", name]
    arguments += ["--trials", str(trials)]
    jobs = [
        Job(f"job {number}", "comparison.tuning", tuple(arguments))
        for number in range(count, trials)
    ]
    if jobs and not any(trial.user_attrs.get("given") for trial in counted(study, running=True)):
        jobs[0] = dataclasses.replace(jobs[0], arguments=(*arguments, "--given"))
    try:
        processes.run(
            jobs,
            place,
            lambda job, line: report(line) if line.startswith(PREFIX) else None,
            lambda job: None,
        )
    except Stopped as stopped:
        message = "; the same command continues, with new trials instead of the running ones"
        raise Stopped(stopped.status - 128, message) from None
    return gather(study, framework, options)


def counted(study: "optuna.Study", running: bool = False) -> list["optuna.trial.FrozenTrial"]:
    """The trials that ended by themselves; stopped and killed trials are excluded."""
    from optuna.trial import TrialState

    ended = {TrialState.COMPLETE, TrialState.PRUNED, *([TrialState.RUNNING] if running else [])}
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state in ended or (trial.state == TrialState.FAIL and "error" in trial.user_attrs)
    ]


def gather(study: "optuna.Study", framework: str, options: TrainConfig) -> Tuning:
    """The study's trials, and the command that trains with the best options."""
    trials = [
        {
            **trial.user_attrs,
            "number": trial.number,
            "state": "failed" if trial.state.name == "FAIL" else trial.state.name.lower(),
            "options": rounded(trial.params),
            "losses": [loss for _, loss in sorted(trial.intermediate_values.items())],
        }
        for trial in counted(study)
    ]
    tuning = Tuning(study.study_name, "", msgspec.convert(trials, list[Trial]))
    if tuning.best:
        changes: dict[str, Any] = {**tuning.best.options, "out": None, "restart": False}
        chosen = dataclasses.replace(options, **changes)
        preset = TrainConfig(preset=chosen.preset, **PRESETS[chosen.preset])
        command = ["python", "-m", f"{framework}_impl.train", "--preset", chosen.preset]
        tuning.command = shlex.join([*command, *to_arguments(chosen, preset)])
    return tuning


@contextmanager
def optuna_of(storage: str) -> Iterator[Any]:
    """Yields the module optuna, without logging. Errors of the storage become InputError."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(logging.CRITICAL)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    try:
        yield optuna
    except (SQLAlchemyError, ImportError) as error:
        problem = str(error).splitlines()[0]
        raise InputError(f"--storage {masked(storage)}: cannot be opened: {problem}") from None


def _storage(url: str) -> "optuna.storages.RDBStorage":
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import SQLAlchemyError

    connect = partial(RDBStorage, url, heartbeat_interval=HEARTBEAT)
    # If two processes create the tables of a new storage, one fails because some tables exist.
    for patience in (0.2, 1, 2):
        try:
            return connect()
        except SQLAlchemyError:
            time.sleep(patience)
    return connect()


def _digest(options: TrainConfig) -> str:
    """A digest of the options and data of all trials, which identifies the study."""
    excluded = MAY_CHANGE - {"epochs"}
    common = {name: value for name, value in vars(options).items() if name not in excluded}
    text = json.dumps([common, sources.fingerprint(options.data)], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


if __name__ == "__main__":
    main()
