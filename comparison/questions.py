"""Measures answers to the homework's three questions: python compare.py questions.

Does gating keep gradients from vanishing, and what do the gates do at an irrelevant word? Does a
bidirectional model help? How does the handwritten GRU compare with the built-in one?
docs/questions.md has the results and explains them.
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

import jax_impl.predictor
import torch_impl.predictor
from common import params
from common.data.batches import Batch, Batches
from common.data.corpus import EncodedSplit
from common.inference.model import Model
from common.inference.predictor import Framework, Predictor
from common.linear import run as linear
from common.report import schema
from common.training import run_directory
from common.training.data import Data, load_data, load_texts
from common.training.learner import predict
from common.training.options import TrainConfig
from comparison import runs
from comparison.processes import Place

FRAMEWORKS: dict[str, Framework] = {"torch": torch_impl.predictor, "jax": jax_impl.predictor}
PAIRS = (
    ("Gates or none", "torch rnn", "torch gru"),
    ("A GRU or n-grams", "sklearn linear", "torch gru"),
    ("Bidirectional or not", "torch gru", "torch bigru"),
    ("Bidirectional or not, built-in", "torch nn.gru", "torch nn.bigru"),
    ("Bidirectional or not, in JAX", "jax gru", "jax bigru"),
    ("Handwritten or built-in", "torch gru", "torch nn.gru"),
    ("Handwritten or built-in, bidirectional", "torch bigru", "torch nn.bigru"),
    ("PyTorch or JAX", "torch gru", "jax gru"),
)
Report = Callable[[str], None]
Sums = Float[np.ndarray, "models 3 resamples groups"]
"""Count, sum and sum of squares of each group, from which means and effect sizes follow."""
FLIPS, BOOTSTRAPS = 9_999, 2_000
GRADIENT_REVIEWS = 200
GATE_REVIEWS = 400
LENGTH_GROUPS = 5
# Word groups: words in at least FEWEST_REVIEWS training reviews are grouped. A word is a sentiment
# word if the odds of a class are at least twice as high in the reviews with the word, and neutral
# if they are less than a tenth higher or lower.
FEWEST_REVIEWS = 50
SENTIMENT, NEUTRAL = float(np.log(2)), float(np.log(1.1))
GROUPS = ("stop words", "neutral words", "sentiment words")
QUANTITIES = ("z", "change")


def measure(
    options: TrainConfig, names: Sequence[str], seeds: int, place: Place, report: Report
) -> schema.Questions:
    """Train every model (names: "torch gru", …) with several seeds, and answer the questions.

    Run directories are OUT/questions/seed-N/FRAMEWORK-MODEL. Existing runs with the same options
    are not trained again.
    """
    data = load_data(options, report)
    trained = train(options, names, seeds, place, report)
    report("evaluating every model on the test reviews")
    correct, seconds = {}, {}
    for name, of_seeds in trained.items():
        is_correct = np.array([answers(run, data, options) for run in of_seeds])
        # The linear model has one run for all seeds.
        correct[name] = np.broadcast_to(is_correct, (seeds, len(data.test.split)))
        seconds[name] = float(np.median([run.train_seconds for run in of_seeds]))
    result = schema.Questions(
        comparisons=[
            compare(title, a, b, correct, seconds, data.test.split, data.categories)
            for title, a, b in PAIRS
            if a in correct and b in correct
        ],
        commands=[shlex.join(["python", *sys.argv])],
    )
    if "torch gru" in names and "torch rnn" in names:
        report("computing gradients by the distance to the end")
        grus = [*map(load, trained["torch gru"])]
        both = {"tanh RNN": load(trained["torch rnn"][0]), "GRU": grus[0]}
        result.vanishing = vanishing(both, data)
        report("computing the gates at every word")
        result.gates = gates(grus, data)
    return result


def train(
    options: TrainConfig, names: Sequence[str], seeds: int, place: Place, report: Report
) -> dict[str, list[schema.Run]]:
    """Train the missing runs; returns the runs of each model, one per seed (linear: one in all)."""
    assert options.out is not None
    trainings = []
    for seed, name in itertools.product(range(options.seed, options.seed + seeds), names):
        framework, model = name.split()
        folder = options.out / "questions" / f"seed-{seed}" / f"{framework}-{model}"
        seeded = dataclasses.replace(options, seed=seed)
        if framework != linear.FRAMEWORK or seed == options.seed:  # linear does not use the seed
            trainings.append(
                runs.Training.of(framework, model, seeded, folder, f"seed {seed}, {name}")
            )

    def done(name: str, run: schema.Run | None) -> None:
        assert run is not None
        report(f"{name}: {run.accuracy:.2%} after {run.train_seconds:.0f} s")

    trained = runs.train(trainings, place, lambda name, line: None, done)
    return {name: [run for run in trained if run.name == name] for name in names}


def load(run: schema.Run) -> run_directory.Run:
    """The trained model."""
    return run_directory.load_run(Path(run.run_dir))


def answers(run: schema.Run, data: Data, options: TrainConfig) -> Bool[np.ndarray, " N"]:
    """A mask of the test reviews that a model classifies correctly."""
    if run.framework == linear.FRAMEWORK:  # its texts include words without a vector
        texts = load_texts(options, lambda line: None)[2]
        return linear.load(Path(run.run_dir)).model.logits(texts).argmax(axis=1) == texts.labels
    loaded = load(run)
    predictor_type = FRAMEWORKS[run.framework].Predictor
    predictor = predictor_type(
        loaded.model, loaded.parameters, loaded.vectors, loaded.options.device
    )
    logits, labels = predict(predictor, data.test)
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
) -> schema.Pair:
    """Compare b with a, paired by seed and by review."""
    difference = correct[b].astype(float) - correct[a]

    def part(group: Bool[np.ndarray, " N"]) -> tuple[int, float, schema.Interval]:
        """The number of reviews, the mean difference and its interval."""
        chosen = difference[:, group]
        return int(group.sum()), float(chosen.mean()), paired_interval(chosen)

    # Groups of about equal size, by the number of words with a vector before truncation.
    edges = np.unique(np.quantile(test.lengths, np.linspace(0, 1, LENGTH_GROUPS + 1)).astype(int))
    edges[-1] += 1
    by_length = [
        schema.OfLength(*part(group), start, stop)
        for start, stop in itertools.pairwise(edges.tolist())
        if (group := (test.lengths >= start) & (test.lengths < stop)).sum() > 1
    ]
    category_of = np.full(len(test), -1) if test.categories is None else test.categories
    by_category = [
        schema.OfCategory(*part(group), category)
        for number, category in enumerate(categories)
        if (group := category_of == number).sum() > 1
    ]
    pair = schema.Pair(
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
        by_length=by_length,
        by_category=by_category,
        seconds_a=seconds[a],
        seconds_b=seconds[b],
        conclusion="",
    )
    pair.conclusion = _conclusion(pair)
    return pair


def mcnemar(a: Bool[np.ndarray, " N"], b: Bool[np.ndarray, " N"]) -> float:
    """p of McNemar's exact test (1947).

    The null hypothesis: of the reviews that one model alone classifies correctly, each model has
    half.
    """
    only_a, only_one = int((a & ~b).sum()), int((a ^ b).sum())
    return float(stats.binomtest(only_a, only_one).pvalue) if only_one else 1.0


def paired_p(difference: Float[np.ndarray, "seeds N"]) -> float:
    """McNemar's test for several seeds.

    All seeds are tested on the same reviews, so their counts are not independent. Each review
    therefore counts once, with the sum over the seeds; under the null hypothesis, both signs of a
    sum are equally likely. p is the fraction of FLIPS random sign flips (or of all, if there are
    fewer) with a total as far from zero, at least 2 / (FLIPS + 1). With one seed, this is McNemar's
    exact test except for the sampling.
    """
    totals = difference.sum(axis=0)
    totals = totals[totals != 0]
    if len(totals) == 0:
        return 1.0
    flipped = stats.permutation_test(
        (totals,), np.sum, permutation_type="samples", n_resamples=FLIPS, batch=1_000, rng=0
    )
    return float(flipped.pvalue)


def paired_interval(difference: Float[np.ndarray, "seeds N"]) -> schema.Interval:
    """95 % interval of the mean difference, for new seeds and new reviews (see `_interval`)."""
    of_reviews = difference.mean(axis=0)
    count = len(of_reviews)
    within_seeds = (difference - of_reviews).var(axis=1, ddof=1) / count
    by_review = of_reviews.var(ddof=1) / count
    return _interval(difference.mean(axis=1), by_review, within_seeds, count)


def _interval(
    of_seeds: Float[np.ndarray, " seeds"],
    by_review: float,
    within_seeds: Float[np.ndarray, " seeds"],
    reviews: int,
) -> schema.Interval:
    """Student's 95 % interval of the mean over seeds that are measured on the same reviews.

    The variance of the mean is that between seeds plus that between reviews (by_review) minus their
    common part, the variance between reviews of the deviations of single seeds (within_seeds; Owen
    2007; Cameron, Gelbach and Miller 2011). The degrees of freedom are Satterthwaite's (1946): if
    the seeds dominate, hardly more than their number minus one. With one seed, the interval is for
    new reviews only.
    """
    mean, seeds, freedom = float(of_seeds.mean()), len(of_seeds), max(len(of_seeds) - 1, 1)
    by_seed = np.square(of_seeds - mean).sum() / freedom / seeds
    both = within_seeds.sum() / freedom / seeds
    variance = max(by_seed + by_review - both, by_seed, by_review)
    if variance == 0:
        return mean, mean
    squares = by_seed**2 / freedom + by_review**2 / (reviews - 1)
    low, high = stats.t.interval(0.95, variance**2 / squares, mean, np.sqrt(variance))
    return float(low), float(high)


def _conclusion(pair: schema.Pair) -> str:
    low, high = pair.interval
    verdict = f"With {pair.seeds} seeds, "
    if pair.seeds < schema.FEWEST_SEEDS:
        few = f"{pair.seeds}, of at least {schema.FEWEST_SEEDS}"
        verdict = f"Too few seeds to compare {pair.b} and {pair.a} ({few})"
    elif low > 0 or high < 0:
        verdict += f"{pair.b} is {'better' if low > 0 else 'worse'} than {pair.a}"
    else:
        verdict += f"{pair.b} and {pair.a} do not differ significantly"
    return (
        f"{verdict}: {100 * pair.difference:+.2f} points of accuracy "
        f"(95 % interval {100 * low:+.2f} to {100 * high:+.2f}; p = {pair.mcnemar_p:.2g} for "
        f"these very models); {pair.b} takes {pair.seconds_b / pair.seconds_a:.2f} times as "
        "long to train."
    )


# The gradient norm by the distance to the end.


def vanishing(trained: Mapping[str, run_directory.Run], data: Data) -> schema.Vanishing:
    """The norm of dLoss/dh_t by the distance of word t to the end, untrained and trained.

    The reviews are the longest test reviews after truncation (GRADIENT_REVIEWS, at most a quarter).
    Distances end at the length of the shortest of them, so that every distance has the same
    reviews. float64 represents the smallest norms.
    """
    count = min(GRADIENT_REVIEWS, len(data.test.split) // 4 or 1)
    order = np.argsort(-data.test.lengths, kind="stable")[:count]
    batches = [data.test.batch(rows) for rows in np.split(order, range(32, len(order), 32))]
    reach = int(data.test.lengths[order].min())
    series = []
    for name, run in trained.items():
        for state, model in (("untrained", untrained(run)), ("trained", run)):
            predictor = Model(torch_impl.predictor, model, "cpu", "float64").predictor
            norms = np.concatenate([gradient_norms(predictor, batch, reach) for batch in batches])
            low, median, high = np.quantile(norms, [0.25, 0.5, 0.75], axis=0).tolist()
            series.append(schema.Series(f"{name}, {state}", median, low, high))
    distance = min(100, reach - 1)
    shares = ", ".join(
        f"{each.median[distance] / each.median[0]:.0e} in the {each.name}" for each in series
    )
    conclusion = f"{distance} words before the end, the median gradient has this share of its norm "
    conclusion += f"at the end: {shares}."
    return schema.Vanishing(len(order), list(range(reach)), series, conclusion)


def untrained(run: run_directory.Run) -> run_directory.Run:
    """The model before training."""
    parameters = params.init(run.model, run.options.seed, run.vectors)
    return dataclasses.replace(run, parameters=parameters)


def gradient_norms(predictor: Predictor, batch: Batch, reach: int) -> Float[np.ndarray, "B reach"]:
    """The norms of each review's gradient, from its last word backwards."""
    norms = np.linalg.norm(predictor.explain(batch, batch.labels)["d_states"][0], axis=-1)
    steps = batch.lengths[:, None] - 1 - np.arange(reach)
    return norms[steps, np.arange(len(batch.lengths))[:, None]]


# The gates by groups of words.


def gates(trained: Sequence[run_directory.Run], data: Data) -> schema.Gates:
    """Update gate and state change at stop words, neutral words and sentiment words.

    z is the mean over the units, change the norm of h_t - h_(t-1) relative to that of h_(t-1). The
    first word of a review is left out, because its h_(t-1) is zero. Values are computed for each
    model (one per seed) at each word of GATE_REVIEWS test reviews, and averaged over the models.
    Intervals resample whole reviews, because the words of a review are not independent, and include
    the variance between models. effects_untrained: the effects before training.
    """
    split, limit = data.test.split.subset(GATE_REVIEWS), trained[0].options.max_length
    test, count = Batches(split, 32, max_length=limit, in_order=True), len(split)
    groups = word_groups(data.train.split, data.vectors.words)

    def sums_of(models: Iterable[run_directory.Run]) -> dict[str, Sums]:
        """The sums of each quantity over all models."""
        predictors = (Model(torch_impl.predictor, run, "cpu").predictor for run in models)
        words = [read_words(predictor, test, groups) for predictor in predictors]
        indices = words[0]["group"], words[0]["review"], count
        return {name: resample(np.stack([w[name] for w in words]), *indices) for name in QUANTITIES}

    def effects(sums: Mapping[str, Sums]) -> list[schema.Effect]:
        """The effects of all pairs of groups with words."""
        result = []
        for quantity in QUANTITIES:
            for b, a in itertools.combinations(np.flatnonzero(words > 1).tolist(), 2):
                values = cohens_d(sums[quantity], a, b)
                d, by_seed = estimate(values, count), values[:, 0].tolist()
                result.append(schema.Effect((GROUPS[a], GROUPS[b]), quantity, *d, by_seed))
        return result

    sums = sums_of(trained)
    words = sums["z"][0, 0, 0].astype(int)  # the number of words of each group
    means = [
        schema.Group(
            GROUPS[group],
            int(words[group]),
            *estimate(mean(sums["z"], group), count),
            *estimate(mean(sums["change"], group), count),
            int((groups == group).sum()),
        )
        for group in np.flatnonzero(words).tolist()
    ]
    result = schema.Gates(means, effects(sums), "", effects(sums_of(map(untrained, trained))))
    result.conclusion = _gates_conclusion(result)
    return result


def word_groups(train: EncodedSplit, words: Sequence[str]) -> Int[np.ndarray, " V"]:
    """The group (index into GROUPS) of each word, or -1.

    Stop words are scikit-learn's list. Other words in at least FEWEST_REVIEWS training reviews are
    grouped by the absolute log odds ratio of a class in the reviews with the word against all
    reviews (the maximum over the classes): sentiment words from SENTIMENT, neutral words up to
    NEUTRAL.
    """
    review = np.repeat(np.arange(len(train)), train.lengths)
    tokens = np.concatenate([tokens for _, tokens in train.blocks()])
    pairs = np.unique(np.stack([review, tokens]), axis=1)
    classes = int(train.labels.max()) + 1
    counts = np.zeros((len(words), classes))
    np.add.at(counts, (pairs[1], train.labels[pairs[0]]), 1)
    reviews = np.bincount(train.labels, minlength=classes)
    total = counts.sum(axis=1)
    # Adding half a review avoids zero and infinite odds (Haldane 1956).
    odds = np.log((counts + 0.5) / (total[:, None] - counts + 0.5))
    odds = np.abs(odds - np.log(reviews / (len(train) - reviews))).max(axis=1)
    groups = np.full(len(words), -1)
    groups[(total >= FEWEST_REVIEWS) & (odds <= NEUTRAL)] = GROUPS.index("neutral words")
    groups[(total >= FEWEST_REVIEWS) & (odds >= SENTIMENT)] = GROUPS.index("sentiment words")
    groups[[word in ENGLISH_STOP_WORDS for word in words]] = GROUPS.index("stop words")
    return groups


def read_words(
    predictor: Predictor, batches: Batches, groups: Int[np.ndarray, " V"]
) -> dict[str, np.ndarray]:
    """review, group, z and change of every grouped word, except the first of each review."""
    parts = []
    for batch in batches.epoch():
        explained = predictor.explain(batch, batch.labels)
        states, z = explained["states"][0], explained["z"][0].mean(axis=-1)
        norm = np.linalg.norm(states[:-1], axis=-1)
        distance = np.linalg.norm(states[1:] - states[:-1], axis=-1)
        change = np.divide(distance, norm, out=np.zeros_like(distance), where=norm > 0)
        group = groups[batch.distinct[batch.tokens[1:]]]
        is_grouped = (group >= 0) & (np.arange(1, len(states))[:, None] < batch.lengths)
        values = np.broadcast_arrays(batch.reviews, group, z[1:], change)
        parts.append([each[is_grouped] for each in values])
    columns = map(np.concatenate, zip(*parts, strict=True))
    return dict(zip(("review", "group", *QUANTITIES), columns, strict=True))


def resample(
    values: Float[np.ndarray, "models words"],
    group: Int[np.ndarray, " words"],
    review: Int[np.ndarray, " words"],
    reviews: int,
) -> Sums:
    """The sums over all reviews, and over BOOTSTRAPS samples with replacement.

    values, group, review: for every word. reviews: the number of reviews. All models have the same
    samples.
    """
    sums = np.zeros((reviews, len(GROUPS), len(values), 3))
    np.add.at(sums, (review, group), values.T[..., None].astype(np.float64) ** np.arange(3))
    rng = np.random.default_rng(0)
    weights = rng.multinomial(reviews, np.full(reviews, 1 / reviews), BOOTSTRAPS)
    return np.concatenate([np.ones((1, reviews)), weights]) @ sums.transpose(2, 3, 0, 1)


def mean(sums: Sums, group: int) -> Float[np.ndarray, "models resamples"]:
    """The mean of a group."""
    return sums[:, 1, :, group] / sums[:, 0, :, group]


def cohens_d(sums: Sums, a: int, b: int) -> Float[np.ndarray, "models resamples"]:
    """The mean of group a minus that of b, in pooled standard deviations (Cohen 1988)."""
    (n_a, total_a, squares_a), (n_b, total_b, squares_b) = (
        sums[..., group].swapaxes(0, 1) for group in (a, b)
    )
    within = squares_a - total_a**2 / n_a + squares_b - total_b**2 / n_b
    return (total_a / n_a - total_b / n_b) / np.sqrt(within / (n_a + n_b - 2))


def estimate(
    values: Float[np.ndarray, "models resamples"], reviews: int
) -> tuple[float, schema.Interval]:
    """The mean over the models, and its 95 % interval for new seeds and new reviews (`_interval`).

    The bootstrap estimates the variance between reviews.
    """
    of_models, drawn = values[:, 0], values[:, 1:]
    by_review = drawn.mean(axis=0)
    within_seeds = (drawn - by_review).var(axis=1)
    return float(of_models.mean()), _interval(of_models, by_review.var(), within_seeds, reviews)


def _gates_conclusion(result: schema.Gates) -> str:
    ends = ("sentiment words", "stop words")
    trained, before = (
        {each.quantity: each for each in effects if each.pair == ends}
        for effects in (result.effects, result.effects_untrained)
    )
    if not trained:
        return "The reviews have too few sentiment words or stop words to tell."
    moved = {each.group: each.change for each in result.groups}
    low, high = trained["change"].interval
    verdict = "less" if low > 0 else "more" if high < 0 else "by no significantly different amount"
    if result.seeds < schema.FEWEST_SEEDS:
        verdict = "(too few seeds to tell whether less)"
    return (
        f"A stop word moves the state {verdict}: by {moved['stop words']:.0%} of its norm, a "
        f"sentiment word by {moved['sentiment words']:.0%} ({_effect(trained['change'])}; before "
        f"training {_effect(before['change'])}); the update gate opens for sentiment "
        f"words with {_effect(trained['z'])}, before training {_effect(before['z'])}."
    )


def _effect(effect: schema.Effect) -> str:
    low, high = effect.interval
    return f"d = {effect.cohens_d:.2f} [{low:.2f}, {high:.2f}]"
