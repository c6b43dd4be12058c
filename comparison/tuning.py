"""Search for better options on held-out training reviews: `python compare.py tune`.

Optuna chooses what to try and what to give up; its storage is where processes and machines meet. A
trial is a process, on a core of its own: the training loop as it is, but for a word to Optuna after
each epoch, and nothing of it is tested.
"""

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
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.data import sources
from common.errors import InputError, NotFiniteError, Stopped, exit_on_input_error, masked
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
DROPOUT = {"word_dropout": 0.5, "vector_dropout": 0.5, "feature_dropout": 0.7}  # at most
LEARNING_RATES = (2e-4, 1e-2)
FEW = 200  # validation reviews: the accuracy on so many has a 95 % interval of up to ± 7 points
HEARTBEAT = 60  # seconds; a trial that was silent for twice as long is given up
DONE = "trial "  # how a line for people begins
say = partial(print, flush=True)


@dataclass(frozen=True)
class TrialConfig(TrainConfig):
    """Take one trial of a study; prints a line an epoch."""

    framework: str = "torch"
    storage: str = ""
    study: str = ""
    trials: int = 0
    """No more, if the study has so many."""
    given: bool = False
    """Try the options as they are, and none that Optuna chooses."""


def main() -> None:
    """Run the command line of a trial."""
    with exit_on_input_error():
        options = parse_options(TrialConfig, "python -m comparison.tuning")
        framework: Any = import_module(f"{options.framework}_impl.learner")
        keep_freed_memory()
        with opened(options.storage) as optuna:
            storage, pruner = _storage(options.storage), optuna.pruners.MedianPruner()
            sampler = optuna.samplers.TPESampler()
            if options.given:
                sampler = optuna.samplers.PartialFixedSampler(_searched(options), sampler)
            study = optuna.load_study(
                study_name=options.study, storage=storage, sampler=sampler, pruner=pruner
            )
            optuna.storages.fail_stale_trials(study)
            if len(counted(study, running=True)) < options.trials:
                objective = partial(_try, options, framework)
                study.optimize(objective, n_trials=1, catch=(NotFiniteError,))


def _try(options: TrialConfig, framework: Framework, trial: "optuna.Trial") -> float:
    """Train with what Optuna suggests; the lowest loss on the validation reviews."""
    from optuna import TrialPruned

    number, begun = trial.number, time.perf_counter()
    chosen = suggest(trial, options.plain())
    trial.set_user_attr("given", options.given)
    what = " ".join(f"{option(name)} {value}" for name, value in rounded(trial.params).items())
    say(f"{DONE}{number}: {what}")

    class Tried(Trainer):
        """The training loop, which tells Optuna how it goes, and does not test."""

        def log(self, ended: bool) -> None:
            super().log(ended)
            line = self.lines[-1]
            if ended and line.validation_loss is not None:
                trial.report(line.validation_loss, line.epoch)
                if line.validation_loss == self.state.best_loss:
                    trial.set_user_attr("accuracy", line.validation_accuracy)
                say(
                    f"{DONE}{number}: epoch {line.epoch} of {chosen.epochs}, validation loss "
                    f"{line.validation_loss:.5f}, accuracy {line.validation_accuracy:.2%}"
                )
                if line.epoch < chosen.epochs and trial.should_prune():
                    say(f"{DONE}{number}: given up, being behind most trials at this epoch")
                    raise TrialPruned

        def save(self) -> None:
            self.settle()  # and no checkpoint: nothing goes on from one

        def finish(self) -> dict[str, Any]:
            return {}

    try:
        with tempfile.TemporaryDirectory(prefix=".trial-", dir=options.out) as name:
            trainer = Tried(framework, chosen, Path(name), None)
            trainer.run()
    except NotFiniteError as error:
        say(f"{DONE}{number}: failed: {error}")
        trial.set_user_attr("error", str(error))
        raise
    finally:
        trial.set_user_attr("seconds", time.perf_counter() - begun)
    best = trainer.state.best_loss
    assert best is not None
    say(f"{DONE}{number}: done, {best:.5f} in {time.perf_counter() - begun:.0f} s")
    return best


def suggest(trial: "optuna.Trial", options: TrainConfig) -> TrainConfig:
    """The options with others of those that are searched; what they are is among what may come."""
    rate, (low, high) = options.learning_rate, LEARNING_RATES
    trial.suggest_float("learning_rate", min(low, rate), max(high, rate), log=True)
    for name, sizes in SIZES.items():
        trial.suggest_categorical(name, sorted({*sizes, getattr(options, name)}))
    for name, most in DROPOUT.items():
        trial.suggest_float(name, 0, max(most, getattr(options, name)))
    return dataclasses.replace(options, **rounded(trial.params))


def rounded(found: dict[str, Any]) -> dict[str, Any]:
    """To three digits, which can be typed."""
    return {name: float(f"{v:.3g}") if isinstance(v, float) else v for name, v in found.items()}


def tune(
    framework: str,
    options: TrainConfig,
    storage: str,
    trials: int,
    place: Place,
    say: Callable[[str], None],
) -> Tuning:
    """Go on with the study of these options until it has so many trials; all that it has.

    say is given lines for people. Raises InputError where Optuna or the storage is not there, and
    what processes.run does.
    """
    if find_spec("optuna") is None:
        raise InputError('tune: needs Optuna: pip install -e ".[tune]"')
    texts, train, *_ = load_texts(options, say)
    if not options.validation_size:
        options = dataclasses.replace(options, validation_size=max(len(train) // 10, 1))
    if options.validation_size < FEW:
        few = f"{options.validation_size} validation reviews are few"
        say(f"{few}: which options are best on them is mostly chance (--validation-size)")
    recipe_of(options, 1, train.labels, len(texts.classes))
    learner = import_module(f"{framework}_impl.learner")
    learner.find_device(options.device)
    learner.CELLS[options.cell].resolve(options.implementation, None, options.dtype)
    name = f"{framework} {options.model} on {options.data}, {_digest(options)}"
    with opened(storage) as optuna:
        kept = _storage(storage)
        if options.restart and name in optuna.get_all_study_names(kept):
            optuna.delete_study(study_name=name, storage=kept)
        study = optuna.create_study(study_name=name, storage=kept, load_if_exists=True)
        optuna.storages.fail_stale_trials(study)
    there = counted(study)
    say(f"{name}: {len(there)} of {trials} trials are there, in {masked(storage)}")
    arguments = to_arguments(dataclasses.replace(options, restart=False))
    arguments += ["--framework", framework, "--storage", storage, "--study", name]
    arguments += ["--trials", str(trials)]
    jobs = [
        Job(f"job {number}", "comparison.tuning", tuple(arguments))
        for number in range(len(there), trials)
    ]
    if jobs and not any(trial.user_attrs.get("given") for trial in counted(study, running=True)):
        jobs[0] = dataclasses.replace(jobs[0], arguments=(*arguments, "--given"))
    try:
        processes.run(
            jobs,
            place,
            lambda job, line: say(line) if line.startswith(DONE) else None,
            lambda job: None,
        )
    except Stopped as stopped:
        lost = "; the same command goes on, with others in place of the trials at work"
        raise Stopped(stopped.status - 128, lost) from None
    return gather(study, framework, options)


def counted(study: "optuna.Study", running: bool = False) -> list["optuna.trial.FrozenTrial"]:
    """The trials that were taken to an end: not those that were stopped, or died."""
    from optuna.trial import TrialState

    ended = {TrialState.COMPLETE, TrialState.PRUNED, *([TrialState.RUNNING] if running else [])}
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state in ended or (trial.state == TrialState.FAIL and "error" in trial.user_attrs)
    ]


def gather(study: "optuna.Study", framework: str, options: TrainConfig) -> Tuning:
    """The study's trials, and the command that trains with the best options."""
    found = []
    for trial in counted(study):
        about, state = trial.user_attrs, trial.state.name.lower()
        found.append(
            Trial(
                number=trial.number,
                state="failed" if state == "fail" else state,  # type: ignore[arg-type]
                options=rounded(trial.params),
                losses=[trial.intermediate_values[at] for at in sorted(trial.intermediate_values)],
                accuracy=about.get("accuracy"),
                seconds=about["seconds"],
                error=about.get("error", ""),
                given=about.get("given", False),
            )
        )
    complete = [trial for trial in found if trial.state == "complete"]
    best = min(complete, key=lambda trial: trial.loss, default=None)
    better: dict[str, Any] = {**best.options} if best else {}
    chosen = dataclasses.replace(options, **better)
    preset = TrainConfig(preset=chosen.preset, **PRESETS[chosen.preset])
    given = to_arguments(dataclasses.replace(chosen, out=None, restart=False), preset)
    command = ["python", "-m", f"{framework}_impl.train", "--preset", chosen.preset, *given]
    return Tuning(study.study_name, shlex.join(command) if best else "", found)


@contextmanager
def opened(storage: str) -> Iterator[Any]:
    """Optuna, silent; a storage that cannot be opened is an InputError that names it."""
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
    # Of two that make the tables of a new storage at once, one finds some there already and fails.
    for patience in (0.2, 1, 2):
        try:
            return connect()
        except SQLAlchemyError:
            time.sleep(patience)
    return connect()


def _searched(options: TrainConfig) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("learning_rate", *SIZES, *DROPOUT)}


def _digest(options: TrainConfig) -> str:
    """Of what the trials have in common, so that no others are among them."""
    apart = MAY_CHANGE - {"epochs"}
    common = {name: value for name, value in vars(options).items() if name not in apart}
    text = json.dumps([common, sources.fingerprint(options.data)], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


if __name__ == "__main__":
    main()
