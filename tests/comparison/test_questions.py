"""The statistics behind the three questions against known values, and the command."""

import json
from math import comb
from pathlib import Path

import numpy as np
import pytest

import compare
import torch_impl.learner
from common import params
from common.data.batches import Batches
from common.data.corpus import EncodedSplit, join
from common.params import ModelConfig
from common.training.options import TrainConfig
from comparison import questions, runs
from tests.training.cases import Command, succeeds


def answers(only_a: int, only_b: int, both: int) -> tuple[np.ndarray, np.ndarray]:
    """The reviews that two models classify correctly, as masks, from their numbers."""
    a = np.repeat([True, False, True], [only_a, only_b, both])
    return a, np.repeat([False, True, True], [only_a, only_b, both])


@pytest.mark.parametrize(("only_a", "only_b"), [(5, 15), (15, 5), (59, 121), (8, 8), (0, 6)])
def test_mcnemar_is_the_binomial_tail(only_a: int, only_b: int) -> None:
    n, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(comb(n, k) for k in range(fewer + 1)) / 2**n
    assert questions.mcnemar(*answers(only_a, only_b, 50)) == pytest.approx(min(1, 2 * tail))


def test_mcnemar_of_equal_answers_is_1() -> None:
    assert questions.mcnemar(*answers(0, 0, 9)) == 1
    assert questions.paired_p(np.zeros((3, 9))) == 1


@pytest.mark.parametrize(("only_a", "only_b"), [(3, 9), (0, 8), (6, 6)])
def test_with_one_seed_the_paired_test_is_mcnemars(only_a: int, only_b: int) -> None:
    a, b = answers(only_a, only_b, 30)
    difference = (b.astype(float) - a)[None]
    assert questions.paired_p(difference) == pytest.approx(questions.mcnemar(a, b), rel=1e-9)


def test_sampled_sign_flips_approximate_mcnemar() -> None:
    """9,999 flips: p within four standard errors of a share of 0.04."""
    a, b = answers(5, 15, 80)
    result = questions.paired_p((b.astype(float) - a)[None])
    assert result == pytest.approx(questions.mcnemar(a, b), abs=4 * np.sqrt(0.04 / 9_999))


def test_the_same_review_in_five_seeds_counts_once() -> None:
    """Five seeds that answer alike tell no more about the reviews than one does."""
    a, b = answers(3, 9, 30)
    once = (b.astype(float) - a)[None]
    five = np.repeat(once, 5, axis=0)
    assert questions.paired_p(five) == pytest.approx(questions.paired_p(once))
    # Adding the counts of the five seeds would give a far smaller p.
    assert questions.mcnemar(np.tile(a, 5), np.tile(b, 5)) < 0.01 < questions.paired_p(five)
    assert questions.paired_interval(five) == pytest.approx(questions.paired_interval(once))


def test_interval_matches_normal_approximation() -> None:
    rng = np.random.default_rng(1)
    difference = rng.choice([-1.0, 0, 1], (1, 2_000), p=[0.1, 0.75, 0.15])
    half = 1.96 * difference.std() / np.sqrt(2_000)
    low, high = questions.paired_interval(difference)
    assert [low, high] == pytest.approx(
        [difference.mean() - half, difference.mean() + half], abs=0.1 * half
    )


def test_the_interval_covers_new_seeds_and_new_reviews() -> None:
    """Of 1,000 experiments with five seeds, in which seeds differ, 95 % cover the truth.

    Within three standard errors (0.7 points each); an interval over the reviews alone covers far
    less.
    """
    rng = np.random.default_rng(2)
    covered = alone = 0
    for _ in range(1_000):
        seed, review = rng.normal(0, 0.05, (5, 1)), rng.normal(0, 0.2, (1, 200))
        difference = 0.03 + seed + review + rng.normal(0, 0.3, (5, 200))
        low, high = questions.paired_interval(difference)
        covered += low <= 0.03 <= high
        low, high = questions.paired_interval(difference.mean(axis=0, keepdims=True))
        alone += low <= 0.03 <= high
    assert covered == pytest.approx(950, abs=21)
    assert alone < 800


def test_the_interval_of_an_effect_covers_new_seeds_and_new_reviews(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As above, for means by group. The bootstrap estimates the variance between reviews."""
    monkeypatch.setattr(questions, "BOOTSTRAPS", 200)
    rng = np.random.default_rng(3)
    review, group = np.repeat(np.arange(60), 5), np.zeros(300, int)
    covered = 0
    for _ in range(300):
        noise = rng.normal(0, 0.3, (1, 60)) + rng.normal(0, 0.3, (5, 60))
        values = 1 + rng.normal(0, 0.05, (5, 1)) + np.repeat(noise, 5, axis=1)
        sums = questions.resample(values, group, review, 60)
        _, (low, high) = questions.estimate(questions.mean(sums, 0), 60)
        covered += low <= 1 <= high
    assert covered / 300 == pytest.approx(0.95, abs=3 * np.sqrt(0.95 * 0.05 / 300))


def test_cohens_d_and_means_by_hand() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(5, 2, 300), rng.normal(4, 2, 200)
    values = np.concatenate([a, b])
    group = np.repeat([2, 0], [300, 200])
    sums = questions.resample(values[None], group, np.arange(500), 500)
    pooled = np.sqrt((299 * a.var(ddof=1) + 199 * b.var(ddof=1)) / 498)
    d, (low, high) = questions.estimate(questions.cohens_d(sums, 2, 0), 500)
    assert d == pytest.approx((a.mean() - b.mean()) / pooled, rel=1e-9)
    # Standard error of d for independent values (Hedges and Olkin 1985).
    half = 1.96 * np.sqrt(500 / (300 * 200) + d**2 / 1_000)
    assert [low, high] == pytest.approx([d - half, d + half], abs=0.15 * half)
    mean, (low, high) = questions.estimate(questions.mean(sums, 0), 500)
    half = 1.96 * b.std() / np.sqrt(200)
    assert [mean, low, high] == pytest.approx(
        [b.mean(), b.mean() - half, b.mean() + half], abs=0.04
    )


def test_words_of_one_review_do_not_count_as_independent() -> None:
    """Repeating every word ten times adds no information: the intervals keep their width."""
    rng = np.random.default_rng(0)
    values, group = rng.normal(0, 1, 400), rng.integers(0, 2, 400)
    review = np.repeat(np.arange(40), 10)
    once = questions.resample(values[None], group, review, 40)
    tenfold = questions.resample(
        np.repeat(values, 10)[None], np.repeat(group, 10), np.repeat(review, 10), 40
    )
    for statistic in (
        lambda sums: questions.mean(sums, 0),
        lambda sums: questions.cohens_d(sums, 1, 0),
    ):
        _, wide = questions.estimate(statistic(tenfold), 40)
        assert wide == pytest.approx(questions.estimate(statistic(once), 40)[1], rel=0.02)


def test_interval_includes_zero_if_the_sign_depends_on_the_seed() -> None:
    """Five models, of which two have a clear effect one way and three the other."""
    rng = np.random.default_rng(0)
    group = np.tile([0, 1], 500)
    signs = np.array([1, 1, -1, -1, -1])[:, None]
    values = signs * group + rng.normal(0, 1, (5, 1_000))
    sums = questions.resample(values, group, np.arange(1_000), 1_000)
    by_model = questions.cohens_d(sums, 1, 0)
    assert by_model[:, 0] == pytest.approx(signs[:, 0], abs=0.2)
    d, (low, high) = questions.estimate(by_model, 1_000)
    assert d == pytest.approx(by_model[:, 0].mean())
    assert low < 0 < high
    alike = np.concatenate([by_model[:2], -by_model[2:]])  # the same models, all one way
    assert questions.estimate(alike, 1_000)[1][0] > 0.8


def test_word_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "FEWEST_REVIEWS", 8)
    words = ["the", "superb", "chair", "rare", "some", "hmm"]
    of = {word: number for number, word in enumerate(words)}
    texts, labels = [], []
    for label in (0, 1):
        for number in range(20):
            text = ["the", "chair", "chair"]
            text += ["superb"] * (10 if label and number < 9 else 0)
            text += ["rare"] if label and number < 7 else []
            text += (
                ["hmm"] if number < (10 if label else 7) else []
            )  # odds of 10 to 7: neither sentiment nor neutral
            texts.append(np.array([of[word] for word in text], np.int32))
            labels.append(label)
    groups = questions.word_groups(join(texts, np.array(labels)), words)
    result = {
        word: questions.GROUPS[group]
        for word, group in zip(words, groups, strict=True)
        if group >= 0
    }
    assert result == {
        "the": "stop words",
        "some": "stop words",
        "chair": "neutral words",
        "superb": "sentiment words",
    }


def test_gradient_norms_halve_at_every_word(texts: EncodedSplit) -> None:
    """An RNN in the straight part of tanh, with U = I/2: dLoss/dh_t is half of dLoss/dh_(t+1)."""
    config = ModelConfig(input_size=3, hidden_size=4, cell="rnn")
    parameters = {name: np.zeros(shape) for name, shape in params.shapes(config).items()}
    parameters["rnn.0.forward.weight_hh"] = np.eye(4) / 2
    parameters["rnn.0.forward.bias_ih"] += 1e-9  # away from the kink of ReLU
    parameters["head.weight"] = np.array([[1.0] * 4, [-1.0] * 4])
    learner = torch_impl.learner.Learner(
        config, TrainConfig(device="cpu"), np.ones((500, 3)), parameters, dtype="float64"
    )
    rows = np.flatnonzero(texts.lengths >= 20)[:4]
    norms = questions.gradient_norms(learner, Batches(texts, 4).batch(rows), 20)
    # Two equal logits: each loses half of its gradient, -1/2 and 1/2, through weights 1 and -1.
    np.testing.assert_allclose(norms, np.tile(2 * 0.5 ** np.arange(20), (4, 1)), rtol=1e-6)


def test_gate_statistics_match_closed_form(texts: EncodedSplit) -> None:
    """With weights of zero, h_t = n (1 - (1 - z)^t): z and the relative change are known."""
    config = ModelConfig(input_size=3, hidden_size=4)
    parameters = {name: np.zeros(shape) for name, shape in params.shapes(config).items()}
    parameters["gru.0.forward.bias_ih"] = np.repeat([-1.0, 0.0, 0.7], 4)
    learner = torch_impl.learner.Learner(
        config, TrainConfig(device="cpu"), np.ones((500, 3)), parameters, dtype="float64"
    )
    z = 1 / (1 + np.exp(1.0))
    groups = np.where(np.arange(500) < 200, 1, -1)
    batches = Batches(texts, 32, max_length=40, in_order=True)
    result = questions.read_words(learner, batches, groups)
    expected = []
    for number in range(len(texts)):
        for step, token in enumerate(texts[number][-40:]):
            if step and token < 200:
                before = 1 - (1 - z) ** step
                expected.append((number, z, z * (1 - before) / before))
    order = np.lexsort((-result["change"], result["review"]))
    actual = np.stack([result[name][order] for name in ("review", "z", "change")], axis=1)
    np.testing.assert_allclose(actual, np.array(expected), rtol=1e-9)
    assert np.all(result["group"] == 1)


def test_differences_are_reported_by_category_name() -> None:
    labels = np.zeros(7, np.int32)
    test = EncodedSplit(
        np.zeros(7, np.int32),
        np.arange(7, dtype=np.int64),
        np.ones(7, np.int32),
        labels,
        vocabulary_size=1,
        categories=np.array(
            [0, 0, 0, 1, 1, 1, 3], np.int32
        ),  # a category with one review is omitted
    )
    right, wrong = np.ones((2, 7), bool), np.zeros((2, 7), bool)
    wrong[:, 3:] = True  # b is better on books, and as good on films
    correct, seconds = {"a": wrong, "b": right}, {"a": 1.0, "b": 1.0}
    result = questions.compare(
        "x", "a", "b", correct, seconds, test, ("books", "films", "none", "one")
    )
    by_category = {part.name: part.difference for part in result.by_category}
    assert by_category == {"books": 1.0, "films": 0.0}


@pytest.mark.parametrize(
    ("seeds", "says"),
    [(4, "Too few seeds to compare b and a (4, "), (5, "With 5 seeds, b is better than a: +50")],
)
def test_fewer_than_five_seeds_are_too_few_to_tell(seeds: int, says: str) -> None:
    a, b = (np.tile(answer, (seeds, 1)) for answer in answers(0, 60, 60))
    test = join([np.arange(3)] * 120, np.zeros(120))
    result = questions.compare("x", "a", "b", {"a": a, "b": b}, {"a": 1.0, "b": 1.0}, test)
    assert result.interval[0] > 0.3
    assert result.conclusion.startswith(says)


@pytest.mark.usefixtures("in_this_process")
def test_compare_answers_the_questions_and_trains_only_once(
    small: list[str], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["questions", *small, "--frameworks", "torch", "--models", "gru", "--seeds", 1]
    arguments += ["--epochs", 1, "--out", tmp_path]
    output = succeeds(command(compare.main, *arguments))
    result = json.loads((tmp_path / "results.json").read_text())["questions"]
    (pair,) = result["comparisons"]
    assert (pair["a"], pair["b"], pair["seeds"]) == ("torch rnn", "torch gru", 1)
    accuracies = [
        json.loads((tmp_path / f"questions/seed-0/torch-{model}/metrics.json").read_text())[
            "accuracy"
        ]
        for model in ("rnn", "gru")
    ]
    assert [pair["accuracy_a"], pair["accuracy_b"]] == pytest.approx(accuracies)
    assert pair["difference"] == pytest.approx(accuracies[1] - accuracies[0])
    assert pair["interval"][0] <= pair["difference"] <= pair["interval"][1]
    assert pair["mcnemar_p_by_seed"][0] == pytest.approx(pair["mcnemar_p"], abs=0.02)
    assert sum(part["n"] for part in pair["by_length"]) == 96
    names = [series["name"] for series in result["vanishing"]["series"]]
    assert len(set(names)) == 4
    for series in result["vanishing"]["series"]:
        reach = len(result["vanishing"]["distances"])
        assert [len(series[name]) for name in ("low", "median", "high")] == [reach] * 3
        assert series["median"][0] > series["median"][-1] > 0
    assert {group["group"] for group in result["gates"]["groups"]} <= set(questions.GROUPS)
    for answer in (pair, result["vanishing"], result["gates"]):
        assert answer["conclusion"] in output

    monkeypatch.setattr(runs, "to_arguments", lambda *_: pytest.fail("trained again"))
    succeeds(command(compare.main, *arguments))
    again = json.loads((tmp_path / "results.json").read_text())["questions"]
    assert again == result


def test_no_seeds_get_one_clear_line(command: Command) -> None:
    status, _, error = command(compare.main, "questions", "--seeds", "0")
    assert (status, error) == (2, "error: --seeds 0: expected `int` >= 1\n")
