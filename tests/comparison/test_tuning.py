"""compare.py tune: trials, records, resuming, shared storage and errors."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import optuna
import pytest

import compare
import torch_impl.learner
from common.errors import Stopped
from common.training import loop
from common.training.options import PRESETS, parse_options
from comparison import processes, tuning
from tests import ROOT
from tests.training.cases import Command, refused, succeeds

QUICKLY = ("--vectors", "random:8", "--epochs", 2, "--hidden-size", 64)


def trials(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "results.json").read_text())["tuning"]["trials"]


def validation_losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [v for line in lines if (v := line.get("validation_loss")) is not None]


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.long)])
def test_search_continues_and_prints_the_best_options(
    framework: str, small: list[str], command: Command, tmp_path: Path
) -> None:
    options = ("tune", *small, *QUICKLY, "--frameworks", framework, "--out", tmp_path)
    output = succeeds(command(compare.main, *options, "--trials", 1))
    first = trials(tmp_path)
    assert [trial["number"] for trial in first] == [0]
    assert "19 validation reviews are few: " in output
    # The first trial has the options of the command line.
    (arguments,) = (trial["options"] for trial in first if trial["given"])
    assert arguments["hidden_size"] == 64
    assert arguments["learning_rate"] == PRESETS["quick"]["learning_rate"]
    output = succeeds(command(compare.main, *options, "--trials", 2))
    assert trials(tmp_path)[:1] == first and len(trials(tmp_path)) == 2
    assert "1 of 2 trials exist" in output and "trial 1: epoch 1 of 2" in output

    best = min(
        (trial for trial in trials(tmp_path) if trial["state"] == "complete"),
        key=lambda trial: min(trial["losses"]),
    )
    line = json.loads((tmp_path / "results.json").read_text())["tuning"]["command"]
    assert line in output and line in (tmp_path / "report.md").read_text()
    program, again = shlex.split(line)[:3], shlex.split(line)[3:]
    assert program == ["python", "-m", f"{framework}_impl.train"]
    main = partial(loop.main, import_module(f"{framework}_impl.learner"))
    assert command(main, *again, "--out", tmp_path / "again")[0] == 0
    assert validation_losses(tmp_path / "again") == best["losses"]
    assert not list(tmp_path.glob(".trial-*"))


@pytest.mark.usefixtures("in_this_process")
def test_a_trial_that_is_not_finite_is_recorded(
    small: list[str], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*small, *QUICKLY, "--learning-rate", 1e300, "--trials", 1, "--out", tmp_path)
    output = succeeds(command(compare.main, "tune", *options))
    (trial,) = trials(tmp_path)
    assert trial["state"] == "failed" and "the loss is" in trial["error"]
    assert "no trial was completed" in output

    def run(*_: Any) -> None:
        raise Stopped(signal.SIGINT, "")

    monkeypatch.setattr(processes, "run", run)
    status, output, _ = command(compare.main, "tune", *options, "--restart")
    assert status == 130 and "0 of 1 trials exist" in output


def config(small: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> tuning.TrialConfig:
    options = [*small, *map(str, QUICKLY), "--validation-size", "32"]
    monkeypatch.setattr(sys, "argv", ["command", *options])
    return parse_options(tuning.TrialConfig, "command")


def test_search_reads_no_test_review_and_stops_bad_trials(
    small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = config(small, monkeypatch)

    class Untested(loop.Trainer):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.data = dataclasses.replace(self.data, test=None)

    monkeypatch.setattr(tuning, "Trainer", Untested)
    study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=1.0))

    def objective(trial: optuna.Trial) -> float:
        return tuning._try(options, torch_impl.learner, trial)

    study.enqueue_trial({"learning_rate": 1e-3})
    study.enqueue_trial({"learning_rate": 10.0})
    monkeypatch.setattr(tuning, "LEARNING_RATES", (1e-3, 10.0))
    study.optimize(objective, n_trials=2)
    good, bad = study.trials
    assert good.state.name == "COMPLETE" and good.value == min(good.intermediate_values.values())
    assert bad.state.name == "PRUNED" and list(bad.intermediate_values) == [1]


def test_stopped_trial_is_resumed(
    small: list[str], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped trial resumes; test_processes.py tests that its process receives the signal."""
    storage = f"sqlite:///{tmp_path / 'trials.sqlite3'}"
    optuna.create_study(study_name="study", storage=storage)

    def stop(line: str) -> None:
        if "epoch 2 of 400" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(tuning, "print_line", stop)
    of_study = ("--storage", storage, "--study", "study", "--trials", 1, "--out", tmp_path)
    options = (*small, *QUICKLY, "--epochs", 400, "--validation-size", 32, *of_study)
    assert command(tuning.main, *options)[0] == 143
    study = optuna.load_study(study_name="study", storage=storage)
    assert [trial.state.name for trial in study.trials] == ["FAIL"]
    assert tuning.counted(study) == []
    assert not list(tmp_path.glob(".trial-*"))


@pytest.mark.usefixtures("in_this_process")
def test_trials_of_another_process_count(
    small: list[str], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes the rest of the trials while the first trial of this one runs."""
    storage = f"sqlite:///{tmp_path / 'shared.sqlite3'}"
    options = [*small, *map(str, QUICKLY), "--storage", storage, "--trials", "2"]

    def say(_: str) -> None:
        monkeypatch.setattr(tuning, "print_line", print)
        assert command(compare.main, "tune", *options, "--out", tmp_path / "other")[::2] == (0, "")

    monkeypatch.setattr(tuning, "print_line", say)
    result = command(compare.main, "tune", *options, "--out", tmp_path / "own")
    assert result[::2] == (0, "")
    (other,) = trials(tmp_path / "other")
    actual = trials(tmp_path / "own")
    assert [trial["number"] for trial in actual] == [0, 1] and actual[1] == other
    assert [trial["given"] for trial in actual] == [True, False]


@pytest.mark.long
def test_two_at_once_share_the_trials(small: list[str], tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'shared.sqlite3'}"
    options = [*small, *map(str, QUICKLY), "--storage", storage, "--trials", "3", "--jobs", "1"]
    programs = [
        subprocess.Popen(
            [sys.executable, "compare.py", "tune", *options, "--out", str(tmp_path / name)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in ("one", "two")
    ]
    output = [each.communicate(timeout=300)[0] for each in programs]
    assert [each.returncode for each in programs] == [0, 0], output
    # The study that ends last has all trials; two may begin a trial at the same time.
    assert 3 <= max(len(trials(tmp_path / name)) for name in ("one", "two")) <= 4
    assert all(": done, " in text for text in output)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--storage", "sqlite:////nowhere/trials.sqlite3"), "--storage sqlite:////nowhere"),
        (("--storage", "trials"), "--storage trials: cannot be opened"),
        (("--storage", f"sqlite:///{__file__}"), "cannot be opened"),
        (("--trials", 0), "--trials 0: expected `int` >= 1"),
        (("--frameworks", "sklearn"), "--frameworks sklearn: tune is for torch and jax"),
        (("--models", "linear"), "--models linear: tune is for gru, bigru"),
        (("--validation-size", 500), "--validation-size 500: leaves nothing of 192 reviews"),
        (("--pooling", "median"), "--pooling median"),
        (("--device", "cuda"), "--device cuda: PyTorch finds no such device"),
        (("--class-weights", "1,2,3"), "--class-weights 1,2,3: 3 numbers for 2 classes"),
        (("--implementation", "none"), "implementation none"),
        (("--storage", "postgresql://me:secret@localhost/db"), "--storage postgresql://***@local"),
    ],
)
def test_bad_input(
    arguments: tuple,
    problem: str,
    small: list[str],
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning.time, "sleep", lambda _: None)  # before a storage is tried again
    options = (*small, *QUICKLY, "--out", tmp_path, *arguments)
    error = refused(command(compare.main, "tune", *options))
    assert problem in error and "secret" not in error
    assert not (tmp_path / "results.json").exists()


def test_without_optuna(
    small: list[str], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.extras.find_spec", lambda name: None)
    error = refused(command(compare.main, "tune", *small, "--out", tmp_path))
    assert 'pip install -e ".[tune]"' in error
