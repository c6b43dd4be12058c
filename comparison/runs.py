"""Trains models, each in its own process, and gathers their results."""

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
    """The training of a model into the folder options.out."""

    framework: str
    options: DataConfig
    name: str
    """For display."""

    @classmethod
    def of(
        cls, framework: str, model: str, options: TrainConfig, out: Path, name: str = ""
    ) -> "Training":
        """The training of a model with the options that all models share."""
        options = dataclasses.replace(options, model=model, out=out)
        name = name or f"{framework} {model}"
        if framework != linear.FRAMEWORK:
            return cls(framework, options, name)
        fields = (field.name for field in dataclasses.fields(DataConfig))
        return cls(
            framework, LinearConfig(**{each: getattr(options, each) for each in fields}), name
        )

    @property
    def module(self) -> str:
        """The module of the program."""
        is_linear = self.framework == linear.FRAMEWORK
        return "common.linear.train" if is_linear else f"{self.framework}_impl.train"

    @property
    def folder(self) -> Path:
        """The run directory."""
        assert self.options.out is not None
        return self.options.out

    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json; empty if the training is not finished."""
        if isinstance(self.options, LinearConfig):
            return linear.finished(self.folder, self.options) or {}
        return run_directory.finished(self.folder, self.framework, self.options) or {}

    def run(self) -> Run:
        """The result of the finished training."""
        return schema.convert({**self.metrics(), "run_dir": str(self.folder)}, Run, self.folder)

    def data(self) -> Data:
        """The data set of the finished training."""
        metrics = self.metrics()
        data = {**metrics["data"], "classes": list(metrics["classes"])}
        return schema.convert(data, Data, self.folder)


def train(
    trainings: Sequence[Training],
    place: Place,
    on_line: Callable[[str, str], None],
    on_end: Callable[[str, Run | None], None],
    others: Sequence[Job] = (),
) -> list[Run]:
    """Train models, each in its own process, and run other jobs at the same time.

    An interrupted training continues; a finished one is not repeated. Of parallel trainings, the
    last, which take long, start first.

    on_line receives the name and each line of a job; on_end the name of a successful job and, for a
    training, its result. Raises as processes.run does.
    """
    jobs: dict[Job, Training] = {}
    for training in trainings:
        if training.metrics() and not training.options.restart:
            run = training.run()
            hint = f"({training.folder}; --restart replaces it)"
            on_line(training.name, f"finished before: {run.accuracy:.2%} {hint}")
            on_end(training.name, run)
        else:
            arguments = tuple(to_arguments(training.options))
            jobs[Job(training.name, training.module, arguments)] = training
    processes.run(
        [*others, *(jobs if place.max_jobs == 1 else reversed(jobs))],
        place,
        lambda job, line: on_line(job.name, line),
        lambda job: on_end(job.name, jobs[job].run() if job in jobs else None),
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
    return _check(
        model, f"loss of the first {len(curves[0])} steps", gap, BOUND_LOSS, max(curves[0])
    )


def check_accuracy(runs: Sequence[Run], model: str) -> Check:
    """Check that the 95 % intervals of the twins' accuracies overlap.

    A bound of half of one interval would be too tight: rounding errors grow into different runs,
    and two runs of a model sometimes differ by more than that (docs/questions.md).
    """
    twins = (run for run in runs if run.model == model)
    lower, upper = sorted(twins, key=lambda run: run.accuracy)
    bound = lower.accuracy_interval[1] - lower.accuracy
    bound += upper.accuracy - upper.accuracy_interval[0]
    return _check(model, "accuracy after training", upper.accuracy - lower.accuracy, bound, 1.0)


def _check(model: str, check: str, error: float, bound: float, scale: float) -> Check:
    twins = [f"torch {model}", f"jax {model}"]
    return Check.of(twins, check, "float32", error, bound, float(np.spacing(np.float32(scale))))
