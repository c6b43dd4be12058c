"""A checkpoint of the homework becomes a run directory: both twins predict with it and train on."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import torch_impl.learner
from common.convert import __main__ as convert
from common.data import corpus
from common.data.text import clean, tokenize
from common.inference.model import Model
from common.training import checkpoint, run_directory
from common.training.data import load_data
from common.training.learner import Framework
from tests.convert.test_convert_peers import D, H, MyGRU
from tests.training.cases import FRAMEWORKS, Command, refused, succeeds

TEXTS = ("a moving and wonderful film", "dull, tired and boring", "film")


class Net(nn.Module):
    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.gru, self.fc = MyGRU(), nn.Linear(H, classes)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.gru(words[:, None])[-1, 0]))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def vector_file(tmp_path: Path) -> Path:
    words = corpus.load("rt").vocabulary[:2000]
    matrix = np.random.default_rng(0).standard_normal((len(words), D))
    lines = [f"{w} {' '.join(map(str, row))}\n" for w, row in zip(words, matrix, strict=True)]
    (tmp_path / "glove.txt").write_text("".join(lines), encoding="utf-8")
    return tmp_path / "glove.txt"


def to_run(command: Command, file: Path, vector_file: Path, *more: str) -> tuple[int, str, str]:
    return command(
        convert.main,
        *(file, file.with_name("run"), "--from", "homework", "--to", "run"),
        *("--data", "rt", "--vectors", vector_file, *more),
    )


@pytest.mark.parametrize("kind", ["zip", "legacy", "numpy inside"])
def test_checkpoint_of_the_homework_makes_the_same_predictions(
    kind: str, net: Net, vector_file: Path, command: Command
) -> None:
    state = dict(net.state_dict())
    if kind == "numpy inside":
        state = {name: value.numpy() for name, value in state.items()}
    file = vector_file.with_name("saved_model_Apr_19")  # without a suffix, as the homework's
    torch.save(state, file, _use_new_zipfile_serialization=kind != "legacy")
    succeeds(to_run(command, file, vector_file))
    assert_predicts(file.with_name("run"), net)


def probabilities(framework: Framework, run: run_directory.Run) -> np.ndarray:
    return np.array(
        [[*each.probabilities.values()] for each in Model(framework, run).predict(TEXTS)]
    )


def assert_predicts(folder: Path, net: nn.Module) -> None:
    """Both twins predict from this run directory what the network does."""
    run = run_directory.load_run(folder)
    assert run.classes == ("negative", "positive")
    vectors = torch.tensor(run.vectors)
    ids = {word: number for number, word in enumerate(run.vocabulary)}
    with torch.no_grad():
        expected = [
            net(torch.stack([vectors[ids[w]] for w in words if w in ids])).softmax(0).numpy()
            for words in map(tokenize, map(clean, TEXTS))
        ]
    for framework in FRAMEWORKS.values():
        result = probabilities(framework, run)
        np.testing.assert_allclose(result, expected, rtol=1e-5)


class BuiltinNet(nn.Module):
    """The homework's networks with nn.GRU: the last state of each direction to the classifier."""

    def __init__(self, bidirectional: bool, ways: int = 1) -> None:
        super().__init__()
        self.gru = nn.GRU(D, H, batch_first=True, bidirectional=bidirectional)
        self.fc = nn.Linear(H * (1 + bidirectional) * ways, 2)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.gru(words[None])[1].flatten()))


class PoolingNet(BuiltinNet):
    """One that reads the maximum and the mean of the outputs, without ReLU."""

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        outputs = self.gru(words[None])[0][0]
        return self.fc(torch.cat([outputs.max(0).values, outputs.mean(0)]))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_homework_networks_with_nn_gru_make_the_same_predictions(
    bidirectional: bool, pooled: bool, vector_file: Path, command: Command
) -> None:
    torch.manual_seed(0)
    net = PoolingNet(bidirectional, 2) if pooled else BuiltinNet(bidirectional)
    file = vector_file.with_name("net.pt")
    torch.save(net.state_dict(), file)
    options = ["--from", "homework-nn", *(["--pooling", "max+mean", "--no-relu"] if pooled else [])]
    assert to_run(command, file, vector_file, *options)[0] == 0
    assert_predicts(file.with_name("run"), net)


def test_both_twins_continue_training_from_the_homework(
    net: Net, vector_file: Path, command: Command
) -> None:
    file = vector_file.with_name("net.pt")
    torch.save(net.state_dict(), file)
    assert to_run(command, file, vector_file)[0] == 0
    run = run_directory.load_run(file.with_name("run"))
    saved = checkpoint.newest(file.with_name("run"), print)  # what --resume goes on from
    assert saved is not None
    assert saved.state.step == 0
    options = run.options
    assert (options.batch_size, options.epochs, options.hidden_size) == (1, 4, H)
    batch = next(load_data(options, print).train.epoch())
    losses = []
    for framework in FRAMEWORKS.values():
        learner = framework.Learner(run.model, options, run.vectors, saved.parameters)
        learner.load(saved.parameters, saved.optimizer_state)
        losses.append([float(learner.step(batch)) for _ in range(20)])
    assert losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_classes_in_another_order_are_put_into_that_of_the_data(
    net: Net, vector_file: Path, command: Command
) -> None:
    file = vector_file.with_name("net.pt")
    torch.save(net.state_dict(), file)
    result = []
    for more in ((), ("--classes", "positive", "negative")):
        assert to_run(command, file, vector_file, *more)[0] == 0
        run = run_directory.load_run(file.with_name("run"))
        assert run.classes == ("negative", "positive")
        result.append(probabilities(torch_impl.learner, run))
        shutil.rmtree(file.with_name("run"))
    np.testing.assert_allclose(result[0], result[1][:, ::-1])


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        ({"fc.weight": torch.ones(3, H), "fc.bias": torch.ones(3)}, (), "has 3 classes, rt has"),
        (
            {f"gru.W{g}.weight": torch.ones(H, 9) for g in "zrh"},
            (),
            "GRU has 9 inputs, .* 3 dimensions",
        ),
        ({}, ("--pooling", "max+mean"), "5 inputs, --pooling max.mean has 10"),
        ({}, ("--pooling", "max+min"), "--pooling max.min: expected some of last.max.mean"),
        ({"vectors.weight": torch.ones(20, D)}, (), "contains word vectors"),
        ({}, ("--classes", "bad", "good"), "--classes bad good: the data has negative positive"),
        ({}, ("--vectors", "gone.bin"), "--vectors gone.bin: no such file"),
        ({}, ("--data", "imbd"), "imbd"),
    ],
)
def test_homework_checkpoint_that_does_not_fit_is_rejected(
    change: dict[str, torch.Tensor],
    more: tuple[str, ...],
    message: str,
    net: Net,
    vector_file: Path,
    command: Command,
) -> None:
    file = vector_file.with_name("net.pt")
    torch.save(net.state_dict() | change, file)
    assert re.search(message, refused(to_run(command, file, vector_file, *more)))
    assert not file.with_name("run").exists()


def test_existing_run_is_not_overwritten(net: Net, vector_file: Path, command: Command) -> None:
    file = vector_file.with_name("net.pt")
    torch.save(net.state_dict(), file)
    assert to_run(command, file, vector_file)[0] == 0
    assert "exists and is not empty" in refused(to_run(command, file, vector_file))


def test_data_set_and_vectors_are_required(net: Net, command: Command, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "net.pt")
    arguments = (tmp_path / "net.pt", tmp_path / "run", "--from", "homework", "--to", "run")
    assert "--to run: requires --data" in refused(command(convert.main, *arguments))
