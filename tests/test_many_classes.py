"""Five classes and two categories, from the data set to the prediction, in both frameworks."""

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import jax_impl.learner
import torch_impl.learner
from common.data import sources
from common.data.sources.dataset import Dataset, Example
from common.inference import prediction
from common.report import content, figures, markdown
from common.report.schema import Data, Results, Run, convert
from common.training import loop, run_directory

Command = Callable[..., tuple[int, str, str]]
FRAMEWORKS = {"torch": torch_impl.learner, "jax": jax_impl.learner}
CLASSES = ("1", "2", "3", "5", "10")  # in the order of numbers
TELLING = ("awful", "poor", "fair", "good", "great")


def examples() -> Iterator[Example]:
    rng = np.random.default_rng(0)
    for i in range(500):
        label = i % len(CLASSES)
        words = [f"word{n}" for n in rng.integers(0, 40, 12)]
        words[rng.integers(12)] = TELLING[label]
        yield Example(" ".join(words), CLASSES[label], ("books", "dvd")[i // 5 % 2])


@pytest.fixture
def five_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "load", lambda spec: Dataset("stars", examples))
    monkeypatch.setattr(sources, "fingerprint", lambda spec: {"data": "stars"})


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_five_classes_are_learnt_reported_and_predicted(
    name: str, five_classes: None, command: Command, tmp_path: Path
) -> None:
    options = ["--vectors", "random:16", "--hidden-size", 16, "--learning-rate", 0.02]
    options += ["--epochs", 6, "--out", tmp_path]
    status, _, error = command(partial(loop.main, FRAMEWORKS[name]), *options)
    assert (status, error) == (0, "")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert tuple(metrics["classes"]) == CLASSES
    assert np.sum(metrics["confusion"], axis=1).tolist() == [20] * 5
    assert metrics["accuracy"] > 0.9
    assert metrics["roc_auc"] > 0.9
    categories = metrics["categories"]
    assert {name: found["support"] for name, found in categories.items()} == {
        "books": 50,
        "dvd": 50,
    }
    correct = sum(found["accuracy"] * found["support"] for found in categories.values())
    assert correct / 100 == pytest.approx(metrics["accuracy"])

    assert "vectors.weight" in run_directory.load_run(tmp_path).parameters
    texts = [f"word1 {word} word2 word3" for word in TELLING]
    predict = partial(prediction.main, FRAMEWORKS[name])
    status, output, _ = command(predict, tmp_path, *texts)
    assert status == 0
    assert [line.split("\t")[0] for line in output.splitlines()] == list(CLASSES)

    data = convert({**metrics["data"], "classes": CLASSES}, Data, tmp_path)
    results = Results({"command": "x"}, [convert(metrics, Run, tmp_path)], data=data)
    report = markdown.write(tmp_path, results, content.sections(results)).read_text()
    low, high = categories["dvd"]["accuracy_interval"]
    cell = f"{categories['dvd']['accuracy']:.2%} ({low:.2%} to {high:.2%})"
    assert f"| category | reviews | {name} gru |" in report
    assert f"| dvd | 50 | {cell} |" in report


def test_the_confusion_figure_stays_readable_with_many_classes(tmp_path: Path) -> None:
    """Each class is named on both axes, and a cell has no more text than it has room for."""
    names = [f"a rather long name of class {i} that goes on" for i in range(20)]
    figure = figures.confusion("confusion", "title", np.eye(20, dtype=int) * 12_345, names)
    figure.save(tmp_path / "confusion.png")
    drawing = (tmp_path / "confusion.svg").read_text()
    width, height = map(
        float, re.findall(r'<svg[^>]* width="([\d.]+)" height="([\d.]+)"', drawing)[0]
    )
    assert max(width, height) < 1400
    for i in range(20):
        assert drawing.count(f"name of class {i} ") >= 2  # on both axes
    assert drawing.count(">100</text>") == 20
    assert "12,345" not in re.findall(r">([^<]*)</text>", drawing)
