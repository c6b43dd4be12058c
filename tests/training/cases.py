"""Shared by the tests that train: the frameworks, a small run, and assertions about commands."""

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.numpy import load_file

import jax_impl.learner
import torch_impl.learner
from common import files
from common.training import checkpoint, loop, run_directory

Command = Callable[..., tuple[int, str, str]]
FRAMEWORKS = {"torch": torch_impl.learner, "jax": jax_impl.learner}
each_framework = pytest.mark.parametrize("name", FRAMEWORKS)
ARGUMENTS = [
    "--data",
    "rt",
    "--vectors",
    "random:8",
    "--train-size",
    "64",
    "--test-size",
    "16",
    "--max-length",
    "2",
    "--batch-size",
    "8",
    "--hidden-size",
    "8",
    "--epochs",
    "2",
    "--warmup",
    "0",
    "--schedule",
    "constant",
]


def main_of(framework: ModuleType, tool: ModuleType = loop) -> Callable[[], None]:
    """The main function of a program, by default of training, in this framework."""
    return partial(tool.main, framework)


train_torch = main_of(torch_impl.learner)


def succeeds(result: tuple[int, str, str]) -> str:
    """The standard output of a command that ended well and wrote no warning."""
    status, output, error = result
    assert (status, error) == (0, "")
    return output


def refused(result: tuple[int, str, str], status: int = 2) -> str:
    """The one line that a command wrote to standard error before it ended with this status."""
    assert result[0] == status
    assert re.fullmatch(r"error: .+\n", result[2])
    return result[2]


def refused_at_once(result: tuple[int, str, str]) -> str:
    """The line of `refused`, of a command that wrote nothing to standard output."""
    assert result[1] == ""
    return refused(result)


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Replace a file of a run or a checkpoint, and update SHA256SUMS."""
    (folder / name).write_bytes(content)
    is_checkpoint = folder.name.isdigit()
    names = (*checkpoint.CHECKPOINT_FILES, checkpoint.BEST)
    names = names if is_checkpoint else run_directory.RUN_FILES
    content_of = {each: (folder / each).read_bytes() for each in names if (folder / each).exists()}
    (folder / files.SUMS).write_bytes(files.checksums(content_of))


REMOVED = {"label_smoothing": 0.1, "weight_decay": 0.1, "layer_dropout": 0.2, "schedule": "cosine"}
REMOVED |= {"ema": 0.9}


def add_removed_options(run: Path, **options: object) -> None:
    """Make a run one of an earlier release, which had these options, in its own folder and in all
    checkpoints; with ema, the checkpoints hold an average: twice the parameters."""
    for folder in (run, *(run / "checkpoints").iterdir()):
        about = json.loads((folder / "config.json").read_text())
        about["options"] |= options
        rewrite(folder, "config.json", files.to_json(about))
        if options.get("ema") and (path := folder / "optimizer.safetensors").exists():
            parameters = load_file(folder / "model.safetensors")
            average = {f"average.{name}": 2 * value for name, value in parameters.items()}
            rewrite(folder, path.name, files.to_tensors(load_file(path) | average))


@pytest.fixture(scope="module", autouse=True)
def without_figures(draw_in_process: None) -> Iterator[Callable[..., bool]]:
    """Figures take longer than a small training, so only tests with the fixture `drawing` draw."""
    draw = run_directory.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_directory, "draw", lambda folder: True)
        yield draw


@pytest.fixture
def drawing(without_figures: Callable[..., bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished runs are drawn, in this process."""
    monkeypatch.setattr(run_directory, "draw", without_figures)
