"""Train the models one after the other, each in a process of its own, and gather their results."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import checkpoint, signals
from common.config import TrainConfig, to_arguments
from common.errors import InputError, NotFiniteError, Stopped
from common.report.schema import Check

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
    "tokens_per_second",
    "first_step_seconds",
    "peak_memory_bytes",
    "parameters",
    "compilations",
)


def train(
    framework: str, options: TrainConfig, say: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train one model in a process of its own; options.out says where.

    A run that was interrupted there goes on, and one that is finished is not trained again.

    Returns its entry of "runs" in results.json and what metrics.json says of the data. say is
    given each line that the process prints. Raises InputError where the process refuses its input,
    NotFiniteError where its numbers are not finite, and Stopped after a SIGINT or SIGTERM, which is
    passed on to the process, so that it saves.
    """
    assert options.out is not None
    metrics = None
    if not options.restart:
        metrics = checkpoint.finished(options.out, framework, options)
    if metrics is not None:
        say(f"finished before: {metrics['accuracy']:.2%} ({options.out}; --restart trains anew)")
    else:
        _run(framework, options, say)
        metrics = checkpoint.finished(options.out, framework, options)
        assert metrics is not None, "what a training process leaves is whole"
    run = {key: metrics[key] for key in KEPT}
    return {**run, "run_dir": str(options.out)}, {
        **metrics["data"],
        "classes": list(metrics["classes"]),
    }


def _run(framework: str, options: TrainConfig, say: Callable[[str], None]) -> None:
    command = [sys.executable, "-m", f"{framework}_impl.train", *to_arguments(options)]
    asked: list[int] = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[1],
        process_group=0,  # Ctrl-C reaches it through us alone: a second signal would end it at once
    ) as process:

        def pass_on(number: int) -> None:
            asked.append(number)
            process.send_signal(number)

        assert process.stdout is not None
        last = ""
        try:
            with signals.caught(pass_on):
                for line in process.stdout:
                    last = line.rstrip("\n")
                    say(last)
                process.wait()
        except BaseException:
            process.terminate()
            raise
    last = last.removeprefix("error: ")
    if asked:
        raise Stopped(asked[0], f"; the same command goes on from there ({last})")
    if process.returncode:
        message = (
            f"training {framework} {options.model} ended with exit status "
            f"{process.returncode}: {last}"
        )
        raise NotFiniteError(message) if process.returncode == 3 else InputError(message)


def check_losses(folder: Path, model: str) -> Check:
    """Compare the twins' training losses, step by step, at the beginning of training.

    Training is chaotic: rounding errors grow along it, exponentially and the faster the larger
    Adam's step size is. So this is about the first STEPS steps, at no more than quick's step size.
    """
    curves = [_step_losses(folder / f"{framework}-{model}") for framework in ("torch", "jax")]
    gap = max(abs(ours - theirs) for ours, theirs in zip(*curves, strict=True))
    return _row(model, f"loss of the first {len(curves[0])} steps", gap, BOUND_LOSS, max(curves[0]))


def check_accuracy(runs: Sequence[dict[str, Any]], model: str) -> Check:
    """Compare the twins' accuracies: they differ by no more than half of their 95 % interval."""
    ours, theirs = (
        next(run for run in runs if (run["framework"], run["model"]) == (framework, model))
        for framework in ("torch", "jax")
    )
    gap = abs(ours["accuracy"] - theirs["accuracy"])
    low, high = ours["accuracy_interval"]
    return _row(model, "accuracy after training", gap, (high - low) / 2, 1.0)


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
