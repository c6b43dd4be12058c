"""What --tensorboard leaves, read back from the event file."""

import json
import struct
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.training.cases import Command, refused, succeeds, train_torch


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """tag -> (step, value) of the folder's event file: records of length, checksum, event."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = folder.iterdir()
    content, result = file.read_bytes(), defaultdict(list)
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + size])
        content = content[12 + size + 4 :]
        for value in event.summary.value:
            result[value.tag].append((event.step, value.simple_value))
    return result


def test_the_scalars_are_those_of_the_run(
    command: Command, small: list[str], tmp_path: Path
) -> None:
    arguments = [*small, "--epochs", 2, "--log-every", 4, "--tensorboard", "--out", tmp_path]
    succeeds(command(train_torch, *arguments))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    result = read(tmp_path / "tensorboard")
    steps, losses = zip(*result["loss"], strict=True)
    assert steps == (4, 6, 10, 12)
    assert losses == pytest.approx(metrics["losses"], rel=1e-6)
    assert [step for step, _ in result["tokens_per_second"]] == [*steps]
    assert result["test_accuracy"] == [(12, pytest.approx(metrics["accuracy"]))]


def test_missing_tensorboardx_is_reported_before_any_work(
    command: Command, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.extras.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    out = tmp_path / "run"
    error = refused(command(train_torch, *small, "--tensorboard", "--out", out))
    assert error.startswith("error: --tensorboard: tensorboardX is not installed: pip install")
    assert not out.exists()
    succeeds(command(train_torch, *small, "--epochs", 1, "--out", out))  # not needed without
