"""An interrupted run ends with the results of an uninterrupted one; events that stop a run."""

import dataclasses
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compare
import jax_impl.learner
import torch_impl.learner
from common import files
from common.errors import InputError
from common.inference import explanation, prediction
from common.report import __main__ as draw
from common.training import checkpoint, loop, run_directory
from common.training.data import Data, load_data
from common.training.learner import validate
from common.training.options import TrainConfig
from comparison import runs
from comparison.processes import Place
from tests.training.cases import (
    ARGUMENTS,
    FRAMEWORKS,
    REMOVED,
    Command,
    add_removed_options,
    each_framework,
    main_of,
    refused,
    refused_at_once,
    succeeds,
    train_torch,
)
from tools import endurance

TINY = dataclasses.replace(endurance.TINY, epochs=2, keep=100)
draw_in_a_process = run_directory.draw  # other tests draw in their own process


def train(name: str, out: Path, **options: Any) -> dict[str, Any]:
    return loop.train(FRAMEWORKS[name], dataclasses.replace(TINY, out=out, **options))


def cut_back(run: Path, step: int) -> None:
    """Delete the files of a run that did not exist just after this step."""
    for path in (run / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    for file in (*run_directory.RUN_FILES, files.SUMS):
        (run / file).unlink()
    with (run / "log.jsonl").open("a") as log:  # lines after the checkpoint
        log.write('{"half a li')


@pytest.mark.parametrize(
    ("name", "model", "implementation"),
    [
        ("torch", "bigru", "fused"),
        ("torch", "nn.bigru", "auto"),
        ("jax", "gru", "scan"),
        pytest.param("jax", "bigru", "fused", marks=pytest.mark.long),
    ],
)
def test_an_interrupted_run_ends_with_the_same_bits(
    name: str, model: str, implementation: str, tmp_path: Path
) -> None:
    """The interruption is within an epoch, between two log lines, or between two epochs."""
    try:
        FRAMEWORKS[name].CELLS["gru"].resolve(implementation)
    except InputError:
        pytest.skip("the kernel has not been built")
    options = {"model": model, "implementation": implementation}
    whole = train(name, tmp_path / "whole", **options)
    assert whole["train_seconds"] > 0
    for step in (5, 6, 12) if model == "bigru" else (5,):  # JAX compiles anew each time
        run = Path(shutil.copytree(tmp_path / "whole", tmp_path / f"cut-{step}"))
        cut_back(run, step)
        again = train(name, run, **options)
        assert endurance.outcome(run) == endurance.outcome(tmp_path / "whole")
        timed = ("train_seconds", "tokens_per_second", "first_step_seconds", "peak_memory_bytes")
        for key in whole.keys() - {*timed, "compilations"}:
            assert again[key] == whole[key], key


EVERYTHING: dict[str, Any] = {
    "num_layers": 2,
    "pooling": "last+max+mean",
    "relu": False,
    "warmup": 0.3,
    "schedule": "linear",
    "word_dropout": 0.1,
    "vector_dropout": 0.1,
    "feature_dropout": 0.3,
    "class_weights": "balanced",
}


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("torch", "bigru"),
        pytest.param("torch", "nn.bigru", marks=pytest.mark.long),
        pytest.param("jax", "gru", marks=pytest.mark.long),
    ],
)
def test_interrupted_run_with_every_option_ends_with_the_same_bits(
    name: str, model: str, command: Command, tmp_path: Path
) -> None:
    """Both frameworks then predict and explain with it."""
    whole = train(name, tmp_path / "whole", model=model, **EVERYTHING)
    run = Path(shutil.copytree(tmp_path / "whole", tmp_path / "cut"))
    cut_back(run, 5)
    assert train(name, run, model=model, **EVERYTHING)["losses"] == whole["losses"]
    assert endurance.outcome(run) == endurance.outcome(tmp_path / "whole")
    answers = []
    for framework in FRAMEWORKS.values():
        predict = main_of(framework, prediction)
        output = succeeds(command(predict, run, "a fine film", "zzz"))
        answers.append([float(line.split("\t")[1]) for line in output.splitlines()[-2:]])
        succeeds(command(main_of(framework, explanation), run, "the film is"))
    np.testing.assert_allclose(*answers, atol=1.1e-4)


def test_the_schedule_forbids_another_number_of_epochs(command: Command, tmp_path: Path) -> None:
    succeeds(command(train_torch, *ARGUMENTS, "--schedule", "linear", "--out", tmp_path))
    error = refused(command(train_torch, "--resume", tmp_path, "--epochs", 3))
    assert "--epochs was 2, is 3 (its learning rates depend on --epochs)" in error


def test_added_epochs_equal_as_many_from_the_start(command: Command, tmp_path: Path) -> None:
    succeeds(command(train_torch, *ARGUMENTS, "--out", tmp_path / "two"))
    succeeds(command(train_torch, *ARGUMENTS, "--epochs", 3, "--out", tmp_path / "three"))
    succeeds(command(train_torch, "--resume", tmp_path / "two", "--epochs", 3))
    assert endurance.outcome(tmp_path / "two") == endurance.outcome(tmp_path / "three")
    assert "finished before" in succeeds(command(train_torch, "--resume", tmp_path / "two"))
    error = refused(command(train_torch, "--resume", tmp_path / "two", "--epochs", 2))
    assert "--epochs 2" in error


def test_a_resumed_run_takes_its_shares_from_the_checkpoint(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Given as an option, the shares would limit the number of workers."""
    train("torch", tmp_path, shares=2)
    resumed: list[TrainConfig] = []
    monkeypatch.setattr(loop, "train", lambda framework, options, world: resumed.append(options))
    succeeds(command(train_torch, "--resume", tmp_path))
    assert [options.shares for options in resumed] == [None]


def test_run_of_the_other_framework_is_continued(command: Command, tmp_path: Path) -> None:
    train_jax = main_of(jax_impl.learner)
    succeeds(command(train_torch, *ARGUMENTS, "--out", tmp_path))
    error = refused(command(train_jax, *ARGUMENTS, "--out", tmp_path))
    assert "holds a run of torch" in error
    output = succeeds(command(train_jax, "--resume", tmp_path, "--epochs", 3))
    assert "begun with torch" in output
    assert json.loads((tmp_path / "metrics.json").read_text())["framework"] == "jax"


OTHERS = {
    "--learning-rate 0.01": "--learning-rate was 0.005, is 0.01",
    "--seed 7": "--seed was 0, is 7",
    "--model bigru --batch-size 4": "--model was gru, is bigru, --batch-size was 8",
}


def test_another_configuration_is_refused_by_name(command: Command, tmp_path: Path) -> None:
    succeeds(command(train_torch, *ARGUMENTS, "--out", tmp_path))
    before = endurance.outcome(tmp_path)
    ways = ["--resume", tmp_path], [*ARGUMENTS, "--out", tmp_path]
    tried = [(way, other, named) for way in ways for other, named in OTHERS.items()]
    for way, other, named in [*tried, (ways[0], "--out elsewhere", "--out elsewhere")]:
        assert named in refused_at_once(command(train_torch, *way, *other.split()))
    assert endurance.outcome(tmp_path) == before
    allowed = ["--device", "cpu", "--log-every", 3, "--keep", 5, "--checkpoint-seconds", 9]
    succeeds(command(train_torch, "--resume", tmp_path, *allowed))
    succeeds(command(train_torch, *ARGUMENTS, "--seed", 7, "--restart", "--out", tmp_path))
    assert endurance.outcome(tmp_path) != before


def test_removed_options_without_effect_are_ignored(command: Command, tmp_path: Path) -> None:
    succeeds(command(train_torch, *ARGUMENTS, "--out", tmp_path))
    add_removed_options(tmp_path, **dict.fromkeys(REMOVED, 0.0) | {"schedule": "constant"})
    assert "finished before" in succeeds(command(train_torch, *ARGUMENTS, "--out", tmp_path))
    succeeds(command(train_torch, "--resume", tmp_path, "--epochs", 3))
    assert "ema" not in json.loads((tmp_path / "config.json").read_text())["options"]


def test_run_with_a_removed_option_is_not_resumed(command: Command, tmp_path: Path) -> None:
    succeeds(command(train_torch, *ARGUMENTS, "--out", tmp_path / "run"))
    for name, value in REMOVED.items():
        run = Path(shutil.copytree(tmp_path / "run", tmp_path / name))
        add_removed_options(run, **{name: value})
        before = endurance.outcome(run)
        for way in (["--resume", run], [*ARGUMENTS, "--epochs", 3, "--out", run]):
            error = refused_at_once(command(train_torch, *way))
            assert error == (
                f"error: {run}: checkpoints/000000016/config.json has --{name.replace('_', '-')} "
                f"{value}, which this release no longer has; --restart replaces it\n"
            )
        assert endurance.outcome(run) == before


def test_other_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train("torch", tmp_path)

    def other(*arguments: Any) -> Data:
        data = load_data(*arguments)
        data.vectors.matrix[0, 0] += 1
        return data

    monkeypatch.setattr(loop, "load_data", other)
    with pytest.raises(InputError, match="the data or the word vectors have changed"):
        train("torch", tmp_path, epochs=3)


def test_resuming_needs_a_checkpoint(command: Command, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert str(folder) in refused(command(train_torch, "--resume", folder))
    assert not list(tmp_path.iterdir())


def after_steps(
    monkeypatch: pytest.MonkeyPatch, name: str, count: int, act: Callable[[Any], object]
) -> None:
    """Call act(learner) after this number of steps; its result, if any, replaces the loss."""
    Learner = FRAMEWORKS[name].Learner
    step, taken = Learner.step, 0

    def counting(self: Any, *shares: Any, **options: Any) -> Any:
        nonlocal taken
        loss = step(self, *shares, **options)
        taken += 1
        changed = act(self) if taken == count else None
        return loss if changed is None else changed

    monkeypatch.setattr(Learner, "step", counting)


@pytest.mark.parametrize(
    ("name", "number", "code"),
    [("torch", signal.SIGINT, 130), ("torch", signal.SIGTERM, 143), ("jax", signal.SIGINT, 130)],
)
def test_signal_saves_and_the_same_command_continues(
    name: str,
    number: int,
    code: int,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    main = main_of(FRAMEWORKS[name])
    succeeds(command(main, *ARGUMENTS, "--out", tmp_path / "whole"))
    with monkeypatch.context() as patch:
        after_steps(patch, name, 5, lambda learner: os.kill(os.getpid(), number))
        status, _, error = command(main, *ARGUMENTS, "--out", tmp_path / "run")
    assert status == code
    assert re.fullmatch(r"stopped by SIG(INT|TERM) after step 5; .+\n", error)
    assert checkpoint.last(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "000000005"
    output = succeeds(command(main, *ARGUMENTS, "--out", tmp_path / "run"))
    assert "resuming after step 5" in output
    assert endurance.outcome(tmp_path / "run") == endurance.outcome(tmp_path / "whole")


def test_second_signal_exits_immediately(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt_twice(learner: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the process goes on")

    monkeypatch.setattr(os, "_exit", sys.exit)  # which would end the tests
    after_steps(monkeypatch, "torch", 1, interrupt_twice)
    arguments = ["--checkpoint-seconds", 0, "--out", tmp_path]
    assert command(train_torch, *ARGUMENTS, *arguments)[0] == 130
    assert checkpoint.last(tmp_path) is None


def test_compare_stops_and_resumes_its_training(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "torch-gru"

    def interrupt() -> None:
        while not (last := checkpoint.last(out)) or int(last.name) <= 8:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    arguments = ["accuracy", "--frameworks", "torch", "--models", "gru", *ARGUMENTS]
    # If the signal is lost, the training ends by itself after some seconds.
    arguments += ["--epochs", 100, "--checkpoint-seconds", 0, "--out", tmp_path]
    threading.Thread(target=interrupt, daemon=True).start()
    status, _, error = command(compare.main, *arguments)
    assert status == 130
    assert "the same command continues" in error
    last = checkpoint.last(out)
    assert last is not None and int(last.name) < 100 * 8

    arguments = ["--resume", out, "--epochs", 1 + int(last.name) // 8]
    output = succeeds(command(train_torch, *arguments))
    assert f"resuming after step {int(last.name):,}" in output
    options = checkpoint.load_checkpoint(checkpoint.last(out)).about.options  # type: ignore[arg-type]
    training = runs.Training("torch", dataclasses.replace(options, out=out), "torch gru")
    monkeypatch.setattr(runs, "to_arguments", lambda *_: pytest.fail("it is trained again"))
    lines: list[str] = []
    [run] = runs.train([training], Place(), lambda _, line: lines.append(line), lambda *_: None)
    assert "finished before" in lines[0]
    assert run.accuracy == json.loads((out / "metrics.json").read_text())["accuracy"]


@each_framework
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_numbers_that_are_not_finite_stop_the_run(
    what: str, name: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(learner: Any) -> float | None:
        if what == "loss":
            return float("nan")
        learner.gradient_norm = float("inf")
        return None

    after_steps(monkeypatch, name, 11, spoil)  # the third step of the second epoch
    arguments = ["--checkpoint-seconds", "0", "--log-every", 100, "--out", tmp_path]
    error = refused(command(main_of(FRAMEWORKS[name]), *ARGUMENTS, *arguments), 3)
    assert "in step 11 (epoch 2, iteration 3)" in error
    options = TrainConfig(
        **{**vars(TINY), "epochs": 2, "validation_size": 0, "max_length": 2, "clip_norm": None}
    )
    reviews = load_data(options, print).train.plan(1)[2]
    assert f"reviews {' '.join(map(str, reviews))};" in error
    assert str(tmp_path / "checkpoints" / "000000010") in error
    assert checkpoint.last(tmp_path) == tmp_path / "checkpoints" / "000000010"


@each_framework
def test_a_step_size_that_explodes_stops_the_run(
    name: str, command: Command, tmp_path: Path
) -> None:
    """The loss becomes infinite by itself, without a planted value."""
    arguments = ["--learning-rate", "1e38", "--out", tmp_path]
    error = refused(command(main_of(FRAMEWORKS[name]), *ARGUMENTS, *arguments), 3)
    assert "the last good checkpoint is none" in error


def test_patience_stops_and_the_best_parameters_are_used(tmp_path: Path) -> None:
    results = train("torch", tmp_path, epochs=40, patience=2, learning_rate=0.05, keep=1)
    saved = checkpoint.newest(tmp_path, pytest.fail)
    assert saved is not None and saved.best
    losses = [line.validation_loss for line in saved.lines() if line.validation_loss is not None]
    best = int(np.argmin(losses))
    assert len(losses) == results["epochs"] == best + 1 + 2 < 40
    assert results["validation_loss"] == losses[best]
    used = run_directory.load_run(tmp_path).parameters
    assert all(np.array_equal(used[name], saved.best[name]) for name in used)
    assert not all(np.array_equal(used[name], saved.parameters[name]) for name in used)

    # The validation reviews are none of those trained on, and the loss is that of the best ones.
    options = dataclasses.replace(TINY, epochs=40, patience=2, learning_rate=0.05)
    data = load_data(options, print)
    assert data.validation is not None
    assert (len(data.train.split), len(data.validation.split)) == (48, 16)
    assert np.bincount(data.validation.split.labels).tolist() == [8, 8]
    learner = torch_impl.learner.Learner(saved.about.model, options, data.vectors.matrix, used)
    assert validate(learner, data.validation)[0] == losses[best]


LITTLE_MEMORY = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
runpy.run_module("common.report", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (LITTLE_MEMORY, "the process ended: "),  # by V8
        pytest.param(
            "import sys; sys.exit('one\\nNo space left')", "No space left", marks=pytest.mark.long
        ),
    ],
)
def test_figures_that_cannot_be_drawn_cost_one_warning(
    program: str, reason: str, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The run is whole and finished without them, and they can be drawn later."""
    out = tmp_path / "a run"
    (out / "figures").mkdir(parents=True)
    (out / "figures" / "loss.png").write_text("of another run")
    (tmp_path / "dying.py").write_text(program)
    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "draw", partial(draw_in_a_process, program=("dying",)))
        patch.setenv("PYTHONPATH", str(tmp_path))
        status, output, error = command(train_torch, *ARGUMENTS, "--out", out)
    assert (status, error.count("\n")) == (0, 1)
    assert error.startswith(f"warning: {out}: drawing failed ({reason}")
    assert error.endswith(f"); to draw again: python -m dying '{out}'\n")
    assert "Accuracy: " in output
    assert not (out / "figures").exists()
    assert "finished before" in succeeds(command(train_torch, *ARGUMENTS, "--out", out))
    before = run_directory.load_run(out)
    assert draw_in_a_process(out)
    assert {path.name for path in (out / "figures").iterdir()} == {
        f"{name}.{kind}" for name in ("loss", "confusion") for kind in ("png", "svg")
    }
    assert run_directory.load_run(out).classes == before.classes


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, without_figures: Callable[..., bool]) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("drawn")
    train("torch", out)
    assert without_figures(out)
    return out


@pytest.fixture
def run(drawn: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, which a test may change."""
    return shutil.copytree(drawn, tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", lambda config: config.pop("classes"), "`classes`"),
        ("config.json", lambda config: config["classes"].pop(), "confusion: expected 1 x 1"),
        ("metrics.json", lambda metrics: metrics["confusion"].pop(), "expected 2 x 2 numbers"),
        ("metrics.json", lambda metrics: metrics["data"].pop("name"), "`name`"),
    ],
)
def test_a_run_that_cannot_be_drawn_gets_one_clear_line_and_keeps_its_figures(
    name: str, change: Callable[[dict[str, Any]], object], message: str, run: Path, command: Command
) -> None:
    content = json.loads((run / name).read_text())
    change(content)
    (run / name).write_text(json.dumps(content))
    figures = sorted((run / "figures").iterdir())
    error = refused_at_once(command(draw.main, run))
    assert re.fullmatch(f"error: {run}/.+{re.escape(message)}.*\n", error)
    assert sorted((run / "figures").iterdir()) == figures
    assert command(draw.main) == (2, "", "error: usage: python -m common.report RUN_DIR\n")
