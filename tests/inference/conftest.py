"""The fixtures of this folder: three trained models, one of them linear, and their server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import torch_impl.learner
from common.linear import run as linear
from common.linear import train
from common.training import loop
from common.training.options import TrainConfig
from tests.inference.client import HOSTS, SIZES, STOPPED, Client
from tests.training.cases import without_figures

__all__ = ["without_figures"]


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory, draw_in_process: None) -> dict[str, Path]:
    """Run directories of two models."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.training.run_directory.draw", lambda folder: True)
        for model in ("gru", "rnn"):
            options = TrainConfig(data="rt", model=model, out=folder / model, **SIZES)
            loop.train(torch_impl.learner, options)
    return {model: folder / model for model in ("gru", "rnn")}


@pytest.fixture(scope="session")
def linear_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a linear model of the same data."""
    out = tmp_path_factory.mktemp("linear") / "linear"
    sizes = {name: SIZES[name] for name in ("train_size", "test_size")}
    train.train(linear.LinearConfig(data="rt", out=out, **sizes))
    return out


@pytest.fixture(scope="session", params=["torch"])
def client(
    request: pytest.FixtureRequest, served: dict[str, Path], linear_run: Path
) -> Iterator[Client]:
    """A server of all models, in the framework of the parameter, at a separate address."""
    options = "--max-bytes", 50_000, "--allowed-hosts", "name.example"
    options += "--host", HOSTS[request.param]
    client = Client(request.param, *served.values(), linear_run, *options)
    yield client
    assert client.end() == STOPPED
