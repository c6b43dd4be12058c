"""Damaged, foreign and hostile files of checkpoints and runs are named and not used."""

import json
import os
import re
import resource
import shutil
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import torch_impl.learner
from common import files, params
from common.errors import InputError
from common.inference import prediction
from common.params import ModelConfig
from common.training import checkpoint, loop, run_directory
from common.training.options import TrainConfig
from tests.training.cases import (
    Command,
    main_of,
    refused,
    refused_at_once,
    rewrite,
    succeeds,
    train_torch,
)

SIZES = {"train_size": 64, "test_size": 32, "max_length": 20, "hidden_size": 4, "epochs": 1}
OPTIONS = TrainConfig(data="rt", vectors="random:4", checkpoint_seconds=0, log_every=1, **SIZES)
predict = main_of(torch_impl.learner, prediction)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, without_figures: Callable[..., bool]) -> Path:
    folder = tmp_path_factory.mktemp("run")
    loop.train(torch_impl.learner, TrainConfig(**{**vars(OPTIONS), "out": folder}))
    assert without_figures(folder)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def last(run: Path) -> Path:
    """The last checkpoint of the run."""
    result = checkpoint.last(run)
    assert result is not None
    return result


def test_last_intact_checkpoint_is_used_and_the_damaged_one_named(run: Path) -> None:
    before, last = sorted((run / "checkpoints").iterdir())
    assert checkpoint.newest(run, pytest.fail).path == last  # type: ignore[arg-type]
    (last / "optimizer.safetensors").unlink()
    warnings: list[str] = []
    assert checkpoint.newest(run, warnings.append).path == before
    (warning,) = warnings
    assert str(last / "optimizer.safetensors") in warning
    shutil.rmtree(before)
    with pytest.raises(InputError, match="all are damaged"):
        checkpoint.newest(run, warnings.append)


def test_a_checkpoint_under_another_number_is_refused(last: Path) -> None:
    last.rename(last.with_name("000000007"))
    with pytest.raises(InputError, match="is the state of step 2"):
        checkpoint.load_checkpoint(last.with_name("000000007"))


def test_keep_removes_no_intact_checkpoint(run: Path, last: Path) -> None:
    """A damaged checkpoint does not count as one of the checkpoints that --keep retains."""
    (last / "state.json").unlink()
    (run / files.SUMS).unlink()
    loop.train(torch_impl.learner, TrainConfig(**{**vars(OPTIONS), "out": run, "keep": 1}))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["000000002"]
    assert checkpoint.newest(run, pytest.fail) is not None


@pytest.mark.parametrize("name", ["config.json", "state.json"])
def test_every_field_of_another_type_gets_one_clear_line(name: str, last: Path) -> None:
    right = json.loads((last / name).read_text())
    wrong = [None, True, -1, 10**30, 1.5, "x", "\x1b[2J", [], [1], {}, {"a": 1}, [["x"] * 3]]

    def places(value: object, at: tuple = ()) -> list[tuple]:
        return [at] + [
            place
            for key, inner in (value.items() if isinstance(value, dict) else ())
            for place in places(inner, (*at, key))
        ]

    refused = 0
    for *path, key in filter(None, places(right)):
        for value in wrong:
            about = json.loads(json.dumps(right))
            inner = about
            for step in path:
                inner = inner[step]
            inner[key] = value
            rewrite(last, name, json.dumps(about).encode())
            try:
                checkpoint.load_checkpoint(last)
            except InputError as error:
                refused += 1
                assert name in str(error) or ".safetensors" in str(error)
                assert "\n" not in str(error) and "\x1b" not in str(error)
    assert refused > 50  # a valid value of the field is another configuration, not damage


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[" * 100_000,
        b'{"framework": ' + b"[" * 100_000,
        b'{"framework": "torch", "classes": NaN}',
        b"\xff\xfe",
        b" " * 2**21,
    ],
)
def test_malformed_json_gets_one_clear_line(content: bytes, run: Path, command: Command) -> None:
    rewrite(run, "config.json", content)
    assert "config.json" in refused(command(predict, run, "text"))


MANY = 2_000_000
TIMES = {".safetensors": 3, ".txt": 30}  # what a file's content may take, as the docstring says
LINE = ("epoch", "iteration", "seconds", "loss", "gradient_norm", "tokens_per_second")


def assert_reading_takes_no_more_than_said(
    read: Callable[[Path], Any], folder: Path, constant: int = 48 * 2**20
) -> Any:
    size = sum(
        TIMES.get(path.suffix, 1) * path.stat().st_size
        for path in folder.iterdir()
        if path.is_file()
    )
    result = None
    tracemalloc.start()
    with suppress(InputError):
        result = read(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size + constant
    return result


@pytest.mark.parametrize("word", [pytest.param("a", marks=pytest.mark.long), "\N{GRINNING FACE}"])
def test_memory_of_loading_is_within_the_documented_limit(word: str, run: Path) -> None:
    about = json.loads((run / "config.json").read_text())
    about["model"] |= {"input_size": 1, "hidden_size": 2000}
    about["options"]["hidden_size"] = 2000
    shapes = params.shapes(ModelConfig(**about["model"])) | {"vectors": (MANY, 1)}
    arrays = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    rewrite(run, "config.json", json.dumps(about).encode())
    words = "".join(f"{word}{number:x}\n" for number in range(MANY))
    rewrite(run, "vocabulary.txt", words.encode())
    rewrite(run, "vectors.safetensors", files.to_tensors({"vectors": arrays.pop("vectors")}))
    rewrite(run, "model.safetensors", files.to_tensors(arrays))
    result = assert_reading_takes_no_more_than_said(run_directory.load_run, run)
    assert len(result.vocabulary) == MANY


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b'{"classes": [' + b'"",' * 300_000 + b'""]}'),
        ("config.json", b'{"classes": [' + b'"ab",' * 2 * MANY + b'""]}'),
        ("vocabulary.txt", b"a" * 20 * MANY + "\N{GRINNING FACE}\n".encode()),
        ("vectors.safetensors", (20 * MANY).to_bytes(8, "little") + b" " * 20 * MANY),
        ("log.jsonl", (json.dumps(dict.fromkeys(LINE, 0)) + "\n").encode() * (MANY // 16)),
        ("log.jsonl", b'{"epoch": [' + b"[]," * 10 * MANY),
        ("state.json", b'{"losses": [' + b"0," * 500_000 + b"0]}"),
        ("optimizer.safetensors", b"\0\0\x3f\0\0\0\0\0{" + b'"a":{},' * 590_000 + b" " * 2**20),
        ("metrics.json", b"[" + b"[]," * (MANY // 3)),
    ],
)
def test_malicious_files_need_no_more_memory(
    name: str, content: bytes, run: Path, last: Path
) -> None:
    if name in run_directory.RUN_FILES:
        rewrite(run, name, content)
        assert_reading_takes_no_more_than_said(run_directory.load_run, run)
        options = checkpoint.load_checkpoint(last).about.options
        finished = partial(run_directory.finished, framework="torch", options=options)
        assert_reading_takes_no_more_than_said(finished, run)
    else:
        rewrite(last, name, content)
        assert_reading_takes_no_more_than_said(checkpoint.load_checkpoint, last)


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", 10**9), ("num_layers", 10**9), ("input_size", 10**12), ("classes", 2**40)],
)
def test_claimed_sizes_allocate_no_memory(field: str, value: int, run: Path) -> None:
    about = json.loads((run / "config.json").read_text())
    about["model"][field] = value
    rewrite(run, "config.json", json.dumps(about).encode())
    assert_reading_takes_no_more_than_said(run_directory.load_run, run, constant=2**20)
    with pytest.raises(InputError, match=r"config\.json|safetensors"):
        run_directory.load_run(run)


def test_neither_pipes_nor_devices_are_read(run: Path) -> None:
    path = run / "vocabulary.txt"
    for make in (os.mkfifo, partial(os.symlink, "/dev/zero")):
        path.unlink()
        make(path)
        with pytest.raises(InputError, match=r"vocabulary\.txt: is not a regular file"):
            run_directory.load_run(run)


@pytest.mark.parametrize("name", ["log.jsonl", "checkpoints", "figures", "figures/loss.png"])
def test_no_link_leads_out_of_the_run_directory(name: str, run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (run / name).rename(elsewhere)
    (run / name).symlink_to(elsewhere)
    before = sorted(tmp_path.rglob("*"))
    options = TrainConfig(**{**vars(OPTIONS), "out": run, "epochs": 2})
    with pytest.raises(InputError, match="symbolic link"):
        loop.train(torch_impl.learner, options)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_folder_in_the_configuration_is_not_written_to(
    run: Path, last: Path, tmp_path: Path, command: Command
) -> None:
    """A moved run directory is written at its present place, not at the one that it records."""
    about = json.loads((last / "config.json").read_text())
    about["options"]["out"] = str(tmp_path / "elsewhere")
    rewrite(last, "config.json", json.dumps(about).encode())
    succeeds(command(train_torch, "--resume", run, "--epochs", 2))
    assert checkpoint.last(run) == run / "checkpoints" / "000000004"
    assert not (tmp_path / "elsewhere").exists()


def test_numbers_that_are_not_finite_are_refused(run: Path) -> None:
    parameters = load_file(run / "model.safetensors")
    parameters["head.bias"][0] = np.nan
    rewrite(run, "model.safetensors", files.to_tensors(parameters))
    with pytest.raises(InputError, match=r"head\.bias is not all finite"):
        run_directory.load_run(run)


def test_a_second_process_is_refused(run: Path, command: Command) -> None:
    with run_directory.lock(run):
        error = refused_at_once(command(train_torch, "--resume", run, "--epochs", 2))
    assert error == f"error: {run}: is locked by process {os.getpid()}\n"
    with run_directory.lock(run):  # the lock was released
        pass


@pytest.mark.parametrize(
    ("name", "mode", "what"),
    [
        (".", 0o000, "read"),
        (".", 0o500, "written"),
        ("model.safetensors", 0o000, "read"),
        ("checkpoints", 0o000, "read"),
        ("checkpoints", 0o500, "written"),
        (".lock", 0o400, "written"),
        ("log.jsonl", 0o400, None),  # which is replaced, and that takes no right to the file
    ],
)
def test_folder_without_permissions(
    name: str, mode: int, what: str | None, run: Path, command: Command, unprivileged: None
) -> None:
    path = run / name
    path.chmod(mode)
    try:
        if name == "model.safetensors":
            result = command(predict, run, "text")
        else:
            result = command(train_torch, "--resume", run, "--epochs", 2)
    finally:
        path.chmod(0o700)
    if what is None:
        succeeds(result)
    else:
        message = rf"{re.escape(str(path))}.* cannot be {what} \(Permission denied\)"
        assert re.search(message, refused(result))
        assert checkpoint.newest(run, pytest.fail).state.step == 2  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize("what", ["full", "vanished", "no folder", "no rights"])
def test_a_disk_that_fails_costs_no_checkpoint(
    what: str,
    run: Path,
    last: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    unprivileged: None,
) -> None:
    save = checkpoint.save_checkpoint
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def failing(*arguments: object) -> Path:
        if what == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limit[1]))
        elif what == "vanished":
            run.rename(run.with_name("moved"))
        elif what == "no rights":
            (run / "checkpoints").chmod(0o500)
        else:
            (run / "checkpoints").rename(run / "kept")
            (run / "checkpoints").write_text("a file")
        return save(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "save_checkpoint", failing)
    try:
        result = command(train_torch, "--resume", run, "--epochs", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        if what == "no rights":
            (run / "checkpoints").chmod(0o700)
    error = refused(result)
    assert re.search(r"checkpoints/000000003: cannot be written \(.+\); the last ", error)
    if what in ("full", "no rights"):
        assert str(last) in error
        assert not (run / "checkpoints" / ".partial").exists()
    elif what == "vanished":
        run.with_name("moved").rename(run)
    else:
        (run / "checkpoints").unlink()
        (run / "kept").rename(run / "checkpoints")
    assert checkpoint.newest(run, pytest.fail).path == last  # type: ignore[arg-type, union-attr]
