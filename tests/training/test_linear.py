"""The baseline NB-SVM against scikit-learn; its programs; ensembles."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.svm import LinearSVC

import torch_impl.learner
from common import files, metrics
from common.data import ngrams
from common.data.corpus import EncodedSplit, join
from common.inference import explanation, prediction
from common.linear import model, run, train
from common.training import run_directory
from tests.training.cases import FRAMEWORKS, Command, main_of, refused, succeeds, train_torch

HOW = {"longest": 3, "fewest": 2, "smoothing": 1.0, "c": 0.01}
SMALL = ("--data", "rt", "--train-size", 192, "--test-size", 96)


def spelt(split: EncodedSplit) -> list[str]:
    """The texts with words that scikit-learn does not confuse with n-grams."""
    words = {-1: "unknown"}
    return [
        " ".join(words.get(token, f"w{token}") for token in split[i].tolist())
        for i in range(len(split))
    ]


def counted(split: EncodedSplit, longest: int, fewest: int) -> tuple[list[str], np.ndarray]:
    """The n-grams of CountVectorizer, in its order, and the texts that contain them."""
    counter = CountVectorizer(ngram_range=(1, longest), min_df=fewest, binary=True)
    features = counter.fit_transform(spelt(split)).toarray()
    return counter.get_feature_names_out().tolist(), features


def names_of(codes: list[model.Codes], words: int) -> list[str]:
    """The n-grams of codes, in their order, with words as in `spelt`."""
    result: list[list[str]] = []
    for n, each in enumerate(codes):
        if n == 0:
            result.append([f"w{code}" for code in each])
        else:
            before = result[-1]
            result.append([f"{before[code // words]} w{code % words}" for code in each])
    return [name for names in result for name in names]


@pytest.fixture
def repetitive() -> EncodedSplit:
    """120 texts of 0 to 30 words out of 7, so that many n-grams are in several texts."""
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, 7, rng.integers(0, 31)).astype(np.int32) for _ in range(120)]
    return join(texts, rng.integers(0, 3, 120))


@pytest.mark.parametrize(("longest", "fewest"), [(1, 1), (2, 1), (3, 2), (4, 5)])
def test_ngrams_are_those_of_scikit_learn(
    repetitive: EncodedSplit, longest: int, fewest: int
) -> None:
    codes, features = ngrams.matrix(repetitive, 7, longest=longest, fewest=fewest)
    names, expected = counted(repetitive, longest, fewest)
    result = names_of(codes, 7)
    assert sorted(result) == sorted(names)
    order = [result.index(name) for name in names]
    np.testing.assert_array_equal(features.toarray()[:, order], expected)


def test_known_ngrams_of_other_texts(repetitive: EncodedSplit) -> None:
    """Unknown words (-1) and n-grams are no features, and no n-gram contains an unknown word."""
    first, second = (
        join([repetitive[i] for i in rows], repetitive.labels[rows])
        for rows in (range(60), range(60, 120))
    )
    codes, _ = ngrams.matrix(first, 7, longest=3, fewest=3)
    counter = CountVectorizer(ngram_range=(1, 3), min_df=3, binary=True).fit(spelt(first))
    order = [names_of(codes, 7).index(name) for name in counter.get_feature_names_out()]
    unknown = [np.where(second[i] == 3, -1, second[i]) for i in range(60)]
    for texts in (second, join(unknown, second.labels)):
        _, result = ngrams.matrix(texts, 7, codes)
        expected = counter.transform(spelt(texts)).toarray()
        np.testing.assert_array_equal(result.toarray()[:, order], expected)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_model_is_nb_svm(repetitive: EncodedSplit, classes: int) -> None:
    """The model equals log ratios of smoothed counts and a linear SVM on the weighted features."""
    split = join([repetitive[i] for i in range(120)], repetitive.labels % classes)
    fitted = model.fit(split, 7, [str(i) for i in range(classes)], **HOW)
    _, counts = counted(split, 3, 2)
    margins = []
    for number in range(classes):
        own = split.labels == number
        p, q = (1 + counts[rows].sum(0) for rows in (own, ~own))
        ratio = np.log((p / p.sum()) / (q / q.sum()))
        machine = LinearSVC(C=0.01, random_state=0, tol=1e-8, max_iter=100_000)
        margins.append(machine.fit(counts * ratio, own).decision_function(counts * ratio))
    expected = np.stack(margins, 1)
    if classes == 2:
        expected = np.stack([np.zeros(120), margins[1]], 1)
    np.testing.assert_allclose(fitted.logits(split), expected, atol=2e-5)


def test_from_training_to_prediction(command: Command, tmp_path: Path, drawing: None) -> None:
    arguments = (*SMALL, "--validation-size", 32, "--out", tmp_path)
    output = succeeds(command(train.main, *arguments))
    assert re.search(r"^validation accuracy: \d+\.\d\d%$", output, re.MULTILINE)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["framework"], metrics["model"]) == ("sklearn", "linear")
    assert metrics["data"]["train"] == 160
    assert np.sum(metrics["confusion"]) == 96
    assert f"Accuracy: {metrics['accuracy']:.2%}" in output
    assert (tmp_path / "figures" / "confusion.png").is_file()

    # Its predictions for the test reviews are those of the test.
    options = run.load(tmp_path).options
    texts, _, test, _ = train.load_texts(options, lambda line: None)
    printed = [" ".join(texts.vocabulary[token] for token in test[i]) for i in range(96)]
    output = succeeds(command(prediction.main, tmp_path, *printed))
    labels = [line.partition("\t")[0] for line in output.splitlines()]
    right = np.equal(labels, [texts.classes[label] for label in test.labels])
    assert right.mean() == metrics["accuracy"]

    # The same command finds the finished run; other options are refused.
    assert "finished before" in succeeds(command(train.main, *arguments))
    error = refused(command(train.main, *SMALL, "--c", 0.02, "--out", tmp_path))
    assert "--c was 0.01, is 0.02; --restart replaces it" in error
    # An incomplete run is trained again.
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "SHA256SUMS").unlink()
    (tmp_path / "model.safetensors").write_bytes(whole[:100])
    succeeds(command(train.main, *arguments))
    assert (tmp_path / "model.safetensors").read_bytes() == whole
    succeeds(command(train.main, *SMALL, "--out", tmp_path, "--restart"))


def test_bad_rows_are_left_out_and_reported(command: Command, tmp_path: Path) -> None:
    rows = [f"{kind} film {i},{kind}" for kind in ("good", "bad") for i in range(30)]
    path, out = tmp_path / "table", tmp_path / "out"
    path.write_text("\n".join(["text,label", *rows, "no label,", "a,b,c", ",good"]))
    arguments = ("--data", f"csv:{path}", "--out", out)
    error = refused(command(train.main, *arguments))
    assert error == (f"error: {path}: line 62: no label; --skip-bad-rows leaves such rows out\n")
    for restart in ((), ("--restart",)):  # the second from the cache
        output = succeeds(command(train.main, *arguments, "--skip-bad-rows", *restart))
        counted = "no label (1), another number of columns (1), no text (1)"
        assert f"csv:{path}: 3 bad rows left out (--skip-bad-rows): {counted}\n" in output
    data = json.loads((out / "metrics.json").read_text())["data"]
    assert (data["train"], data["test"], sum(data["left_out"].values())) == (48, 12, 3)
    assert command(train.main, *arguments, "--restart")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--c", "0"], "--c 0.0"),
        (["--ngrams", "0"], "--ngrams 0"),
        (["--smoothing", "-1"], "--smoothing -1.0"),
        (["--smoothing", "1e308"], "--smoothing 1e+308"),
        (["--c", "1e300"], "--c 1e+300"),
        (["--min-reviews", "1000"], "1,000 of 192"),
        (["--validation-size", "192"], "--validation-size 192"),
        (["--data", "imbd"], "imbd"),
        (["--model", "gru"], "--model"),
    ],
)
def test_bad_options_get_one_clear_line(
    arguments: list[str], named: str, command: Command, tmp_path: Path
) -> None:
    assert named in refused(command(train.main, *SMALL, "--out", tmp_path, *arguments))
    assert not (tmp_path / files.SUMS).exists()


def test_a_temperature_changes_the_probabilities_alone(command: Command, tmp_path: Path) -> None:
    options = (*SMALL, "--validation-size", 64)
    folders = tmp_path / "plain", tmp_path / "tempered"
    for folder, more in zip(folders, ((), ("--temperature",)), strict=True):
        succeeds(command(train.main, *options, *more, "--out", folder))
    plain, tempered = (json.loads((each / "metrics.json").read_text()) for each in folders)
    assert plain["temperature"] != tempered["temperature"]
    assert tempered["confusion"] == plain["confusion"]
    before, after = (run.load(folder).model for folder in folders)
    expected = before.weight * (plain["temperature"] / tempered["temperature"])
    np.testing.assert_allclose(after.weight, expected, rtol=1e-6)


def test_class_without_a_text_is_reported() -> None:
    with pytest.raises(ValueError, match="class b: none of 2 texts"):
        model.fit(join([np.array([1])] * 2, np.zeros(2)), 2, ["a", "b"], **HOW)


@pytest.mark.parametrize("name", run.RUN_FILES)
def test_a_damaged_file_is_refused(name: str, command: Command, tmp_path: Path) -> None:
    succeeds(command(train.main, *SMALL, "--out", tmp_path))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-3] + b"???")
    assert str(tmp_path / name) in refused(command(prediction.main, tmp_path, "text"))


def test_invalid_codes_are_rejected(command: Command, tmp_path: Path) -> None:
    succeeds(command(train.main, *SMALL, "--out", tmp_path))
    result = run.load(tmp_path)
    result.model.codes[0][:2] = result.model.codes[0][1::-1]
    about = run.About(result.options, result.classes)
    run.write(tmp_path, about, result.vocabulary, result.model, {})
    error = refused(command(prediction.main, tmp_path, "text"))
    assert "model.safetensors: expected ascending codes" in error
    result.model.codes[0][:2] = result.model.codes[0][1::-1]
    run.write(tmp_path, about, result.vocabulary[:5], result.model, {})
    error = refused(command(prediction.main, tmp_path, "text"))
    assert "more words than vocabulary.txt" in error


def test_an_ensemble_is_the_mean_of_its_runs(
    command: Command, small: list[str], tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("torch", "jax", "linear")]
    for framework, folder in zip(FRAMEWORKS.values(), folders, strict=False):
        succeeds(command(main_of(framework), *small, "--epochs", 1, "--out", folder))
    succeeds(command(train.main, *SMALL, "--out", folders[2]))
    # With another order of the classes, their names decide.
    result = run.load(folders[2])
    result.model.weight[:], result.model.bias[:] = -result.model.weight, -result.model.bias
    about = run.About(result.options, result.classes[::-1])
    run.write(folders[2], about, result.vocabulary, result.model, {})

    predict = main_of(torch_impl.learner, prediction)
    texts = ("a charming and moving film", "flat and dull")
    alone = [command(predict, folder, *texts) for folder in folders]
    assert [error for _, _, error in alone] == ["", "", ""]
    status, output, error = command(predict, *folders, *texts)
    assert (status, error) == (0, "an ensemble of 3 runs: their mean probabilities\n")
    for row, line in enumerate(output.splitlines()):
        label, probability, _ = line.split("\t")
        each = [output.splitlines()[row].split("\t") for _, output, _ in alone]
        means = [float(p) if name == label else 1 - float(p) for name, p, _ in each]
        assert float(probability) == pytest.approx(np.mean(means), abs=2e-4)
        assert float(probability) >= 0.5

    output = succeeds(command(predict, folders[2], "--json", texts[0]))
    assert 1 <= json.loads(output)["known_words"] <= 5
    error = refused(command(predict, folders[2], "--checkpoint", "last"))
    assert f"--checkpoint last: {folders[2]} is linear" in error
    with pytest.raises(TypeError, match="found one str"):
        result.predict("text")

    assert str(tmp_path) in refused(command(predict, folders[0], tmp_path, "text"))
    about = run.About(result.options, ("good", "bad"))
    run.write(folders[2], about, result.vocabulary, result.model, {})
    error = refused(command(predict, *folders, *texts))
    assert f"{folders[2]}: its classes are good, bad" in error


def test_programs_for_grus_reject_a_linear_run(
    command: Command, small: list[str], tmp_path: Path
) -> None:
    linear, gru = tmp_path / "linear", tmp_path / "gru"
    succeeds(command(train.main, *SMALL, "--out", linear))
    succeeds(command(train_torch, *small, "--epochs", 1, "--out", gru))
    refused(command(prediction.main, gru, "text"))
    refused(command(train_torch, *small, "--out", linear))
    with pytest.raises(ValueError, match="holds a linear model"):
        run_directory.load_run(linear)


def test_files_of_texts_are_classified_and_evaluated(command: Command, tmp_path: Path) -> None:
    folder, file = tmp_path / "run", tmp_path / "reviews.csv"
    assert "macro F1" in command(train.main, *SMALL, "--out", folder)[1]
    texts = ["a charming\nand moving film", "dull, tired and boring", "xyzzy"]
    answers = [answer.label for answer in run.load(folder).predict(texts)]

    def predict(content: str, *options: str) -> tuple[int, str, str]:
        file.write_text(content)
        return command(prediction.main, folder, "--data", f"csv:{file}", *options)

    rows = [f'"{text}",{label},valid' for text, label in zip(texts, answers, strict=True)]
    status, output, error = predict("\n".join(["text,label,split", *rows, '"unlabelled",,test']))
    assert status == 0
    labels = [*answers, *(each.label for each in run.load(str(folder)).predict(["unlabelled"]))]
    assert [line.partition("\t")[0] for line in output.splitlines()] == labels
    assert "a charming and moving film" in output.splitlines()[0]
    assert error.startswith("Accuracy: 100.00%\n95 % interval: 43.85% to 100.00%   macro F1: ")
    assert re.search(r"^negative +\d+\.\d\d% +100\.00% .+ [123]$", error, re.MULTILINE)

    # A class without texts does not count in macro F1.
    status, _, error = predict(f"text,label\nfilm,{run.load(folder).predict(['film'])[0].label}\n")
    assert "macro F1: 100.00%" in error
    status, output, error = predict("text\n" + "film\n" * 3)
    assert (status, output.count("\n"), error) == (0, 3, "")
    status, _, error = predict("text,label\nfilm,good\n")
    assert status == 2 and "text 1: its label 'good' is no class of the run (neg" in error
    status, _, error = predict("text\nfilm\n  \n")
    assert status == 2 and f"{file}: line 3: no text; --skip-bad-rows" in error
    assert predict("text\nfilm\n  \n", "--skip-bad-rows")[0] == 0
    status, _, error = predict("text\n  \n", "--skip-bad-rows")
    assert status == 2 and f"--data csv:{file}: contains no text" in error
    status, _, error = command(prediction.main, folder, file)
    assert status == 2 and f"error: {file}: is a file, not a text: --data csv:{file}" in error


@pytest.mark.parametrize("classes", [2, 3])
def test_contributions_add_up_to_the_margin(repetitive: EncodedSplit, classes: int) -> None:
    split = join([repetitive[i] for i in range(120)], repetitive.labels % classes)
    fitted = model.fit(split, 7, [str(i) for i in range(classes)], **HOW)
    for number in range(5):
        text = split[number]
        margins = fitted.contributions(text).sum(axis=0) + fitted.bias
        np.testing.assert_allclose(margins, fitted.logits([text])[0, -len(margins) :], atol=1e-5)


def test_a_linear_run_explains_its_answer(command: Command, tmp_path: Path) -> None:
    folder, path = tmp_path / "run", tmp_path / "answer.json"
    assert command(train.main, *SMALL, "--out", folder)[0] == 0
    explain, text = main_of(torch_impl.learner, explanation), "a moving xyzzy film"
    status, output, error = command(explain, folder, text, "--json", path)
    assert (status, error) == (0, "")
    assert "4 words, 1 of them not in the vocabulary" in output
    result, loaded = json.loads(path.read_text()), run.load(folder)
    assert result["words"] == ["a", "moving", "film"]
    assert result["all_words"] == text.split() and result["places"] == [0, 1, 3]
    assert ["xyzzy"] in [line.split() for line in output.splitlines()]
    (logits,) = loaded.model.logits(join(loaded.encode([text]), np.zeros(1)))
    sign = 1 if result["predicted"] == loaded.classes[1] else -1
    margin = sign * sum(result["contribution"]) + float(loaded.model.bias[0])
    assert margin == pytest.approx(logits[1], abs=1e-5)
    assert "vocabulary=" not in repr(loaded) and "negative" in repr(loaded)
    assert command(explain, folder, text, "--by", "z")[0] == 2


def test_probabilities_are_calibrated(command: Command, tmp_path: Path) -> None:
    size = ("--data", "rt", "--train-size", 3000, "--test-size", 1000)
    assert command(train.main, *size, "--out", tmp_path)[0] == 0
    result, loaded = json.loads((tmp_path / "metrics.json").read_text()), run.load(tmp_path)
    texts, _, test, _ = train.load_texts(loaded.options, lambda line: None)
    margins = loaded.model.logits(test) * result["temperature"]
    before = metrics.evaluate(margins, test.labels, texts.classes)
    assert result["confusion"] == before["confusion"]
    assert 3 * result["calibration_error"] < before["calibration_error"]
