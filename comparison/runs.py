"""Train the models, each in a process of its own, and gather their results."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.report.schema import Check
from common.training.options import TrainConfig, to_arguments
from common.training.run_directory import finished
from comparison import processes
from comparison.processes import Job

STEPS = 125  # the first epoch of the preset quick
BOUND_LOSS = 0.01

# What metrics.json holds and results.json repeats of every run.
KEPT = (
    "framework",
    "model",
    "implementation",
    "accuracy",
    "accuracy_interval",
    "confusion",
    "roc_auc",
    "categories",
    "losses",
    "loss_epochs",
    "train_seconds",
    "cores",
    "tokens_per_second",
    "first_step_seconds",
    "peak_memory_bytes",
    "parameters",
    "compilations",
)


@dataclass(frozen=True)
class Training:
    """One model to train; options.out says where."""

    framework: str
    options: TrainConfig

    @property
    def name(self) -> str:
        """As results are named: "torch gru"."""
        return f"{self.framework} {self.options.model}"

    @property
    def folder(self) -> Path:
        """The run directory."""
        assert self.options.out is not None
        return self.options.out

    def metrics(self) -> dict[str, Any] | None:
        """What it came to, if it is finished."""
        return finished(self.folder, self.framework, self.options)


def train(
    trainings: Sequence[Training],
    at_once: int,
    say: Callable[[str, str], None],
    done: Callable[[Training | Job, dict[str, Any]], None],
    beside: Sequence[Job] = (),
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train models, each in a process of its own, at most so many at once, and other jobs beside.

    A run that was interrupted goes on, and one that is finished is not trained again. Of several
    at once, the last begin first: they are the ones that take long.

    say is given (name, line) for each line that a process prints; done is told what has ended and,
    of a training, what is in its metrics.json. Returns the entry "runs" of results.json, and
    "data". Raises what processes.run does.
    """
    jobs = {}
    for training in trainings:
        if training.options.restart or (metrics := training.metrics()) is None:
            module = f"{training.framework}_impl.train"
            job = Job(training.name, module, tuple(to_arguments(training.options)))
            jobs[job] = training
        else:
            again = f"({training.folder}; --restart trains anew)"
            say(training.name, f"finished before: {metrics['accuracy']:.2%} {again}")
            done(training, metrics)

    def ended(job: Job) -> None:
        if job in jobs:
            done(jobs[job], _whole(jobs[job]))
        else:
            done(job, {})

    order = list(jobs) if at_once == 1 else list(jobs)[::-1]
    processes.run([*beside, *order], at_once, lambda job, line: say(job.name, line), ended)
    found = {training: _whole(training) for training in trainings}
    runs = [
        {**{key: metrics[key] for key in KEPT if key in metrics}, "run_dir": str(training.folder)}
        for training, metrics in found.items()
    ]
    last = found[trainings[-1]]
    return runs, {**last["data"], "classes": list(last["classes"])}


def _whole(training: Training) -> dict[str, Any]:
    metrics = training.metrics()
    assert metrics is not None, "what a training process leaves is whole"
    return metrics


def check_losses(folder: Path, model: str) -> Check:
    """Compare the twins' training losses, step by step, at the beginning of training.

    Training is chaotic: rounding errors grow along it, exponentially and the faster the larger
    Adam's step size is. So this is about the first STEPS steps, at no more than quick's step size.
    """
    curves = [_step_losses(folder / f"{framework}-{model}") for framework in ("torch", "jax")]
    gap = max(abs(ours - theirs) for ours, theirs in zip(*curves, strict=True))
    return _row(model, f"loss of the first {len(curves[0])} steps", gap, BOUND_LOSS, max(curves[0]))


def check_accuracy(runs: Sequence[dict[str, Any]], model: str) -> Check:
    """Compare the twins' accuracies: their 95 % intervals overlap.

    Half of one interval would be too little to ask. Training turns rounding into another run, and
    two runs of one model part by more than that now and then (docs/questions.md).
    """
    ours, theirs = (
        next(run for run in runs if (run["framework"], run["model"]) == (framework, model))
        for framework in ("torch", "jax")
    )
    lower, upper = sorted((ours, theirs), key=lambda run: run["accuracy"])
    gap = upper["accuracy"] - lower["accuracy"]
    room = lower["accuracy_interval"][1] - lower["accuracy"]
    room += upper["accuracy"] - upper["accuracy_interval"][0]
    return _row(model, "accuracy after training", gap, room, 1.0)


def _row(model: str, check: str, error: float, bound: float, scale: float) -> Check:
    return Check(
        models=[f"torch {model}", f"jax {model}"],
        check=check,
        dtype="float32",
        error=error,
        bound=bound,
        ulp=error / float(np.spacing(np.float32(scale))),
        passed=error <= bound,
    )


def _step_losses(run_dir: Path) -> list[float]:
    lines = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    return [loss for line in lines for loss in line["step_losses"]][:STEPS]
