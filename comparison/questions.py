"""The homework's three questions, measured: python compare.py questions.

Does gating keep gradients from vanishing, and what do the gates do at an irrelevant word? Does it
matter to read both ways? How does the handwritten GRU compare with the built-in one? What was found
and how to read it: docs/questions.md.
"""

import dataclasses
import itertools
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

import jax_impl.learner
import torch_impl.learner
from common import params
from common.data.batches import Batch, Batches
from common.data.corpus import EncodedSplit
from common.inference.prediction import load_learner
from common.report.schema import (
    Effect,
    Gates,
    Group,
    Interval,
    OfCategory,
    OfLength,
    Pair,
    Questions,
    Run,
    Series,
    Vanishing,
)
from common.training import run_directory
from common.training.data import Data, load_data
from common.training.learner import Framework, Learner, predict
from common.training.options import TrainConfig
from comparison import runs

FRAMEWORKS: dict[str, Framework] = {"torch": torch_impl.learner, "jax": jax_impl.learner}
PAIRS = (
    ("Gates or none", "torch rnn", "torch gru"),
    ("Bidirectional or not", "torch gru", "torch bigru"),
    ("Bidirectional or not, built-in", "torch nn.gru", "torch nn.bigru"),
    ("Bidirectional or not, in JAX", "jax gru", "jax bigru"),
    ("Handwritten or built-in", "torch gru", "torch nn.gru"),
    ("Handwritten or built-in, bidirectional", "torch bigru", "torch nn.bigru"),
    ("PyTorch or JAX", "torch gru", "jax gru"),
)
FLIPS, BOOTSTRAPS = 9_999, 2_000
GRADIENT_REVIEWS = 200
GATE_REVIEWS = 400
LENGTH_GROUPS = 5
# Word groups: a word counts from so many training reviews on; it is a sentiment word where the odds
# of a class are at least twice as high among the reviews that have it, neutral where they are less
# than a tenth higher or lower.
FEWEST_REVIEWS = 50
SENTIMENT, NEUTRAL = float(np.log(2)), float(np.log(1.1))
GROUPS = ("stop words", "neutral words", "sentiment words")
QUANTITIES = ("z", "change")

Report = Callable[[str], None]


def measure(
    options: TrainConfig, names: Sequence[str], seeds: int, at_once: int, report: Report
) -> Questions:
    """Train every model (names: "torch gru", …) with so many seeds, and answer the questions.

    at_once: so many are trained at a time, each on cores of its own.

    Run directories are OUT/questions/seed-N/FRAMEWORK-MODEL; what is there, trained with the same
    options, is not trained again.
    """
    trained = train(options, names, seeds, at_once, report)
    folders = {name: [Path(run.run_dir) for run in found] for name, found in trained.items()}
    data = load_data(options, report)
    report("asking every model about the test reviews")
    correct, seconds = {}, {}
    for name, of_seeds in folders.items():
        framework = FRAMEWORKS[name.split()[0]]
        correct[name] = np.array([answers(framework, folder, data) for folder in of_seeds])
        seconds[name] = float(np.median([run.train_seconds for run in trained[name]]))
    found = Questions(
        comparisons=[
            compare(title, a, b, correct, seconds, data.test.split, data.categories)
            for title, a, b in PAIRS
            if a in correct and b in correct
        ],
        commands=[shlex.join(["python", *sys.argv])],
    )
    if "torch gru" in folders and "torch rnn" in folders:
        report("following gradients back through the reviews")
        first = {"tanh RNN": folders["torch rnn"][0], "GRU": folders["torch gru"][0]}
        found.vanishing = vanishing({n: run_directory.load_run(f) for n, f in first.items()}, data)
        report("looking at the gates, word by word")
        found.gates = gates([run_directory.load_run(f) for f in folders["torch gru"]], data)
    return found


def train(
    options: TrainConfig, names: Sequence[str], seeds: int, at_once: int, report: Report
) -> dict[str, list[Run]]:
    """Train what is not there yet; returns the runs of each model, a seed each."""
    assert options.out is not None
    trainings: list[runs.Training] = []
    for seed in range(options.seed, options.seed + seeds):
        for name in names:
            framework, model = name.split()
            folder = options.out / "questions" / f"seed-{seed}" / f"{framework}-{model}"
            wanted = dataclasses.replace(options, model=model, seed=seed, out=folder)
            trainings.append(runs.Training(framework, wanted, f"seed {seed}, {name}"))

    def done(name: str, run: Run | None) -> None:
        assert run is not None
        report(f"{name}: {run.accuracy:.2%} after {run.train_seconds:.0f} s")

    found = runs.train(trainings, at_once, lambda name, line: None, done)
    return {name: [run for run in found if run.name == name] for name in names}


def answers(framework: Framework, folder: Path, data: Data) -> Bool[np.ndarray, " N"]:
    """Which test reviews a trained model classifies correctly."""
    run = run_directory.load_run(folder)
    learner = framework.Learner(run.model, run.options, run.vectors, run.parameters)
    logits, labels = predict(learner, data.test)
    return logits.argmax(axis=1) == labels


# Two models on the same reviews.


def compare(
    title: str,
    a: str,
    b: str,
    correct: Mapping[str, Bool[np.ndarray, "seeds N"]],
    seconds: Mapping[str, float],
    test: EncodedSplit,
    categories: Sequence[str] = (),
) -> Pair:
    """b against a, paired by seed and by review."""
    difference = correct[b].astype(float) - correct[a]
    found = Pair(
        title=title,
        a=a,
        b=b,
        seeds=len(difference),
        accuracy_a=float(correct[a].mean()),
        accuracy_b=float(correct[b].mean()),
        difference=float(difference.mean()),
        interval=paired_interval(difference),
        difference_by_seed=difference.mean(axis=1).tolist(),
        mcnemar_p=paired_p(difference),
        mcnemar_p_by_seed=list(map(mcnemar, correct[a], correct[b])),
        by_length=[],
        seconds_a=seconds[a],
        seconds_b=seconds[b],
        conclusion="",
    )
    # Groups of about the same size, by the words that have a vector (before the cut).
    edges = np.unique(np.quantile(test.lengths, np.linspace(0, 1, LENGTH_GROUPS + 1)).astype(int))
    edges[-1] += 1
    for start, stop in itertools.pairwise(edges.tolist()):
        group = (test.lengths >= start) & (test.lengths < stop)
        if group.sum() > 1:
            found.by_length.append(OfLength(*_part(difference, group), start, stop))
    if test.categories is not None:
        found.by_category = [
            OfCategory(*_part(difference, test.categories == number), categories[number])
            for number in np.flatnonzero(np.bincount(test.categories) > 1).tolist()
        ]
    found.conclusion = _conclusion(found)
    return found


def _part(
    difference: Float[np.ndarray, "seeds N"], group: Bool[np.ndarray, " N"]
) -> tuple[int, float, Interval]:
    """What a Part is made of: how many reviews, the mean difference, its interval."""
    chosen = difference[:, group]
    return int(group.sum()), float(chosen.mean()), paired_interval(chosen)


def mcnemar(a: Bool[np.ndarray, " N"], b: Bool[np.ndarray, " N"]) -> float:
    """McNemar's exact test (1947): p that as many reviews or more are right in one model alone.

    Of the reviews that one model gets right and the other wrong, half are expected either way.
    """
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def paired_p(difference: Float[np.ndarray, "seeds N"]) -> float:
    """McNemar's test for several seeds at once, that does not take a review for several.

    The seeds ask about the same reviews, so their counts must not be added up as if they were
    independent. A review counts once, with the sum over the seeds; where the two models are
    exchangeable, each sum could as well have the other sign. p is the share of sign flips with a
    total as far from zero, FLIPS of them (all, where there are fewer), so never below
    2 / (FLIPS + 1); with one seed, this is McNemar's exact test but for the sampling.
    """
    totals = difference.sum(axis=0)
    totals = totals[totals != 0]
    if len(totals) == 0:
        return 1.0
    result = stats.permutation_test(
        (totals,),
        lambda x, axis: x.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=FLIPS,
        batch=1_000,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def paired_interval(difference: Float[np.ndarray, "seeds N"]) -> tuple[float, float]:
    """95 % interval of the mean difference, for new seeds and new reviews (see `_interval`)."""
    seeds, count = difference.shape
    of_seeds, of_reviews = difference.mean(axis=1), difference.mean(axis=0)
    by_seed = both = 0.0
    if seeds > 1:
        rest = difference - of_seeds[:, None] - of_reviews + difference.mean()
        by_seed = of_seeds.var(ddof=1) / seeds
        both = np.square(rest).sum() / ((seeds - 1) * (count - 1)) / (seeds * count)
    by_review = of_reviews.var(ddof=1) / count
    return _interval(difference.mean(), (by_seed, by_review, both), (seeds, count))


def _interval(
    mean: float, variances: tuple[float, float, float], sizes: tuple[int, int]
) -> tuple[float, float]:
    """Student's 95 % interval of a mean over seeds and reviews, each seed on every review.

    variances of the mean: as the seeds show it, as the reviews show it, and what both of these hold
    and must count once (Owen 2007, Cameron, Gelbach and Miller 2011). The degrees of freedom are
    Satterthwaite's (1946): where the seeds dominate, hardly more than their number less one. With
    one seed, the interval is for new reviews alone.
    """
    by_seed, by_review, both = variances
    variance = max(by_seed + by_review - both, by_seed, by_review)
    if variance == 0:
        return float(mean), float(mean)
    squares = by_seed**2 / max(sizes[0] - 1, 1) + by_review**2 / (sizes[1] - 1)
    half = stats.t.ppf(0.975, variance**2 / squares) * np.sqrt(variance)
    return float(mean - half), float(mean + half)


def _conclusion(found: Pair) -> str:
    low, high = found.interval
    gain = 100 * found.difference
    if low > 0 or high < 0:
        verdict = f"{found.b} is {'better' if gain > 0 else 'worse'} than {found.a}"
    else:
        verdict = f"no difference between {found.b} and {found.a} can be told"
    return (
        f"With {found.seeds} seeds, {verdict}: {gain:+.2f} points of accuracy (95 % interval "
        f"{100 * low:+.2f} to {100 * high:+.2f}; p = {found.mcnemar_p:.2g} for these very "
        f"models); {found.b} takes {found.seconds_b / found.seconds_a:.2f} times as long to train."
    )


# How far back gradients reach.


def vanishing(trained: Mapping[str, run_directory.Run], data: Data) -> Vanishing:
    """The norm of dLoss/dh_t by the distance of word t to the end, untrained and trained.

    Over the longest test reviews as the models read them (GRADIENT_REVIEWS, at most a quarter), up
    to the length of the shortest, so that the same ones stand at every distance; computed in
    float64, in which the smallest norms still have a value.
    """
    most = min(GRADIENT_REVIEWS, len(data.test.split) // 4 or 1)
    order = np.argsort(-data.test.lengths, kind="stable")[:most]
    reach = int(data.test.lengths[order].min())
    series = []
    for name, run in trained.items():
        for state, model in (("untrained", untrained(run)), ("trained", run)):
            learner = load_learner(torch_impl.learner, model, "cpu", "float64")
            norms = np.concatenate(
                [
                    gradient_norms(learner, data.test.batch(rows), reach)
                    for rows in np.split(order, range(32, len(order), 32))
                ]
            )
            low, median, high = np.quantile(norms, [0.25, 0.5, 0.75], axis=0).tolist()
            series.append(Series(f"{name}, {state}", median, low, high))
    distance = min(100, reach - 1)
    shares = ", ".join(
        f"{each.median[distance] / each.median[0]:.0e} in the {each.name}" for each in series
    )
    conclusion = (
        f"{distance} words before the end, the median gradient has this share of its norm at the "
        f"end: {shares}."
    )
    return Vanishing(len(order), list(range(reach)), series, conclusion)


def untrained(run: run_directory.Run) -> run_directory.Run:
    """The model as it was before training."""
    parameters = params.init(run.model, run.options.seed, run.vectors)
    return dataclasses.replace(run, parameters=parameters)


def gradient_norms(learner: Learner, batch: Batch, reach: int) -> Float[np.ndarray, "B reach"]:
    """Of each review, the norm of the gradient at its last word, its last but one, and so on."""
    norms = np.linalg.norm(learner.explain(batch)["d_states"][0], axis=-1)
    places = batch.lengths[:, None] - 1 - np.arange(reach)
    return norms[places, np.arange(len(batch.lengths))[:, None]]


# What the gates do at which words.


def gates(trained: Sequence[run_directory.Run], data: Data) -> Gates:
    """Update gate and state change at stop words, neutral words and sentiment words.

    z is the mean over the units, change the norm of h_t - h_(t-1) relative to that of h_(t-1); the
    first word of a review, which meets the zero state, is left out. Everything is computed for each
    model (one a seed) at each word of GATE_REVIEWS test reviews, and then averaged over the models.
    Intervals draw whole reviews anew, since the words of one are not independent, and allow for the
    differences between the models.
    effects_untrained is the same before training: what stands there is not learned.
    """
    test = Batches(
        data.test.split.subset(GATE_REVIEWS),
        32,
        max_length=trained[0].options.max_length,
        in_order=True,
    )
    groups, count = word_groups(data.train.split, data.vectors.words), len(test.split)

    def read(
        models: Iterable[run_directory.Run],
    ) -> dict[str, Float[np.ndarray, "m 3 resamples g"]]:
        """What `resample` makes of each quantity of all models."""
        found = [
            read_words(load_learner(torch_impl.learner, run, "cpu"), test, groups) for run in models
        ]
        where = found[0]["group"], found[0]["review"], count
        return {
            quantity: resample(np.stack([each[quantity] for each in found]), *where)
            for quantity in QUANTITIES
        }

    after, before = read(trained), read(map(untrained, trained))
    # How many words of each group the reviews have.
    n = after["z"][0, 0, 0].astype(int).tolist()
    found = Gates(groups=[], effects=[], conclusion="")
    for number, name in enumerate(GROUPS):
        if n[number]:
            means = [estimate(mean(after[quantity], number), count) for quantity in QUANTITIES]
            different = int((groups == number).sum())
            found.groups.append(Group(name, n[number], *means[0], *means[1], different))
    there = [number for number in range(len(GROUPS)) if n[number] > 1]
    pairs = [(a, b) for b in there for a in there if a > b]
    for sums, effects in ((after, found.effects), (before, found.effects_untrained)):
        for quantity in QUANTITIES:
            for a, b in pairs:
                values = cohens_d(sums[quantity], a, b)
                d = estimate(values, count)
                by_seed = values[:, 0].tolist()
                effects.append(Effect((GROUPS[a], GROUPS[b]), quantity, *d, by_seed))
    found.conclusion = _gates_conclusion(found)
    return found


def word_groups(train: EncodedSplit, words: Sequence[str]) -> Int[np.ndarray, " V"]:
    """The group (index into GROUPS) of each word, -1 for the many that are in none.

    stop words: scikit-learn's list, whatever their odds. Of the others that stand in at least
    FEWEST_REVIEWS training reviews, by the logarithm of the odds of a class (of all, the one that
    stands out most) in the reviews with the word, against its odds in all reviews:
    sentiment words from SENTIMENT on, neutral words up to NEUTRAL.
    """
    review = np.repeat(np.arange(len(train)), train.lengths)
    pairs = np.unique(np.stack([review, train.tokens]), axis=1)
    classes = int(train.labels.max()) + 1
    counts = np.zeros((len(words), classes))
    np.add.at(counts, (pairs[1], train.labels[pairs[0]]), 1)
    reviews = np.bincount(train.labels, minlength=classes)
    total = counts.sum(axis=1)
    # Half a review more of each, so that no odds are zero or infinite (Haldane 1956).
    odds = np.log((counts + 0.5) / (total[:, None] - counts + 0.5))
    odds = np.abs(odds - np.log(reviews / (len(train) - reviews))).max(axis=1)
    groups = np.full(len(words), -1)
    groups[(total >= FEWEST_REVIEWS) & (odds <= NEUTRAL)] = GROUPS.index("neutral words")
    groups[(total >= FEWEST_REVIEWS) & (odds >= SENTIMENT)] = GROUPS.index("sentiment words")
    stop = np.array([word in ENGLISH_STOP_WORDS for word in words])
    groups[stop] = GROUPS.index("stop words")
    return groups


def read_words(
    learner: Learner, batches: Batches, groups: Int[np.ndarray, " V"]
) -> dict[str, np.ndarray]:
    """review, group, z and change of every word that is in a group, but for each first one."""
    parts: dict[str, list[np.ndarray]] = {"review": [], "group": [], "z": [], "change": []}
    for batch in batches.epoch():
        found = learner.explain(batch)
        states, z = found["states"][0], found["z"][0].mean(axis=-1)
        norms = np.linalg.norm(states, axis=-1)
        change = np.zeros_like(norms)
        moved = np.linalg.norm(states[1:] - states[:-1], axis=-1)
        np.divide(moved, norms[:-1], out=change[1:], where=norms[:-1] > 0)
        group = groups[batch.distinct[batch.tokens]]
        step = np.arange(len(states))[:, None]
        chosen = (group >= 0) & (step > 0) & (step < batch.lengths)
        parts["review"].append(np.broadcast_to(batch.reviews, chosen.shape)[chosen])
        for name, values in (("group", group), ("z", z), ("change", change)):
            parts[name].append(values[chosen])
    return {name: np.concatenate(values) for name, values in parts.items()}


def resample(
    values: Float[np.ndarray, "models words"],
    group: Int[np.ndarray, " words"],
    review: Int[np.ndarray, " words"],
    reviews: int,
) -> Float[np.ndarray, "models 3 resamples groups"]:
    """Count, sum and sum of squares of each group: all that means and effect sizes need.

    Arguments: a value of each model, a group and a review for every word, and how many reviews
    there are. The first resample is the reviews as they are, the others are drawn from them with
    replacement, the same ones for every model.
    """
    sums = np.zeros((len(values), 3, reviews, len(GROUPS)))
    for model, tables in enumerate(sums):
        for power, table in enumerate(tables):
            np.add.at(table, (review, group), values[model].astype(np.float64) ** power)
    rng = np.random.default_rng(0)
    weights = rng.multinomial(reviews, np.full(reviews, 1 / reviews), BOOTSTRAPS)
    return np.concatenate([np.ones((1, reviews)), weights]) @ sums


def mean(
    sums: Float[np.ndarray, "models 3 resamples groups"], group: int
) -> Float[np.ndarray, "models resamples"]:
    """The mean of a group."""
    return sums[:, 1, :, group] / sums[:, 0, :, group]


def cohens_d(
    sums: Float[np.ndarray, "models 3 resamples groups"], a: int, b: int
) -> Float[np.ndarray, "models resamples"]:
    """How much larger a quantity is in group a than in b.

    In units of the standard deviation within the groups (pooled; Cohen 1988).
    """
    (n_a, total_a, squares_a), (n_b, total_b, squares_b) = (
        np.moveaxis(sums[..., group], 1, 0) for group in (a, b)
    )
    within = squares_a - total_a**2 / n_a + squares_b - total_b**2 / n_b
    return (total_a / n_a - total_b / n_b) / np.sqrt(within / (n_a + n_b - 2))


def estimate(values: Float[np.ndarray, "models resamples"], reviews: int) -> tuple[float, Interval]:
    """The mean over the models, and its 95 % interval for new seeds and new reviews.

    The reviews' part of the variance is the bootstrap's: see `_interval`.
    """
    models = len(values)
    drawn = values[:, 1:]
    by_seed = both = 0.0
    if models > 1:
        by_seed = values[:, 0].var(ddof=1) / models
        both = (drawn - drawn.mean(axis=0)).var(axis=1).sum() / (models - 1) / models
    variances = by_seed, drawn.mean(axis=0).var(), both
    mean = float(values[:, 0].mean())
    return mean, _interval(mean, variances, (models, reviews))


def _gates_conclusion(found: Gates) -> str:
    ends = ("sentiment words", "stop words")
    trained, before = (
        {each.quantity: each for each in effects if each.pair == ends}
        for effects in (found.effects, found.effects_untrained)
    )
    if not trained:
        return "The reviews have too few sentiment words or stop words to tell."
    moved = {each.group: each.change for each in found.groups}
    low, high = trained["change"].interval
    less = "less" if low > 0 else "more" if high < 0 else "by no amount that can be told apart"
    return (
        f"A stop word moves the state {less}: by {moved['stop words']:.0%} of its norm, a "
        f"sentiment word by {moved['sentiment words']:.0%} ({_effect(trained['change'])}; before "
        f"training {_effect(before['change'])}); the update gate opens for sentiment "
        f"words with {_effect(trained['z'])}, before training {_effect(before['z'])}."
    )


def _effect(effect: Effect) -> str:
    low, high = effect.interval
    return f"d = {effect.cohens_d:.2f} [{low:.2f}, {high:.2f}]"
