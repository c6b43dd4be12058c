"""Training and prediction from the command line, in both frameworks."""

import ctypes
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save

import compare
import jax_impl.learner
import torch_impl.learner
from common.data import corpus
from common.data.batches import MAX_SHAPES
from common.inference import prediction
from common.inference.model import Model
from common.linear import train as linear
from common.training import checkpoint, loop, memory, run_directory
from common.training.data import load_data, load_texts
from common.training.learner import predict
from common.training.options import MODELS, TrainConfig
from comparison import tuning
from tests.training.cases import (
    FRAMEWORKS,
    Command,
    each_framework,
    main_of,
    refused,
    refused_at_once,
    rewrite,
    succeeds,
    train_torch,
)

EVERY = [(name, model) for name, models in MODELS.items() for model in models]
SHORT = {("torch", "birnn"), ("torch", "nn.bigru"), ("jax", "bigru")}  # others behave alike


def test_freed_memory_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One arena for all threads makes those of XLA wait for each other."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
    chosen: dict[int, int] = {}
    glibc = SimpleNamespace(mallopt=chosen.__setitem__)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: glibc)
    memory.keep_freed_memory()
    assert chosen == {M_MMAP_THRESHOLD: 2**30, M_TRIM_THRESHOLD: 2**31 - 1}
    memory.keep_freed_memory(by_all_threads=True)
    assert chosen[M_ARENA_MAX] == 1


@pytest.mark.parametrize("print_line", [loop.print_line, linear.print_line, tuning.print_line])
def test_lines_are_written_to_a_pipe_at_once(
    print_line: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python itself writes to a pipe in blocks, so that a log would stay empty for minutes."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written))
    print_line("a line")
    assert written.getvalue() == b"a line\n"


@pytest.mark.parametrize(
    ("name", "model"),
    [pytest.param(*e, marks=[pytest.mark.long] * (e not in SHORT)) for e in EVERY],
)
def test_a_run_prints_the_homeworks_lines_and_leaves_a_run_directory(
    name: str, model: str, command: Command, small: list[str], tmp_path: Path, drawing: None
) -> None:
    arguments = ["--model", model, *small, "--epochs", 2, "--log-every", 2, "--out", tmp_path]
    output = succeeds(command(main_of(FRAMEWORKS[name]), *arguments))
    pattern = r"^\[epoch:\d/2\] \[iter: +\d+\] elapsed time: +\d+ secs   loss: \d\.\d{5}$"
    assert len(re.findall(pattern, output, re.MULTILINE)) == 2 * 3
    assert re.search(r"^Total training time: \d+ secs$", output, re.MULTILINE)
    assert re.search(r"^Accuracy: \d+\.\d\d%$", output, re.MULTILINE)

    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert np.sum(metrics["confusion"]) == 96
    assert metrics["accuracy"] == np.trace(metrics["confusion"]) / 96
    assert metrics["train_seconds"] > metrics["first_step_seconds"] > 0
    assert metrics["tokens_per_second"] > 0
    assert metrics["peak_memory_bytes"] > 50 * 2**20
    assert len(metrics["losses"]) == 6
    assert metrics["compilations"] == 0 if name == "torch" else metrics["compilations"] > 0
    assert metrics["compilations"] <= MAX_SHAPES
    for figure in ("loss", "confusion"):
        assert (tmp_path / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    run = run_directory.load_run(tmp_path)
    assert sum(value.size for value in run.parameters.values()) == metrics["parameters"]
    saved = checkpoint.newest(tmp_path, pytest.fail)
    assert saved.state.step == saved.optimizer_state["step"] == 2 * 6
    assert all(np.array_equal(run.parameters[n], p) for n, p in saved.parameters.items())


def test_skipped_reviews_are_reported_first() -> None:
    corpus.load("rt")
    output: list[str] = []
    load_data(TrainConfig(data="rt", train_size=192, vectors="random:4"), output.append)
    assert output[0] == (
        "rt: 192 of 6,824 reviews to train on (--train-size None for all), "
        "1,000 of 1,706 reviews to test on (--test-size None for all)"
    )
    output.clear()
    load_texts(TrainConfig(data="rt", train_size=6_824, test_size=None), output.append)
    assert output == []


@pytest.mark.parametrize("main", [train_torch, linear.main, compare.main])
def test_rejected_command_writes_nothing(
    main: Callable[[], None], command: Command, tmp_path: Path
) -> None:
    (tmp_path / "table").write_text("text,label\na,b\n,c\n")
    arguments = ("--data", f"csv:{tmp_path}/table", "--out")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "note").touch()
    for out in ("new/deep/run", "notes"):
        error = refused(command(main, *arguments, tmp_path / out))
        assert error == (
            f"error: {tmp_path}/table: line 3: no text; --skip-bad-rows leaves such rows out\n"
        )
    left = {path.name for path in tmp_path.rglob("*")}
    assert left == {"table", "notes", "note"}


def test_jax_predicts_with_the_parameters_of_nn_gru(
    command: Command, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JAX predicts as PyTorch does, for texts given as arguments and as lines."""
    arguments = ["--model", "nn.bigru", *small, "--epochs", 1, "--out", tmp_path]
    succeeds(command(train_torch, *arguments))
    texts = ["a moving and wonderful film", "dull , tired and boring", "xyzzy", "film " * 500]
    answers = []
    for framework in FRAMEWORKS.values():
        inputs = command(main_of(framework, prediction), tmp_path, *texts)
        lines = io.BytesIO("\n".join(texts).encode() + b"\n")
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(lines))
        assert command(main_of(framework, prediction), tmp_path) == inputs
        assert inputs[0] == 0
        answers.append([line.split("\t")[:3] for line in inputs[1].splitlines()])
    ours, theirs = answers
    assert [(label, text) for label, _, text in ours] == [
        (label, text) for label, _, text in theirs
    ]
    for (label, probability, text), expected in zip(ours, texts, strict=True):
        assert label in ("negative", "positive")
        assert 0.5 <= float(probability) <= 1
        assert text == expected
    np.testing.assert_allclose(
        [float(line[1]) for line in ours], [float(line[1]) for line in theirs], atol=1.1e-4
    )


def test_predictions_are_those_of_the_test_run(
    command: Command, small: list[str], tmp_path: Path
) -> None:
    """predict splits and truncates texts as training did, and has the same model."""
    arguments = [*small, "--test-size", "None", "--epochs", 1, "--out", tmp_path]
    succeeds(command(train_torch, *arguments))
    run = run_directory.load_run(tmp_path)
    texts = corpus.load("rt")
    chosen = tuple(" ".join(texts.vocabulary[i] for i in texts.test[row]) for row in range(64))
    result = Model(torch_impl.learner, run).predict(chosen)
    probabilities = [list(each.probabilities.values()) for each in result]
    data = load_data(run.options, print)
    learner = torch_impl.learner.Learner(run.model, TrainConfig(), run.vectors, run.parameters)
    logits, _ = predict(learner, data.test)
    odds = np.exp(logits[:64].astype(float))
    np.testing.assert_allclose(probabilities, odds / odds.sum(1, keepdims=True), rtol=1e-4)


@pytest.mark.parametrize("name", ["torch", pytest.param("jax", marks=pytest.mark.long)])
def test_a_temperature_changes_the_probabilities_alone(
    name: str, command: Command, small: list[str], tmp_path: Path
) -> None:
    """The head contains the temperature, so all programs that read the run use it."""
    options = [*small, "--epochs", 2, "--validation-size", 32]
    runs = []
    for folder, more in ((tmp_path / "plain", ()), (tmp_path / "tempered", ("--temperature",))):
        output = succeeds(command(main_of(FRAMEWORKS[name]), *options, *more, "--out", folder))
        assert ("temperature: " in output) == bool(more)
        metrics = json.loads((folder / "metrics.json").read_text())
        runs.append((metrics, run_directory.load_run(folder).parameters))
    (plain, before), (tempered, after) = runs
    assert plain["temperature"] == 1 != tempered["temperature"]
    assert tempered["confusion"] == plain["confusion"]
    assert tempered["reliability"] != plain["reliability"]
    for parameter, value in before.items():
        by = tempered["temperature"] if parameter.startswith("head.") else 1
        np.testing.assert_allclose(after[parameter], value / by, rtol=1e-6, err_msg=parameter)


BAD_OPTIONS = {
    "data": (["--data", "imbd"], "imbd"),
    "preset": (["--preset", "quik"], "quik"),
    "model": (["--model", "lstm"], "lstm"),
    "vectors": (["--vectors", "glove"], "glove"),
    "batch": (["--batch-size", "0"], "--batch-size 0"),
    "epochs": (["--epochs", "many"], "--epochs"),
    "beyond int32": (["--epochs", str(2**31)], f"--epochs {2**31}"),
    "rate": (["--learning-rate", "nan"], "--learning-rate nan"),
    "length": (["--max-length", "-1"], "--max-length -1"),
    "device": (["--device", "cuda"], "--device cuda"),
    "no device": (["--device", "tpu"], "tpu"),
    "implementation": (["--implementation", "magic"], "magic"),
    "unknown": (["--bathc-size", "3"], "--bathc-size"),
    "out": (["--out", "/proc/nowhere"], "/proc/nowhere"),
    "pooling": (["--pooling", "first"], "--pooling first"),
    "pooling twice": (["--pooling", "max+max"], "--pooling max+max"),
    "dropout": (["--word-dropout", "1"], "--word-dropout 1.0"),
    "negative": (["--feature-dropout", "-0.1"], "--feature-dropout -0.1"),
    "schedule": (["--schedule", "step"], "step"),
    "warmup": (["--warmup", "1.5"], "--warmup 1.5"),
    "weights": (["--class-weights", "1,x"], "--class-weights 1,x"),
    "no weight": (["--class-weights", "0,1"], "--class-weights 0,1"),
    "infinite weight": (["--class-weights", "1,inf"], "--class-weights 1,inf"),
    "temperature": (["--temperature"], "--validation-size"),
}
OF_JAX = ("device", "no device", "implementation", "model")  # which it looks at by itself


@pytest.mark.parametrize(
    ("name", "case"), [*product(["torch"], BAD_OPTIONS), *product(["jax"], OF_JAX)]
)
def test_bad_options_get_one_clear_line(
    name: str, case: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "device":
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a CUDA device")
    monkeypatch.chdir(tmp_path)
    arguments, named = BAD_OPTIONS[case]
    assert named in refused_at_once(command(main_of(FRAMEWORKS[name]), *arguments))
    assert not list(tmp_path.iterdir())


@each_framework
def test_a_run_is_deterministic_only_on_request(
    name: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(FRAMEWORKS[name], "make_deterministic", lambda: calls.append("made"))
    monkeypatch.setattr(loop, "train", lambda framework, options, world: calls.append("trained"))
    succeeds(command(main_of(FRAMEWORKS[name])))
    assert calls == ["trained"]
    succeeds(command(main_of(FRAMEWORKS[name]), "--deterministic"))
    assert calls[1:] == ["made", "trained"]


def test_a_class_that_cannot_be_printed_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "reviews.csv"
    labels = ("a", "b\nc") * 20
    rows = "".join(f'text {number},"{label}"\n' for number, label in enumerate(labels))
    file.write_text(f"text,label\n{rows}")
    with pytest.raises(ValueError, match=r"the class 'b\\nc' has a character"):
        load_texts(TrainConfig(data=f"csv:{file}"), print)


def test_models_that_jax_lacks_are_refused(command: Command) -> None:
    error = refused(command(main_of(jax_impl.learner), "--model", "nn.gru"))
    assert error == "error: --model nn.gru: jax has gru, bigru, rnn, birnn\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    sizes = {"train_size": 64, "test_size": 32, "max_length": 20, "hidden_size": 4, "epochs": 1}
    loop.train(torch_impl.learner, TrainConfig(data="rt", out=folder, **sizes))
    return folder


@each_framework
@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["nowhere", "x"], "nowhere"), (["RUN", "--strict", " "], "text 1"), ([], "RUN_DIR")],
)
def test_bad_prediction_input_gets_one_clear_line(
    name: str, arguments: list[str], named: str, command: Command, trained: Path
) -> None:
    arguments = [str(trained) if word == "RUN" else word for word in arguments]
    error = refused_at_once(command(main_of(FRAMEWORKS[name], prediction), *arguments))
    assert named in error


@pytest.mark.parametrize(
    "file", ["config.json", "vocabulary.txt", "vectors.safetensors", "model.safetensors"]
)
@pytest.mark.parametrize("damage", ["missing", "cut short", "another's"])
def test_a_damaged_run_directory_is_refused_by_file(
    file: str, damage: str, command: Command, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    content = (tmp_path / file).read_bytes()
    if damage == "missing":
        (tmp_path / file).unlink()
    elif damage == "cut short":
        (tmp_path / file).write_bytes(content[: len(content) // 2])
    else:
        other = {"config.json": b"[]", "vocabulary.txt": b"a\nb\n"}.get(
            file, save({"vectors": np.zeros((2, 2), np.float32)})
        )
        (tmp_path / file).write_bytes(other)
    predict = main_of(torch_impl.learner, prediction)
    assert file in refused(command(predict, tmp_path, "text"))
    if damage == "missing":
        return
    # Where there are no checksums (earlier versions wrote none), or they are made to fit, it shows
    # all the same: half a vocabulary at the vectors, whose number has to be the same.
    rewrite(tmp_path, file, (tmp_path / file).read_bytes())
    error = refused(command(predict, tmp_path, "text"))
    assert file in error or (file == "vocabulary.txt" and "vectors.safetensors" in error)
