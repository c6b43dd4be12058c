"""Log-count ratios of n-grams: their values, their positions, and that they leak no label."""

import dataclasses
import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save
from scipy.special import softmax

import jax_impl.classifier
import jax_impl.learner
import torch_impl.classifier
import torch_impl.learner
from common import convert, oracle, params
from common.data import corpus, ngrams
from common.data.batches import Batch, Batches
from common.data.corpus import EncodedSplit, join
from common.errors import InputError
from common.inference import prediction
from common.inference.model import Model
from common.training import loop
from common.training.options import TrainConfig
from common.training.run_directory import load_run
from tests.training.cases import (
    FRAMEWORKS,
    Command,
    each_framework,
    main_of,
    refused,
    rewrite,
    succeeds,
    train_torch,
)

V = 7
predict = main_of(torch_impl.learner, prediction)


@pytest.fixture
def split() -> EncodedSplit:
    """90 texts of 0 to 20 words out of V, so that many n-grams are in several texts."""
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, V, rng.integers(0, 21)).astype(np.int32) for _ in range(90)]
    return join(texts, rng.integers(0, 3, 90))


def of_classes(split: EncodedSplit, classes: int) -> EncodedSplit:
    return dataclasses.replace(split, labels=split.labels % classes)


@pytest.mark.parametrize("classes", [2, 3])
def test_ratios_are_those_of_counting_by_hand(split: EncodedSplit, classes: int) -> None:
    split, longest = of_classes(split, classes), 3
    having: dict[tuple, set[int]] = defaultdict(set)
    for number in range(len(split)):
        words = split[number].tolist()
        for n in range(1, longest + 1):
            for start in range(len(words) - n + 1):
                having[tuple(words[start : start + n])].add(number)
    having = {gram: texts for gram, texts in having.items() if len(texts) >= 2}
    expected = {gram: [] for gram in having}
    for label in [1] if classes == 2 else range(classes):
        own = {gram: 1 + sum(split.labels[i] == label for i in t) for gram, t in having.items()}
        rest = {gram: 1 + sum(split.labels[i] != label for i in t) for gram, t in having.items()}
        totals = sum(own.values()), sum(rest.values())
        for gram in having:
            ratio = np.log(own[gram] / totals[0]) - np.log(rest[gram] / totals[1])
            expected[gram].append(0.3 * ratio)
    result = ngrams.fit(split, V, classes, longest).read(split)
    nothing, row = [0.0] * (1 if classes == 2 else classes), 0
    for number in range(len(split)):
        words = split[number].tolist()
        for end in range(1, len(words) + 1):
            grams = [tuple(words[end - n : end]) if n <= end else () for n in (1, 2, 3)]
            wanted_result = [number for gram in grams for number in expected.get(gram, nothing)]
            np.testing.assert_allclose(result[row], wanted_result, atol=1e-6)
            row += 1
    assert row == len(result)


def test_text_does_not_influence_its_own_ratios(split: EncodedSplit) -> None:
    """Another label changes the ratios of other texts, not those of the text itself."""
    split = of_classes(split, 2)
    before = ngrams.read_out_of_fold(split, V, 2, 3)
    of_text = np.repeat(np.arange(len(split)), split.lengths)
    changed = 0
    for number in range(0, len(split), 7):
        labels = split.labels.copy()
        labels[number] = 1 - labels[number]
        other = dataclasses.replace(split, labels=labels)
        after = ngrams.read_out_of_fold(other, V, 2, 3)
        np.testing.assert_array_equal(after[of_text == number], before[of_text == number])
        changed += np.any(after != before)
        assert split.lengths[number] == 0 or np.any(
            ngrams.fit(other, V, 2, 3).read(other)[of_text == number]
            != ngrams.fit(split, V, 2, 3).read(split)[of_text == number]
        )
    assert changed > 10


def test_batch_has_the_ratios_of_its_words(split: EncodedSplit) -> None:
    """N-grams that begin before the first word of the batch are not read, nor is padding."""
    read = ngrams.fit(of_classes(split, 2), V, 2, 3).attach(of_classes(split, 2))
    whole, cut = (
        Batches(read, 8, max_length=limit, in_order=True, ngrams=3) for limit in (None, 5)
    )
    for batches in (whole, cut):
        for batch in batches.epoch():
            assert batch.ratios is not None and batch.ratios.shape == (*batch.tokens.shape, 3)
            for column, (review, n) in enumerate(zip(batch.reviews, batch.lengths, strict=True)):
                end = read.starts[review] + read.lengths[review]
                expected = read.ratios[end - n : end].copy() if n else np.zeros((0, 3))
                expected[:1, 1], expected[:2, 2] = 0, 0
                np.testing.assert_array_equal(batch.ratios[:n, column], expected)
                assert not batch.ratios[n:, column].any()


def batches_of(steps: int) -> list[Batch]:
    """Batches of real reviews, with ratios out of fold."""
    few = corpus.load("imdb").train.subset(256)
    split = join([few[i] for i in range(256)], few.labels)
    read = ngrams.read_out_of_fold(split, few.vocabulary_size, 2, 2)
    batches = Batches(dataclasses.replace(split, ratios=read), 8, max_length=20, ngrams=2)
    return list(islice(chain.from_iterable(map(batches.epoch, range(99))), steps))


@pytest.mark.parametrize(
    ("model", "train_vectors"),
    [("gru", True), ("rnn", False), pytest.param("bigru", False, marks=pytest.mark.long)],
)
def test_both_twins_take_the_same_steps(model: str, train_vectors: bool) -> None:
    """30 steps agree in float64, and the first logits are those of the oracle."""
    words = len(corpus.load("imdb").vocabulary)
    vectors = np.random.default_rng(0).standard_normal((words, 8))
    training = TrainConfig(device="cpu", hidden_size=12, model=model, ngrams=2, word_dropout=0.2)
    config = training.model_config(vectors.shape, 2, train_vectors)
    values = params.init(config, 1, vectors)
    batches = batches_of(30)
    with jax.enable_x64(True):
        in_torch, in_jax = (
            twin.Learner(config, training, vectors, values, "float64")
            for twin in FRAMEWORKS.values()
        )
        first = batches[0]
        x = np.concatenate([vectors[first.distinct][first.tokens], first.ratios], -1)
        if model != "rnn":
            result = oracle.forward(values, x, first.lengths, reset_after=False)
            expected = oracle.classify(result, first.labels).logits
            for learner in (in_torch, in_jax):
                np.testing.assert_allclose(learner.logits(first), expected, atol=1e-12)
        for batch in batches:
            losses = float(in_torch.step(batch)), float(in_jax.step(batch))
            assert losses[0] == pytest.approx(losses[1], abs=1e-9)
        for name, value in in_torch.parameters().items():
            np.testing.assert_allclose(value, in_jax.parameters()[name], atol=1e-9)


@pytest.mark.parametrize("train_vectors", [False, True])
def test_nn_gru_reads_the_ratios(train_vectors: bool) -> None:
    words = len(corpus.load("imdb").vocabulary)
    vectors = np.random.default_rng(0).standard_normal((words, 8))
    result = []
    for model in ("bigru", "nn.bigru"):
        training = TrainConfig(device="cpu", hidden_size=12, model=model, ngrams=2)
        training = dataclasses.replace(training, reset_after=True)
        config = training.model_config(vectors.shape, 2, train_vectors)
        values = params.init(config, 1, vectors)
        learner = torch_impl.learner.Learner(config, training, vectors, values, "float64")
        result.append([float(learner.step(batch)) for batch in batches_of(5)])
    assert result[0] == pytest.approx(result[1], rel=1e-9)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    sizes = {"train_size": 192, "test_size": 96, "max_length": 12, "hidden_size": 8, "epochs": 1}
    options = TrainConfig(data="rt", ngrams=3, vectors="random:6", out=folder, **sizes)
    loop.train(torch_impl.learner, options)
    return folder


def test_from_training_to_prediction(trained: Path, command: Command) -> None:
    """Test reviews, as texts, get the answers that they had in the test; in both frameworks."""
    run = load_run(trained)
    metrics = json.loads((trained / "metrics.json").read_text())
    data = corpus.load("rt")
    test = data.test.subset(96)
    texts = tuple(" ".join(data.vocabulary[token] for token in test[i]) for i in range(96))
    models = [Model(twin, run) for twin in FRAMEWORKS.values()]
    result = [softmax(model.logits(texts), axis=1) for model in models]
    np.testing.assert_allclose(result[0], result[1], atol=1e-5)
    right = (result[0].argmax(1) == test.labels).mean()
    assert right == pytest.approx(metrics["accuracy"])
    for model, probabilities in zip(models, result, strict=True):
        for text in (0, 3):
            answer = model.explain(texts[text])
            assert answer["probability"] == pytest.approx(probabilities[text].max(), abs=1e-5)
    output = succeeds(command(predict, trained, texts[0]))
    assert output.split("\t")[0] == run.classes[result[0][0].argmax()]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda t: t.update({"codes.2": t["codes.2"][::-1].copy()}), "expected ascending codes"),
        (lambda t: t.update({"ratios.2": t["ratios.2"][1:]}), "expected ratios for each code"),
        (lambda t: t.update({"codes.1": t["codes.1"] + 10**6}), "codes of more words than vocab"),
        (lambda t: t.pop("ratios.3"), "the tensor ratios.3 is missing"),
        (lambda t: t["ratios.1"].__setitem__(0, np.nan), "ratios.1 is not all finite"),
    ],
)
def test_damaged_ratios_are_refused(
    trained: Path, damage: Callable, problem: str, tmp_path: Path, command: Command
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    tensors = load_file(run / "vectors.safetensors")
    damage(tensors)
    rewrite(run, "vectors.safetensors", save(tensors))
    error = refused(command(predict, run, "text"))
    assert problem in error and "vectors.safetensors" in error


@pytest.mark.parametrize("number", [-1, 11])
def test_invalid_ngram_length_is_rejected(number: int, command: Command, tmp_path: Path) -> None:
    error = refused(command(train_torch, "--ngrams", number, "--out", tmp_path / "run"))
    assert f"--ngrams {number}" in error


def test_a_model_is_converted_there_and_back(trained: Path, tmp_path: Path) -> None:
    """Its word vectors have fewer dimensions than its first layer reads."""
    tensors = load_file(trained / "model.safetensors")
    for name in ("keras", "homework"):
        there = convert.convert(tensors, "canonical", name, reset_after=False, ngrams=3)
        back = convert.convert(there, name, "canonical", reset_after=False, ngrams=3)
        assert back.keys() == tensors.keys()
        for key, value in tensors.items():
            if "bias" not in key:  # of two, keras has one
                np.testing.assert_array_equal(back[key], value)
    with pytest.raises(InputError, match="weight_ih has shape"):
        convert.convert(tensors, "canonical", "keras", reset_after=False)


@each_framework
def test_ratios_that_do_not_fit_are_refused(name: str) -> None:
    config = TrainConfig(hidden_size=4, ngrams=2).model_config((9, 3), 2, False)
    module = {"torch": torch_impl.classifier, "jax": jax_impl.classifier}[name]
    array = {"torch": torch.from_numpy, "jax": np.asarray}[name]
    vectors = np.zeros((9, 3))
    parameters = {n: array(v) for n, v in params.init(config, 0, vectors).items()}
    tokens, lengths = np.zeros((5, 2), np.int32), np.array([5, 2], np.int32)
    batch = [array(each) for each in (vectors, np.arange(9, dtype=np.int32), tokens, lengths)]
    with jax.enable_x64(True):
        assert module.classify(parameters, *batch, {}, array(np.zeros((5, 2, 2)))).shape == (2, 2)
        for ratios, kind, problem in (
            (array(np.zeros((4, 2, 2))), ValueError, "ratios: expected shape"),
            (array(np.zeros((5, 2, 3))), ValueError, "vectors: expected shape"),
            (array(np.zeros((5, 2, 2), np.float32)), TypeError, "ratios: expected"),
            # JAX takes a list for an array, as it does elsewhere.
            ([[0.0]], TypeError if name == "torch" else ValueError, "ratios: expected"),
        ):
            with pytest.raises(kind, match=problem):
                module.classify(parameters, *batch, {}, ratios)
