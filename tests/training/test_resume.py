"""A run that was interrupted ends as if it had not been; and what stops a run."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import jax_impl.learner
import torch_impl.learner
from common import files
from common.errors import InputError
from common.inference import explanation, prediction
from common.report import __main__ as draw
from common.report.schema import Run
from common.training import checkpoint, loop, run_directory
from common.training.data import Data, load_data
from common.training.learner import validate
from common.training.options import TrainConfig
from comparison import runs
from comparison.processes import Place
from tests import ROOT
from tools import endurance

Command = Callable[..., tuple[int, str, str]]
FRAMEWORKS = {"torch": torch_impl.learner, "jax": jax_impl.learner}
TINY = dataclasses.replace(endurance.TINY, epochs=2, keep=100)
ARGUMENTS = ["--data", "rt", "--vectors", "random:8", "--train-size", "64", "--test-size", "16"]
ARGUMENTS += ["--max-length", "2", "--batch-size", "8", "--hidden-size", "8", "--epochs", "2"]
each_framework = pytest.mark.parametrize("name", FRAMEWORKS)


draw_in_a_process = run_directory.draw  # conftest.py has others draw in their own


def main_of(framework: ModuleType) -> Callable[[], None]:
    return partial(loop.main, framework)


def train(name: str, out: Path, **options: Any) -> dict[str, Any]:
    return loop.train(FRAMEWORKS[name], dataclasses.replace(TINY, out=out, **options))


def cut_back(run: Path, step: int) -> None:
    """Leave of a run what a kill just after this step would have left."""
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
    """Interrupted within an epoch, between two log lines; and between two epochs."""
    try:
        FRAMEWORKS[name].CELLS["gru"].resolve(implementation)
    except InputError:
        pytest.skip("the kernel has not been built")
    how = {"model": model, "implementation": implementation}
    whole = train(name, tmp_path / "whole", **how)
    assert whole["train_seconds"] > 0
    for step in (5, 6, 12) if name == "torch" else (5,):  # JAX compiles anew each time
        run = Path(shutil.copytree(tmp_path / "whole", tmp_path / f"cut-{step}"))
        cut_back(run, step)
        again = train(name, run, **how)
        assert endurance.outcome(run) == endurance.outcome(tmp_path / "whole")
        timed = ("train_seconds", "tokens_per_second", "first_step_seconds", "peak_memory_bytes")
        for key in whole.keys() - {*timed, "compilations"}:
            assert again[key] == whole[key], key


EVERYTHING: dict[str, Any] = {
    "num_layers": 2,
    "pooling": "last+max+mean",
    "relu": False,
    "weight_decay": 0.1,
    "warmup": 0.3,
    "schedule": "linear",
    "word_dropout": 0.1,
    "vector_dropout": 0.1,
    "layer_dropout": 0.2,
    "feature_dropout": 0.3,
    "label_smoothing": 0.1,
    "class_weights": "balanced",
    "ema": 0.8,
}


@pytest.mark.parametrize(
    ("name", "model"), [("torch", "bigru"), ("torch", "nn.bigru"), ("jax", "gru")]
)
def test_so_does_one_with_every_option(
    name: str, model: str, command: Command, tmp_path: Path
) -> None:
    """What is kept is the average; and with it, one predicts and explains."""
    whole = train(name, tmp_path / "whole", model=model, **EVERYTHING)
    run = Path(shutil.copytree(tmp_path / "whole", tmp_path / "cut"))
    cut_back(run, 5)
    saved = checkpoint.load_checkpoint(run / "checkpoints" / "000000005")
    for parameter, value in saved.parameters.items():
        assert not np.array_equal(value, saved.optimizer_state[f"average.{parameter}"]), parameter
    assert train(name, run, model=model, **EVERYTHING)["losses"] == whole["losses"]
    assert endurance.outcome(run) == endurance.outcome(tmp_path / "whole")
    kept = run_directory.load_run(run).parameters
    last = checkpoint.newest(run, print)
    assert last is not None
    assert not np.array_equal(kept["head.weight"], last.parameters["head.weight"])

    answers = []
    for framework in FRAMEWORKS.values():
        predict = partial(prediction.main, framework)
        status, output, error = command(predict, run, "a fine film", "zzz")
        assert (status, error) == (0, "")
        answers.append([float(line.split("\t")[1]) for line in output.splitlines()[-2:]])
        status, output, error = command(partial(explanation.main, framework), run, "the film is")
        assert (status, error) == (0, "")
    np.testing.assert_allclose(*answers, atol=1.1e-4)


def test_the_schedule_forbids_another_number_of_epochs(command: Command, tmp_path: Path) -> None:
    main = main_of(torch_impl.learner)
    assert command(main, *ARGUMENTS, "--schedule", "linear", "--out", tmp_path)[0] == 0
    status, _, error = command(main, "--resume", tmp_path, "--epochs", 3)
    assert status == 2
    assert "--epochs was 2, is 3 (its --schedule hangs on that)" in error


def test_more_epochs_are_as_if_asked_for_at_once(command: Command, tmp_path: Path) -> None:
    main = main_of(torch_impl.learner)
    assert command(main, *ARGUMENTS, "--out", tmp_path / "two")[0] == 0
    assert command(main, *ARGUMENTS, "--epochs", 3, "--out", tmp_path / "three")[0] == 0
    assert command(main, "--resume", tmp_path / "two", "--epochs", 3)[0] == 0
    assert endurance.outcome(tmp_path / "two") == endurance.outcome(tmp_path / "three")
    status, output, error = command(main, "--resume", tmp_path / "two")
    assert (status, error) == (0, "")
    assert "finished before" in output
    status, _, error = command(main, "--resume", tmp_path / "two", "--epochs", 2)
    assert (status, "--epochs 2" in error) == (2, True)


def test_one_framework_goes_on_with_the_others_run(command: Command, tmp_path: Path) -> None:
    assert command(main_of(torch_impl.learner), *ARGUMENTS, "--out", tmp_path)[0] == 0
    status, _, error = command(main_of(jax_impl.learner), *ARGUMENTS, "--out", tmp_path)
    assert status == 2
    assert "holds a run of torch" in error
    arguments = ["--resume", tmp_path, "--epochs", 3]
    status, output, error = command(main_of(jax_impl.learner), *arguments)
    assert (status, error) == (0, "")
    assert "begun with torch" in output
    assert json.loads((tmp_path / "metrics.json").read_text())["framework"] == "jax"


OTHERS = {
    "--learning-rate 0.01": "--learning-rate was 0.0005, is 0.01",
    "--seed 7": "--seed was 0, is 7",
    "--model bigru --batch-size 4": "--model was gru, is bigru, --batch-size was 8",
}


def test_another_configuration_is_refused_by_name(command: Command, tmp_path: Path) -> None:
    main = main_of(torch_impl.learner)
    assert command(main, *ARGUMENTS, "--out", tmp_path)[0] == 0
    before = endurance.outcome(tmp_path)
    ways = ["--resume", tmp_path], [*ARGUMENTS, "--out", tmp_path]
    tried = [(way, other, named) for way in ways for other, named in OTHERS.items()]
    for way, other, named in [*tried, (ways[0], "--out elsewhere", "--out elsewhere")]:
        status, output, error = command(main, *way, *other.split())
        assert (status, output) == (2, "")
        assert re.fullmatch(r"error: .+\n", error)
        assert named in error
    assert endurance.outcome(tmp_path) == before
    allowed = ["--device", "cpu", "--log-every", 3, "--keep", 5, "--checkpoint-seconds", 9]
    assert command(main, "--resume", tmp_path, *allowed)[0] == 0
    assert command(main, *ARGUMENTS, "--seed", 7, "--restart", "--out", tmp_path)[0] == 0
    assert endurance.outcome(tmp_path) != before


def test_other_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train("torch", tmp_path)

    def other(*arguments: Any) -> Data:
        data = load_data(*arguments)
        data.vectors.matrix[0, 0] += 1
        return data

    monkeypatch.setattr(loop, "load_data", other)
    with pytest.raises(InputError, match="is of other data or word vectors"):
        train("torch", tmp_path, epochs=3)


def test_resuming_needs_a_checkpoint(command: Command, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        status, _, error = command(main_of(torch_impl.learner), "--resume", folder)
        assert (status, str(folder) in error) == (2, True)
    assert not list(tmp_path.iterdir())


def after_steps(
    monkeypatch: pytest.MonkeyPatch, name: str, count: int, act: Callable[[Any], object]
) -> None:
    """After so many steps, act(learner); what it returns, if anything, is the loss instead."""
    Learner = FRAMEWORKS[name].Learner
    step, taken = Learner.step, 0

    def counting(self: Any, *shares: Any, **how: Any) -> Any:
        nonlocal taken
        loss = step(self, *shares, **how)
        taken += 1
        changed = act(self) if taken == count else None
        return loss if changed is None else changed

    monkeypatch.setattr(Learner, "step", counting)


@pytest.mark.parametrize(
    ("name", "number", "code"),
    [
        ("torch", signal.SIGINT, 130),
        ("torch", signal.SIGTERM, 143),
        ("jax", signal.SIGINT, 130),
    ],
)
def test_a_signal_saves_and_the_same_command_goes_on(
    name: str,
    number: int,
    code: int,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    main = main_of(FRAMEWORKS[name])
    assert command(main, *ARGUMENTS, "--out", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        after_steps(patch, name, 5, lambda learner: os.kill(os.getpid(), number))
        status, _, error = command(main, *ARGUMENTS, "--out", tmp_path / "run")
    assert status == code
    assert re.fullmatch(r"stopped by SIG(INT|TERM) after step 5; .+\n", error)
    assert checkpoint.last(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "000000005"
    status, output, _ = command(main, *ARGUMENTS, "--out", tmp_path / "run")
    assert status == 0
    assert "going on after step 5" in output
    assert endurance.outcome(tmp_path / "run") == endurance.outcome(tmp_path / "whole")


IMPATIENT = """
import os, signal, time
import torch_impl.learner as twin
from common.training import loop

def step(self, batch, asked):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)

twin.Learner.step = step
loop.main(twin)
"""


def test_the_second_signal_leaves_at_once(tmp_path: Path) -> None:
    arguments = [*ARGUMENTS, "--checkpoint-seconds", "0", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", IMPATIENT, *arguments], cwd=ROOT, timeout=200, check=False
    )
    assert done.returncode == 130
    assert checkpoint.last(tmp_path) is None


def test_compare_stops_with_its_training_and_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["accuracy", "--frameworks", "torch", "--models", "gru", *ARGUMENTS]
    arguments += ["--epochs", "5000", "--log-every", "1", "--out", str(tmp_path)]
    command = [sys.executable, "-u", "compare.py", *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if "[epoch:2/" in line:
                process.send_signal(signal.SIGINT)
                break
        output, error = process.communicate(timeout=200)
    assert process.returncode == 130, output + error
    assert "the same command goes on" in error
    last = checkpoint.last(tmp_path / "torch-gru")
    assert last is not None and int(last.name) > 8

    options = dataclasses.replace(
        checkpoint.load_checkpoint(last).about.options, epochs=1 + int(last.name) // 8
    )
    lines: list[str] = []
    training = runs.Training("torch", options, "torch gru")

    def train() -> list[Run]:
        return runs.train(
            [training], Place(), lambda name, line: lines.append(line), lambda *_: None
        )

    first = train()
    assert any(line.startswith(f"going on after step {int(last.name):,}") for line in lines)
    lines.clear()
    monkeypatch.setattr(runs, "to_arguments", lambda *_: pytest.fail("it was trained again"))
    again = train()
    assert "finished before" in lines[0]
    assert again == first


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

    after_steps(monkeypatch, name, 11, spoil)  # the third of the second epoch
    arguments = ["--checkpoint-seconds", "0", "--log-every", 100, "--out", tmp_path]
    status, _, error = command(main_of(FRAMEWORKS[name]), *ARGUMENTS, *arguments)
    assert status == 3
    assert re.fullmatch(r"error: .+\n", error)
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
    """Nothing is planted here: the numbers themselves run away."""
    arguments = ["--learning-rate", "1e38", "--out", tmp_path]
    status, _, error = command(main_of(FRAMEWORKS[name]), *ARGUMENTS, *arguments)
    assert status == 3
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


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGTRAP)", "the process ended: Trace"),
        ("import sys; sys.exit('one\\nNo space left')", "No space left"),
    ],
)
def test_figures_that_cannot_be_drawn_cost_one_warning(
    program: str,
    reason: str,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The run is whole and finished without them, and they can be drawn later."""
    out = tmp_path / "a run"
    (out / "figures").mkdir(parents=True)
    (out / "figures" / "loss.png").write_text("of another run")
    (tmp_path / "dying.py").write_text(program)
    main = main_of(torch_impl.learner)
    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "draw", partial(draw_in_a_process, program=("dying",)))
        patch.setenv("PYTHONPATH", str(tmp_path))
        status, output, error = command(main, *ARGUMENTS, "--out", out)
    assert (status, error.count("\n")) == (0, 1)
    assert error.startswith(f"warning: {out}: drawing failed ({reason}")
    assert error.endswith(f"); to draw again: python -m dying '{out}'\n")
    assert "Accuracy: " in output
    assert not (out / "figures").exists()
    status, output, error = command(main, *ARGUMENTS, "--out", out)
    assert (status, error) == (0, "")
    assert "finished before" in output
    before = run_directory.load_run(out)
    assert draw_in_a_process(out)
    assert {path.name for path in (out / "figures").iterdir()} == {
        f"{name}.{kind}" for name in ("loss", "confusion") for kind in ("png", "svg")
    }
    assert run_directory.load_run(out).classes == before.classes


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_process_too_small_for_v8_trains_all_the_same(tmp_path: Path) -> None:
    """V8 aborts where it cannot reserve its address space."""
    limited = ["bash", "-c", 'ulimit -v 8000000; exec "$@"', "", sys.executable]
    line = ["-m", "common.linear.train", "--data", "rt", "--train-size", "64", "--test-size", "16"]
    done = subprocess.run(
        [*limited, *line, "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
    assert done.stderr.startswith(f"warning: {tmp_path}: drawing failed")
    assert (tmp_path / files.SUMS).exists()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("drawn")
    train("torch", out)
    return out


@pytest.fixture
def run(drawn: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
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
    name: str,
    change: Callable[[dict[str, Any]], object],
    message: str,
    run: Path,
    command: Command,
) -> None:
    content = json.loads((run / name).read_text())
    change(content)
    (run / name).write_text(json.dumps(content))
    figures = sorted((run / "figures").iterdir())
    status, _, error = command(draw.main, run)
    assert status == 2
    assert re.fullmatch(f"error: {run}/.+{re.escape(message)}.*\n", error)
    assert sorted((run / "figures").iterdir()) == figures
    assert command(draw.main) == (2, "", "error: usage: python -m common.report RUN_DIR\n")
