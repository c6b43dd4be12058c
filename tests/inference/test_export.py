"""Exported models: their results, also in other processes, and refused exports."""

import html
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import jax_impl.export
import torch_impl.export
import torch_impl.learner
from benchmarks import export as speed_export
from common.data import corpus, ngrams, sources
from common.data.batches import Batches
from common.data.corpus import join
from common.data.text import clean, specification, tokenize
from common.errors import InputError
from common.inference import export, onnx_graph
from common.inference.model import Model
from common.params import ModelConfig, shapes
from common.training import loop
from common.training.data import load_data
from common.training.learner import predict
from common.training.options import TrainConfig
from common.training.run_directory import Run, load_run
from tests import ROOT
from tests.training.cases import FRAMEWORKS, Command, refused, refused_at_once, succeeds

FORMATS = {"onnx": onnx_graph, "torch": torch_impl.export, "stablehlo": jax_impl.export}
EXAMPLES = ROOT / "docs/examples"
GRU = ModelConfig(input_size=12, hidden_size=16)
BOTH = replace(GRU, bidirectional=True, num_layers=2)
KINDS = {
    "gru": GRU,
    "reset after": replace(GRU, reset_after=True, relu=False),
    "both ways, two layers": replace(BOTH, pooling="last+max+mean"),
    "both ways, two layers, reset after": replace(BOTH, reset_after=True, pooling="mean"),
    "rnn": replace(GRU, cell="rnn", pooling="max", relu=False),
    "rnn, both ways, two layers": replace(BOTH, cell="rnn"),
    "n-grams": replace(GRU, ngrams=3, pooling="last+mean"),
    "n-grams, three classes, trained vectors": replace(
        BOTH, ngrams=2, classes=3, train_vectors=True, reset_after=True
    ),
}
REVIEWS, LONGEST = 1_000, 60
PARTS = {"gru", "reset after"}  # of other kinds
# The exports of the frameworks are slow: two kinds of model reach all of their code by default, and
# test_programs_run_without_this_project a third one, with n-grams. ONNX exports six kinds.
TRACED = {"both ways, two layers", "rnn"}
long = pytest.mark.long


@cache
def reviews() -> corpus.Corpus:
    """Real reviews."""
    return corpus.load("imdb")


@cache
def run_of(kind: str) -> Run:
    """A model with random parameters and the vocabulary of real reviews."""
    rng, texts = np.random.default_rng(0), reviews()
    config = replace(KINDS[kind], vocabulary_size=len(texts.vocabulary))
    parameters = {
        name: rng.uniform(-1, 1, shape).astype(np.float32) / np.float32(config.hidden_size**0.5)
        for name, shape in shapes(config).items()
    }
    vectors = rng.standard_normal((config.vocabulary_size, config.input_size)).astype(np.float32)
    ratios = None
    if config.ngrams:
        few, labels = texts.train.subset(2_000), np.arange(2_000) % config.classes
        split = join([few[i] for i in range(2_000)], labels)
        ratios = ngrams.fit(split, config.vocabulary_size, config.classes, config.ngrams)
        assert ratios.codes[-1][-1] > 2**31 or config.ngrams < 3
    options = TrainConfig(max_length=LONGEST, device="cpu")
    classes = ("negative", "positive", "neither")[: config.classes]
    words = list(texts.vocabulary)
    return Run(config, options, classes, "torch", words, vectors, parameters, ratios)


@cache
def batches_of(kind: str) -> Batches:
    """1,000 real reviews, of which the first is empty and the second has one word."""
    test = reviews().test.subset(REVIEWS)
    texts = [test[i][-LONGEST:] for i in range(REVIEWS)]
    texts[0], texts[1] = texts[0][:0], texts[1][:1]
    run, split = run_of(kind), join(texts, np.zeros(REVIEWS))
    split = run.ratios.attach(split) if run.ratios else split
    return Batches(split, 50, in_order=True, ngrams=run.model.ngrams)


@cache
def logits_of(kind: str, implementation: str = "auto", dtype: str = "float32") -> np.ndarray:
    """The logits of torch_impl."""
    run = run_of(kind)
    model = replace(run.model, implementation=implementation)
    values = {name: value.astype(dtype) for name, value in run.parameters.items()}
    learner = torch_impl.learner.Learner(model, run.options, run.vectors, values, dtype=dtype)
    return predict(learner, batches_of(kind))[0]


@cache
def exported_as(name: str, kind: str) -> export.Call:
    return FORMATS[name].load(FORMATS[name].save(run_of(kind)))


def in_all_shapes(model: export.Call, batches: Batches) -> np.ndarray:
    """The logits of all reviews, in batches of several sizes, with arbitrary padding."""
    texts = [batches.split[i] for i in range(len(batches.split))]
    parts = texts[:1], texts[1:2], texts[2:3], texts[3:]
    result = []
    for number, part in enumerate(parts):
        tokens, lengths = export.padded(part)
        tokens = np.pad(tokens, ((0, 0), (0, number % 3)))
        tokens[np.arange(tokens.shape[1]) >= lengths[:, None]] = (-7, 10**6)[number % 2]
        result.append(model(tokens, lengths))
    return np.concatenate(result)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(k, f, marks=[long] * (k in PARTS or (k not in TRACED and f != "onnx")))
        for k, f in itertools.product(KINDS, FORMATS)
    ],
)
def test_exported_models_compute_what_the_twins_do(kind: str, name: str) -> None:
    """The error is at most twice that of the loop in float32, plus one ULP (docs/parity.md)."""
    exact = logits_of(kind, dtype="float64")
    largest = np.abs(exact).max()
    plain = logits_of(kind, "loop" if KINDS[kind].cell == "gru" else "scan")
    bound = 2 * np.abs(plain - exact).max() / largest + np.finfo(np.float32).eps
    result = in_all_shapes(exported_as(name, kind), batches_of(kind))
    assert result.dtype == np.float32
    assert np.abs(result - exact).max() / largest <= bound


@pytest.mark.parametrize(
    ("tokens", "lengths"),
    [([[1, 10**6]], [2]), ([[-1, 1]], [2]), ([[1, 2]], [3]), ([[1, 2]], [-1])],
)
@pytest.mark.parametrize("name", FORMATS)
def test_exported_model_rejects_values_out_of_range(name: str, tokens: list, lengths: list) -> None:
    """Values out of range have the effects that docs/export.md lists."""
    model = exported_as(name, "gru")
    arguments = np.array(tokens, np.int32), np.array(lengths, np.int32)
    if name == "stablehlo":
        assert np.isnan(model(*arguments)).all()
    elif name == "torch" and lengths != [2]:
        np.testing.assert_array_equal(
            model(*arguments), model(arguments[0], arguments[1].clip(0, 2))
        )
    else:
        with pytest.raises(Exception, match=r"index out|indices element out|sequence_lens"):
            model(*arguments)


def test_a_layer_is_one_node() -> None:
    for kind, config in KINDS.items():
        graph = onnx_graph.classifier(run_of(kind)).graph
        nodes = [node for node in graph.node if node.op_type in ("GRU", "RNN")]
        assert len(nodes) == config.num_layers
        for node in nodes:
            about = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert node.input[4] == "lengths"
            assert about.get("linear_before_reset", 0) == config.reset_after


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    sizes = {"train_size": 600, "test_size": 250, "max_length": 30, "hidden_size": 8, "epochs": 2}
    options = {"model": "bigru", "ngrams": 2, "pooling": "last+max", "vectors": "random:8"}
    loop.train(torch_impl.learner, TrainConfig(data="rt", out=folder, **sizes, **options))
    return folder


def main_of(framework: str) -> Callable[[], None]:
    own = {"torch": "torch", "jax": "stablehlo"}[framework]
    return partial(export.main, FRAMEWORKS[framework], own, FORMATS[own].save, FORMATS[own].load)


@pytest.mark.parametrize(
    ("framework", "name"), [("torch", "onnx"), ("torch", "torch"), ("jax", "stablehlo")]
)
def test_exported_run_gives_the_same_answers(
    framework: str, name: str, trained: Path, tmp_path: Path, command: Command
) -> None:
    """An exported file predicts each test review as the run did in its test."""
    file = tmp_path / "model.bin"
    output = succeeds(command(main_of(framework), trained, "--to", name, "--out", file))
    assert re.fullmatch(
        rf"{tmp_path}/model.json: [\d,]+ bytes\n{file}: {file.stat().st_size:,} bytes\n"
        rf"checked: its logits differ from {framework}_impl's by \de-0[678] of the largest\n",
        output,
    )
    run = load_run(trained)
    batches = load_data(run.options, print).test
    logits = speed_export.logits_of(FORMATS[name].load(file.read_bytes()), batches)
    metrics = json.loads((trained / "metrics.json").read_text())
    assert (logits.argmax(1) == batches.split.labels).mean() == metrics["accuracy"]
    learner = Model(FRAMEWORKS[framework], run, "cpu").predictor
    np.testing.assert_array_equal(logits.argmax(1), predict(learner, batches)[0].argmax(1))
    about = json.loads((tmp_path / "model.json").read_text())
    assert about["format"] == 1 and about["max_length"] == 30
    assert tuple(about["classes"]) == run.classes and about["vocabulary"] == run.vocabulary


def test_int8_is_smaller_and_nearly_as_good(trained: Path) -> None:
    files = [onnx_graph.save(run_of("gru"), int8=int8) for int8 in (False, True)]
    assert len(files[1]) < 0.3 * len(files[0])
    run = load_run(trained)
    batches = load_data(run.options, print).test
    result = [onnx_graph.load(onnx_graph.save(run, int8=int8)) for int8 in (False, True)]
    full, small = (speed_export.logits_of(model, batches) for model in result)
    assert 1e-4 < np.abs(small - full).max() / np.abs(full).max() < 0.1
    assert (small.argmax(1) == full.argmax(1)).mean() > 0.98


def test_bfloat16_is_exported_as_float32(
    trained: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(trained)
    half = replace(run, model=replace(run.model, dtype="bfloat16"))
    monkeypatch.setattr(export, "load_run", lambda folder: half)
    status, output, _ = command(main_of("torch"), trained, "--to", "onnx", "--out", tmp_path / "m")
    assert status == 0 and re.search(r"by \de-0[678] of the largest", output)
    assert (tmp_path / "m").read_bytes() == onnx_graph.save(run)


PAGE = (EXAMPLES.parent / "export.md").read_text()
PROGRAMS = re.findall(r"```python\n(.+?)```", PAGE, re.DOTALL)
LEFT_OUT = {"common", "comparison", "torch_impl", "jax_impl", "flax"}


def output_of(command: list[str], **how: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **how)
    assert done.returncode == 0, done.stderr
    return done.stdout


def alone(program: str, folder: Path) -> np.ndarray:
    """The logits of a program of docs/export.md in another process, without this project."""
    end = "import sys, json; print(json.dumps([logits.tolist(), sorted(sys.modules)]))"
    command = [sys.executable, "-I", "-c", f"{program}\n{end}"]
    logits, modules = json.loads(output_of(command, cwd=folder))
    top = {name.partition(".")[0] for name in modules}
    assert not top & LEFT_OUT and len(top & {"torch", "jax"}) == 1
    return np.array(logits)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(0, id="torch"),
        pytest.param(1, id="AOTInductor", marks=long),
        pytest.param(2, id="jax"),
    ],
)
def test_programs_run_without_this_project(number: int, tmp_path: Path) -> None:
    run = run_of("n-grams, three classes, trained vectors")
    compiles = "aoti_compile" in PROGRAMS[number]
    if compiles and shutil.which("c++") is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    name, module = ("stablehlo", jax_impl.export) if number == 2 else ("pt2", torch_impl.export)
    (tmp_path / f"model.{name}").write_bytes(module.save(run))
    # Precompiled headers take a minute, and only help the next model.
    quick = ', inductor_configs={"aot_inductor.precompile_headers": False})'
    program = PROGRAMS[number].replace('"compiled.pt2")\nmodel', f'"compiled.pt2"{quick}\nmodel')
    assert (program != PROGRAMS[number]) == compiles
    batch = np.array([[17, 4, 99], [5, 0, 0]], np.int32), np.array([3, 1], np.int32)
    expected = onnx_graph.load(onnx_graph.save(run))(*batch)
    np.testing.assert_allclose(alone(program, tmp_path), expected, rtol=0, atol=1e-6)


TRICKY = [
    "Caf&eacute; &amp; bar&nbsp;two &AMP;three &lt;b&gt;four</b> &hellip;five",
    "isn&#39;t &#x27;quoted&#X27; rock'n'roll''s 'em don\u2019t \u2018so\u2019 l&rsquo;amour",
    "&ampere &notit; &copyright &nosuch; & ; &;x &#; &#x; &#xg &amp;amp; &ApplyFunction;f",
    "&#128;uro &#x80; &#0;nul &#1;one on&#1;e &#11;x &#xD800;a &#1114112;b &#99999999999;c",
    f"&#{'9' * 5_000}; long &#{'0' * 5_000}65;a number",
    "<br /><br />a<b>b</b>c</p >d <3 5 < 6 > 2 <not closed",
    "\u03a3\u0391\u03a3 \u038c\u03a3\u039f\u03a3 \u0130stanbul \u01c5 \ufb01n STRASSE stra\u00dfe",
    "na\u00efve cafe\u0301 x\u200dy \u00bd \u00b2 \u2167 \u0663 \u4e2d\u6587\u5b57 \U0001d400 z",
    "under_score __init__ 10/10 R&B A&P",
    "?!",
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run, list[str]]:
    """A model as ONNX, and texts of known words."""
    raw = [example.text for example in sources.load("imdb").examples()][::1000]
    texts = [*TRICKY, *(" ".join(text.split()) for text in raw)]
    words = sorted({word for text in texts for word in tokenize(clean(text))})
    config = replace(GRU, classes=3)
    rng = np.random.default_rng(0)
    values = {name: rng.uniform(-1, 1, shape) for name, shape in shapes(config).items()}
    vectors = rng.standard_normal((len(words), config.input_size))
    options, classes = TrainConfig(max_length=LONGEST), ("bad", "fair", "good")
    run = Run(config, options, classes, "torch", words, vectors, values)
    folder = tmp_path_factory.mktemp("exported")
    (folder / "model.onnx").write_bytes(onnx_graph.save(run))
    (folder / "model.json").write_text(json.dumps(export.description(run)))
    return folder / "model.onnx", run, texts


def check_example(command: list[str], exported: tuple[Path, Run, list[str]]) -> None:
    """The example predicts as `predict` does, for texts as arguments and as lines."""
    file, run, texts = exported
    result = output_of([*command, str(file), *texts])
    assert output_of([*command, str(file)], input="\n".join(texts)) == result
    labels, shares, read = zip(*(line.split("\t") for line in result.splitlines()), strict=True)
    expected = Model(torch_impl.learner, run, "cpu").predict(texts)
    assert read == tuple(texts)
    assert labels == tuple(answer.label for answer in expected)
    probabilities = [answer.probability for answer in expected]
    np.testing.assert_allclose([*map(float, shares)], probabilities, rtol=0, atol=0.51e-4)


def test_the_example_in_python(exported: tuple[Path, Run, list[str]]) -> None:
    check_example([sys.executable, "-I", str(EXAMPLES / "classify.py")], exported)


@pytest.mark.skipif(
    not (shutil.which("node") and "NODE_MODULES" in os.environ),
    reason="needs node, and NODE_MODULES has to name the folder that has onnxruntime-web",
)
def test_the_example_in_javascript(exported: tuple[Path, Run, list[str]], tmp_path: Path) -> None:
    (tmp_path / "node_modules").symlink_to(os.environ["NODE_MODULES"])
    program = shutil.copy(EXAMPLES / "classify.mjs", tmp_path)
    check_example(["node", str(program)], exported)


def test_the_tokenizer_is_specified_whole() -> None:
    result = specification()
    word, reference = re.compile(result["word"]), re.compile(result["reference"])
    every = [chr(place) for place in range(sys.maxunicode + 1)]
    assert word.findall(" ".join(every)) == [c for c in every if c.isalnum()]
    assert word.findall("rock'n'roll ''tis' o'") == ["rock'n'roll", "tis", "o"]
    assert reference.fullmatch("&#xD800;").groups() == (None, "D800", None)
    places = range(sys.maxunicode + 2)
    invalid = {sys.maxunicode + 1, *range(0xD800, 0xE000)}
    itself = {f"#{place}": "\ufffd" if place in invalid else chr(place) for place in places}
    expected = html.unescape("|".join(f"&#{place};" for place in places))
    intended = itself | result["characters"]
    assert "|".join(intended[f"#{place}"] for place in places) == expected


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--to", "tflite"], "--to tflite: expected torch or onnx"),
        (["--to", "stablehlo"], "--to stablehlo: expected torch or onnx"),
        (["--to", "torch", "--int8"], "--int8: goes with --to onnx alone"),
        (["--to", "onnx", "--out", "nowhere/model.onnx"], "nowhere is no folder"),
        (["--to", "onnx", "--out", "."], "--out .: is a folder"),
        (["--to", "onnx", "--out", "m.json"], "--out m.json: is the name of the JSON file"),
        (["--to", "onnx", "--out", "/dev/null/model"], "/dev/null is no folder"),
        (["--out", "model"], "--to"),
        (["--to", "onnx", "runs/none"], "runs/none: no such run directory"),
    ],
)
def test_invalid_export_options_get_one_line(
    arguments: list[str],
    problem: str,
    trained: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = [] if arguments[-1] == "runs/none" else [trained]
    out = [] if "--out" in arguments else ["--out", "model.onnx"]
    assert problem in refused_at_once(command(main_of("torch"), *folder, *arguments, *out))
    assert not [*tmp_path.iterdir()]


def test_a_linear_run_is_refused(tmp_path: Path, command: Command) -> None:
    (tmp_path / "config.json").write_text('{"framework": "sklearn"}')
    arguments = [tmp_path, "--to", "onnx", "--out", tmp_path / "model.onnx"]
    assert "holds a linear model" in refused(command(main_of("jax"), *arguments))


def test_missing_onnx_is_named(
    trained: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.extras.find_spec", lambda name: None)
    arguments = [trained, "--to", "onnx", "--out", tmp_path / "model.onnx"]
    assert 'pip install -e ".[export]"' in refused(command(main_of("torch"), *arguments))


def test_a_model_that_computes_something_else_is_not_written(
    trained: Path, tmp_path: Path, command: Command
) -> None:
    wrong = load_run(trained).parameters | {"head.bias": np.array([0.1, 0], np.float32)}

    def save(run: Run) -> bytes:
        return onnx_graph.save(replace(run, parameters=wrong))

    main = partial(export.main, torch_impl.learner, "torch", save, onnx_graph.load)
    error = refused_at_once(command(main, trained, "--to", "torch", "--out", tmp_path / "model"))
    assert "model: not written, for its logits differ" in error
    assert not [*tmp_path.iterdir()]


def test_a_model_that_onnx_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graph, "_LARGEST", 10**6)
    with pytest.raises(InputError, match="at most 2 GiB"):
        onnx_graph.save(run_of("gru"))
