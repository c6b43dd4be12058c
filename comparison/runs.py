"""Train the models, each in a process of its own, and gather their results."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.linear import run as linear
from common.linear.run import LinearConfig
from common.report import schema
from common.report.schema import Check, Data, Run
from common.training import run_directory
from common.training.options import DataConfig, TrainConfig, to_arguments
from comparison import processes
from comparison.processes import Job, Place

STEPS = 125  # the first epoch of the preset quick
BOUND_LOSS = 0.01


@dataclass(frozen=True)
class Training:
    """One model to train; options.out says where."""

    framework: str
    options: DataConfig
    name: str
    """For people."""

    @classmethod
    def of(
        cls, framework: str, model: str, options: TrainConfig, out: Path, name: str = ""
    ) -> "Training":
        """Of a model, by the options that it has in common with others."""
        own: DataConfig = dataclasses.replace(options, model=model, out=out)
        if framework == linear.FRAMEWORK:
            known = {field.name for field in dataclasses.fields(DataConfig)}
            own = LinearConfig(**{name: v for name, v in vars(own).items() if name in known})
        return cls(framework, own, name or f"{framework} {model}")

    @property
    def module(self) -> str:
        """The program that trains it."""
        is_linear = self.framework == linear.FRAMEWORK
        return "common.linear.train" if is_linear else f"{self.framework}_impl.train"

    @property
    def folder(self) -> Path:
        """The run directory."""
        assert self.options.out is not None
        return self.options.out

    def metrics(self) -> dict[str, Any]:
        """What metrics.json holds; nothing where the training is not finished."""
        if isinstance(self.options, LinearConfig):
            return linear.finished(self.folder, self.options) or {}
        return run_directory.finished(self.folder, self.framework, self.options) or {}

    def run(self) -> Run:
        """What it came to."""
        return schema.convert({**self.metrics(), "run_dir": str(self.folder)}, Run, self.folder)

    def data(self) -> Data:
        """What it was trained and tested on."""
        metrics = self.metrics()
        found = {**metrics["data"], "classes": list(metrics["classes"])}
        return schema.convert(found, Data, self.folder)


def train(
    trainings: Sequence[Training],
    place: Place,
    say: Callable[[str, str], None],
    done: Callable[[str, Run | None], None],
    beside: Sequence[Job] = (),
) -> list[Run]:
    """Train models, each in a process of its own, at that place, and other jobs beside.

    A run that was interrupted goes on, and one that is finished is not trained again. Of several
    at once, the last begin first: they are the ones that take long.

    say is given (name, line) for each line that a process prints; done is told the name of what has
    ended and, of a training, what it came to. Raises what processes.run does.
    """
    jobs: dict[Job, Training] = {}
    for training in trainings:
        if training.metrics() and not training.options.restart:
            run = training.run()
            again = f"({training.folder}; --restart trains anew)"
            say(training.name, f"finished before: {run.accuracy:.2%} {again}")
            done(training.name, run)
        else:
            arguments = tuple(to_arguments(training.options))
            jobs[Job(training.name, training.module, arguments)] = training
    processes.run(
        [*beside, *(jobs if place.max_jobs == 1 else reversed(jobs))],
        place,
        lambda job, line: say(job.name, line),
        lambda job: done(job.name, jobs[job].run() if job in jobs else None),
    )
    return [training.run() for training in trainings]


def check_losses(folder: Path, model: str) -> Check:
    """Compare the twins' training losses, step by step, at the beginning of training.

    Training is chaotic: rounding errors grow exponentially, faster for larger steps and without
    clipping. Therefore the check covers the first STEPS steps, for step sizes of at most 5e-4
    or, if the gradient is clipped, that of the preset quick.
    """
    curves = []
    for framework in ("torch", "jax"):
        log = (folder / f"{framework}-{model}" / "log.jsonl").read_text()
        lines = map(json.loads, log.splitlines())
        curves.append([loss for line in lines for loss in line["step_losses"]][:STEPS])
    gap = max(abs(ours - theirs) for ours, theirs in zip(*curves, strict=True))
    what = f"loss of the first {len(curves[0])} steps"
    return _check(model, what, gap, BOUND_LOSS, max(curves[0]))


def check_accuracy(runs: Sequence[Run], model: str) -> Check:
    """Compare the twins' accuracies: their 95 % intervals overlap.

    Half of one interval would be too little to ask. Training turns rounding into another run, and
    two runs of one model part by more than that now and then (docs/questions.md).
    """
    twins = (run for run in runs if run.model == model)
    lower, upper = sorted(twins, key=lambda run: run.accuracy)
    room = lower.accuracy_interval[1] - lower.accuracy
    room += upper.accuracy - upper.accuracy_interval[0]
    return _check(model, "accuracy after training", upper.accuracy - lower.accuracy, room, 1.0)


def _check(model: str, check: str, error: float, bound: float, scale: float) -> Check:
    twins = [f"torch {model}", f"jax {model}"]
    return Check.of(twins, check, "float32", error, bound, float(np.spacing(np.float32(scale))))
