"""The models that `load` returns, and the command line of predict, in both frameworks."""

import io
import itertools
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors import numpy as safetensors

import jax_impl
import jax_impl.learner
import torch_impl
import torch_impl.learner
from common.inference import explanation, prediction
from common.inference.model import ROWS, Model
from common.training import checkpoint, loop, run_directory
from common.training.options import TrainConfig
from tests.training.cases import (
    REMOVED,
    Command,
    add_removed_options,
    refused_at_once,
    rewrite,
    succeeds,
)

TWINS = {"torch": torch_impl, "jax": jax_impl}
TEXTS = ["a moving and wonderful film", "", "dull, tired and boring", "xyzzy", "film " * 90, "  \t"]
SIZES = {"train_size": 64, "test_size": 32, "max_length": 20, "hidden_size": 4, "epochs": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the best parameters by validation loss."""
    folder = tmp_path_factory.mktemp("run")
    options = TrainConfig(data="rt", out=folder, validation_size=16, **SIZES)
    loop.train(torch_impl.learner, options)
    return folder


@pytest.fixture(scope="module", params=TWINS)
def model(request: pytest.FixtureRequest, trained: Path) -> Model:
    return TWINS[request.param].load(trained)


def test_predictions_say_everything(model: Model) -> None:
    result, logits = model.predict(TEXTS), model.logits(TEXTS)
    assert model.classes == ("negative", "positive")
    for answer, row in zip(result, logits, strict=True):
        assert answer.label == model.classes[row.argmax()]
        assert list(answer.probabilities) == list(model.classes)
        odds = np.exp(row.astype(float))
        np.testing.assert_allclose(list(answer.probabilities.values()), odds / odds.sum())
        assert answer.probability == max(answer.probabilities.values())
    assert [answer.known_words for answer in result] == [3, 0, 1, 0, 90, 0]
    assert result[1].probabilities == result[3].probabilities == result[5].probabilities
    assert model.predict([]) == [] and model.logits([]).shape == (0, 2)
    assert model.predict(text for text in TEXTS) == result


def test_prediction_depends_only_on_its_text(model: Model) -> None:
    """A prediction does not depend on the number and lengths of the other texts."""
    alone = np.concatenate([model.logits([text]) for text in TEXTS])
    for count in (*ROWS, 2 * ROWS[-1] + 3):
        texts = [*itertools.islice(itertools.cycle(TEXTS), count)]
        expected = alone[np.arange(count) % len(TEXTS)]
        np.testing.assert_allclose(model.logits(texts), expected, rtol=0, atol=1e-6)


def test_it_is_compiled_once(trained: Path) -> None:
    model = jax_impl.load(trained)
    compiled = type(model.predictor)._logits._cache_size  # type: ignore[attr-defined]
    model.predict(["one film"])
    before = compiled()
    for text in ("a film", "", "the good and the bad and the ugly", "xyzzy"):
        model.predict([text])
    assert compiled() == before
    model.predict(["film " * 30])
    assert compiled() == before
    model.predict(["film"] * 5)
    assert compiled() == before + 1


def test_threads_share_it(model: Model) -> None:
    texts = [" ".join(TEXTS[0].split()[: n % 5 + 1]) for n in range(40)]
    expected = [model.predict([text]) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(lambda text: model.predict([text]), texts * 5)] == expected * 5


@pytest.mark.parametrize(
    ("texts", "problem"),
    [("a film", "found one str"), (["a", None], r"texts\[1\]: .* NoneType"), (3, "found int")],
)
def test_texts_of_wrong_type_are_rejected(model: Model, texts: list[str], problem: str) -> None:
    for ask in (model.predict, model.logits):
        with pytest.raises(TypeError, match=problem):
            ask(texts)


@pytest.mark.parametrize("name", TWINS)
def test_checkpoint_of_an_unfinished_run_predicts(
    name: str, trained: Path, tmp_path: Path, command: Command
) -> None:
    load = TWINS[name].load
    best = load(trained).logits(TEXTS)
    assert np.array_equal(load(trained, checkpoint="best").logits(TEXTS), best)
    last = load(trained, checkpoint="last").logits(TEXTS)
    saved = checkpoint.newest(trained, print)
    assert saved is not None
    run = replace(run_directory.load_run(trained), parameters=saved.parameters)
    plain = Model(TWINS[name].predictor, run)
    assert np.array_equal(plain.logits(TEXTS), last)

    unfinished = tmp_path / "run"
    folder = checkpoint.last(trained)
    assert folder is not None
    (unfinished / "checkpoints").mkdir(parents=True)
    folder.rename(moved := unfinished / "checkpoints" / folder.name)
    try:
        with pytest.raises(ValueError, match="not finished"):
            load(unfinished)
        assert np.array_equal(load(unfinished, checkpoint="last").logits(TEXTS), last)
        for tool in (prediction, explanation):
            main = partial(tool.main, TWINS[name].learner)
            status, output, _ = command(main, unfinished, "a film", "--checkpoint", "best")
            assert status == 0 and output.startswith(("negative", "positive"))
    finally:
        moved.rename(folder)
    with pytest.raises(ValueError, match="has no checkpoint"):
        load(unfinished, checkpoint="last")
    with pytest.raises(ValueError, match="expected last or best"):
        load(trained, checkpoint="first")


def test_a_checkpoint_without_a_best_one_says_so(tmp_path: Path) -> None:
    options = TrainConfig(data="rt", out=tmp_path, **SIZES)
    loop.train(torch_impl.learner, options)
    with pytest.raises(ValueError, match="validation reviews"):
        torch_impl.load(tmp_path, checkpoint="best")


@pytest.mark.parametrize("name", TWINS)
def test_run_with_removed_options_can_be_read(
    name: str, trained: Path, tmp_path: Path, command: Command
) -> None:
    """Its last checkpoint is read with the average, if it has one."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    add_removed_options(run, **REMOVED)
    before, model = TWINS[name].load(trained), TWINS[name].load(run)
    assert model.predict(TEXTS) == before.predict(TEXTS)
    for tool in (prediction, explanation):
        main = partial(tool.main, TWINS[name].learner)
        assert command(main, run, TEXTS[0]) == command(main, trained, TEXTS[0])
    last = checkpoint.newest(run, pytest.fail)
    assert last is not None
    for which, parameters in (
        ("best", last.best),
        ("last", {n: 2 * value for n, value in last.parameters.items()}),
    ):
        result = TWINS[name].load(run, checkpoint=which).run.parameters
        for parameter, value in parameters.items():
            np.testing.assert_array_equal(result[parameter], value, err_msg=parameter)


@pytest.mark.parametrize("name", TWINS)
def test_the_command_line(
    name: str, trained: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = partial(prediction.main, TWINS[name].learner)
    output = succeeds(command(predict, trained, "--json", *TEXTS))
    answers = TWINS[name].load(trained).predict(TEXTS)
    for line, text, answer in zip(output.splitlines(), TEXTS, answers, strict=True):
        assert json.loads(line) == {"text": text, **vars(answer)}

    def read(*arguments: str) -> tuple[int, str, str]:
        lines = io.BytesIO("film\r\n\nxyzzy\na wonderful\x85 \xe9t\xe9".encode())
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(lines))
        return command(predict, trained, *arguments)

    output = succeeds(read())
    printed = [line.split("\t")[2:] for line in output.split("\n")[:-1]]
    unknown = "(no known word: the answer to an empty text)"
    assert printed == [["film"], ["", unknown], ["xyzzy", unknown], ["a wonderful\x85 \xe9t\xe9"]]
    assert read("-") == (0, output, "")
    assert read("dull", "-", "film")[1].count("\n") == 6
    for texts, number in ((("--strict",), 2), (("--strict", "film", "xyzzy"), 2)):
        status, _, error = read(*texts)
        assert status == 2 and re.fullmatch(rf"error: text {number}: has no word .+\n", error)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    assert command(predict, trained)[::2] == (
        2,
        "error: no text: give some as arguments, or as lines of standard input\n",
    )


def with_json(*keys: str, value: object) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        whole = part = json.loads(content)
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value
        return json.dumps(whole).encode()

    return change


def filled(name: str, value: float, dtype: type) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        tensors = safetensors.load(content)
        return safetensors.save(tensors | {name: np.full_like(tensors[name], value, dtype)})

    return change


CONFIG, WORDS, PARAMETERS = "config.json", "vocabulary.txt", "model.safetensors"
DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "pooling": (CONFIG, with_json("options", "pooling", value="xx"), "--pooling xx"),
    "model": (CONFIG, with_json("model", "pooling", value="xx"), "model: does not match"),
    "type": (CONFIG, with_json("model", "relu", value=3), "bool"),
    "name": (CONFIG, with_json("options", "model", value="xx"), "no model 'xx'"),
    "framework": (CONFIG, with_json("framework", value="xx"), "holds a linear model"),
    "classes": (CONFIG, with_json("classes", value=["a", "a"]), "distinct printable names"),
    "twice": (WORDS, lambda c: b"\n".join([c.split(b"\n")[1], *c.split(b"\n")[1:]]), "distinct"),
    "empty": (WORDS, lambda c: b"\n".join([b"", *c.split(b"\n")[1:]]), "distinct"),
    "Latin-1": (WORDS, lambda c: b"\n".join([b"\xe9", *c.split(b"\n")[1:]]), "not UTF-8"),
    "float64": (PARAMETERS, filled("head.weight", 1e300, np.float64), "head.weight is not all"),
    "NaN": (PARAMETERS, filled("head.bias", np.nan, np.float32), "head.bias is not all"),
    "overflow": (PARAMETERS, filled("head.weight", 3e38, np.float32), "parameters are too large"),
    "dtype": (PARAMETERS, filled("head.bias", 1, np.float16), "head.bias is float16"),
}


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("case", DAMAGE)
def test_invalid_run_directory_gets_one_clear_line(
    case: str, name: str, trained: Path, tmp_path: Path, command: Command
) -> None:
    file, change, problem = DAMAGE[case]
    folder = shutil.copytree(trained, tmp_path / "run", ignore=lambda *_: ["checkpoints"])
    rewrite(folder, file, change((folder / file).read_bytes()))
    for tool, more in ((prediction, ["--json"]), (explanation, [])):
        main = partial(tool.main, TWINS[name].learner)
        assert problem in refused_at_once(command(main, folder, " ".join(TEXTS[:3]), *more))


@pytest.mark.parametrize("metrics", [b"[]", b"3", b'{"accuracy": "high"}', b'{"accuracy": null}'])
def test_a_run_with_unusable_metrics_is_not_finished(
    metrics: bytes, trained: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(trained, tmp_path / "run", ignore=lambda *_: ["checkpoints"])
    options = run_directory.load_run(folder).options
    assert run_directory.finished(folder, "torch", options)
    rewrite(folder, "metrics.json", metrics)
    assert run_directory.finished(folder, "torch", options) is None


def test_repr_of_a_model(model: Model) -> None:
    result = repr(model)
    assert result.startswith("Model(torch gru, hidden_size=4, num_layers=1, classes=('negative', ")
