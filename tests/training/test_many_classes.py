"""Five classes and two categories, from the data set to the prediction, in both frameworks; and
what is different with very many classes."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from common import files, metrics
from common.data import corpus, sources
from common.data.sources.dataset import Dataset, Example
from common.errors import InputError
from common.inference import prediction
from common.report import content, figures, html, markdown
from common.report.schema import Data, Metrics, Results, Run, convert
from common.training import run_directory
from tests.training.cases import FRAMEWORKS, Command, each_framework, main_of, succeeds

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


@each_framework
def test_five_classes_are_learnt_reported_and_predicted(
    name: str, five_classes: None, command: Command, tmp_path: Path
) -> None:
    options = ["--vectors", "random:16", "--hidden-size", 16, "--learning-rate", 0.02]
    options += ["--epochs", 6, "--out", tmp_path]
    succeeds(command(main_of(FRAMEWORKS[name]), *options))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert tuple(metrics["classes"]) == CLASSES
    assert np.sum(metrics["confusion"], axis=1).tolist() == [20] * 5
    assert metrics["accuracy"] > 0.9
    assert metrics["roc_auc"] > 0.9
    categories = metrics["categories"]
    assert {key: value["support"] for key, value in categories.items()} == {"books": 50, "dvd": 50}
    correct = sum(result["accuracy"] * result["support"] for result in categories.values())
    assert correct / 100 == pytest.approx(metrics["accuracy"])

    assert "vectors.weight" in run_directory.load_run(tmp_path).parameters
    texts = [f"word1 {word} word2 word3" for word in TELLING]
    output = succeeds(command(main_of(FRAMEWORKS[name], prediction), tmp_path, *texts))
    assert [line.split("\t")[0] for line in output.splitlines()] == list(CLASSES)

    data = convert({**metrics["data"], "classes": CLASSES}, Data, tmp_path)
    results = Results({"command": "x"}, [convert(metrics, Run, tmp_path)], data=data)
    report = markdown.write(tmp_path, results, content.sections(results)).read_text()
    low, high = categories["dvd"]["accuracy_interval"]
    cell = f"{categories['dvd']['accuracy']:.2%} ({low:.2%} to {high:.2%})"
    assert f"| category | reviews | {name} gru |" in report
    assert f"| dvd | 50 | {cell} |" in report


@each_framework
def test_a_run_with_many_classes_is_finished_and_stays_so(
    name: str, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A finished run is not trained again, and all logits are never in memory at once."""

    def many() -> Iterator[Example]:
        for i in range(5 * 40):
            yield Example(f"word{i % 7} word{i % 40} word{i}", f"class {i % 40}")

    monkeypatch.setattr(sources, "load", lambda spec: Dataset("many", many))
    monkeypatch.setattr(sources, "fingerprint", lambda spec: {"data": "many"})
    monkeypatch.setattr(metrics, "MOST_SCORES", 0)
    options = ["--vectors", "random:8", "--hidden-size", 8, "--epochs", 1, "--out", tmp_path]
    main = main_of(FRAMEWORKS[name])
    succeeds(command(main, *options))
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert result["roc_auc"] is None
    assert sum(count for *_, count in result["mistakes"]) == round(40 * (1 - result["accuracy"]))
    assert len(result["classes"]) == 40
    assert "finished before" in succeeds(command(main, *options))


@pytest.mark.parametrize("declared", [(), ("a", "b", "c", "d")])
def test_more_classes_than_there_may_be_are_refused_at_once(
    declared: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def rows() -> Iterator[Example]:
        for i in range(100):
            read.append(i)
            yield Example("word " * 100, "abcd"[i % 2 if declared else i % 4])

    monkeypatch.setattr(corpus, "MAX_CLASSES", 3)
    monkeypatch.setattr(corpus, "CHUNK", 1000)
    with pytest.raises(InputError, match=r"^stars: more than 3 different labels$"):
        corpus.encoded(lambda: Dataset("stars", rows, declared), {"data": "too many"})
    assert len(read) == (100 if declared else 4)


def test_class_names_that_no_run_directory_could_hold_are_refused() -> None:
    def rows() -> Iterator[Example]:
        for i in range(20):
            yield Example(f"word{i}", "ab"[i % 2] * 300_000)

    with pytest.raises(InputError, match=r"^stars: the names of the 2 classes are too long"):
        corpus.encoded(lambda: Dataset("stars", rows), {"data": "too long"})


def results_of(classes: int) -> dict[str, Any]:
    """The content of metrics.json for a run with this number of classes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, 5 * classes)
    logits = rng.standard_normal((len(labels), classes), np.float32)
    logits[np.arange(len(labels)), labels] += 3
    result = metrics.evaluate(logits, labels, [f"class {i}" for i in range(classes)])
    run = {"framework": "torch", "model": "gru", "implementation": "fused", "cores": 1}
    run |= {"train_seconds": 1, "tokens_per_second": 1, "peak_memory_bytes": 1}
    sizes = {"train": 1, "test": len(labels), "vocabulary": 1}
    data = {"name": "many", "vectors": "random:1", **sizes}
    return {**run, **result, "losses": [0.7], "loss_epochs": [1.0], "data": data}


def test_run_of_300_classes_can_be_read(tmp_path: Path) -> None:
    """No output contains a matrix of 90,000 cells: neither figures, page nor metrics.json."""
    run = results_of(300)
    names = list(run["classes"])
    figures.draw_run(tmp_path, convert(run, Metrics, tmp_path), names, "quick")
    texts = (tmp_path / "confusion.svg").read_text()
    assert texts.count(" → ") >= metrics.MOST_DRAWN
    assert {path.stem for path in tmp_path.iterdir()} == {"confusion", "classes", "loss"}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2e6
    assert len(files.to_json(run)) < 100_000

    result = {"environment": {"command": "x"}, "runs": [run], "data": {**run["data"]}}
    result["data"]["classes"] = names
    results = convert(result, Results, tmp_path)
    page = html.write(tmp_path, results, content.sections(results)).read_text()
    bare = html.write(tmp_path, Results({"command": "x"}), {}).read_text()
    assert len(page) - len(bare) < 100_000
    report = markdown.write(tmp_path, results, content.sections(results)).read_text()
    true, predicted, count = run["mistakes"][0]
    support = run["classes"][f"class {true}"]["support"]
    assert f"{count} of {support} class {true} taken for class {predicted}" in report
    largest = max(run["classes"].values(), key=lambda each: each["support"])
    assert f"| {largest['support']} | {largest['recall']:.2%} |" in report
    assert report.count("\n| class ") == 1 + metrics.MOST_DRAWN
    written = msgspec.to_builtins(results)["runs"][0]
    assert written["classes"]["class 7"]["recall"] == run["classes"]["class 7"]["recall"]


def test_results_with_the_whole_matrix_of_many_classes_are_still_read(tmp_path: Path) -> None:
    """Earlier versions wrote the whole matrix, and no scores of each class."""
    new = results_of(40)
    matrix = np.diag([each["support"] for each in new["classes"].values()])
    for true, predicted, count in new["mistakes"]:
        matrix[true, predicted] += count
        matrix[true, true] -= count
    old = {name: value for name, value in new.items() if name not in ("mistakes", "classes")}
    before, now = (
        convert({**old, "confusion": matrix.tolist()}, Run, tmp_path),
        convert(new, Run, tmp_path),
    )
    assert before.most_mistaken == now.most_mistaken[: metrics.MOST_DRAWN]
    assert np.allclose(before.recalls, now.recalls)
    classes = list(new["classes"])
    assert before.problem(classes) == now.problem(classes) == ""
    assert "confusion" in before.problem(classes[1:])
    assert "classes" in now.problem(classes[::-1])
    now.mistakes[0] = (40, 0, 1)
    assert "mistakes" in now.problem(classes)


def test_the_confusion_figure_stays_readable_with_many_classes(tmp_path: Path) -> None:
    """Both axes name each class, and the text of a cell fits the cell."""
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
