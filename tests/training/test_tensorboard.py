"""What --tensorboard leaves, read back from the event file."""

import json
import struct
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import torch_impl.learner
from common.training import loop

Command = Callable[..., tuple[int, str, str]]


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """tag -> (step, value) of the folder's event file: records of length, checksum, event."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = folder.iterdir()
    content, found = file.read_bytes(), defaultdict(list)
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + size])
        content = content[12 + size + 4 :]
        for value in event.summary.value:
            found[value.tag].append((event.step, value.simple_value))
    return found


def test_the_scalars_are_those_of_the_run(
    command: Command, small: list[str], tmp_path: Path
) -> None:
    arguments = [*small, "--epochs", 2, "--log-every", 4, "--tensorboard", "--out", tmp_path]
    assert command(partial(loop.main, torch_impl.learner), *arguments)[0] == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    found = read(tmp_path / "tensorboard")
    steps, losses = zip(*found["loss"], strict=True)
    assert steps == (4, 6, 10, 12)
    assert losses == pytest.approx(metrics["losses"], rel=1e-6)
    assert [step for step, _ in found["tokens_per_second"]] == [*steps]
    assert found["test_accuracy"] == [(12, pytest.approx(metrics["accuracy"]))]


def test_a_missing_tensorboardx_is_said_before_any_work(
    command: Command, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.training.options.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    out = tmp_path / "run"
    main = partial(loop.main, torch_impl.learner)
    status, _, error = command(main, *small, "--tensorboard", "--out", out)
    assert status == 2
    assert error.startswith("error: --tensorboard: needs tensorboardX: pip install")
    assert not out.exists()
    assert command(main, *small, "--epochs", 1, "--out", out)[0] == 0, "not needed without"
