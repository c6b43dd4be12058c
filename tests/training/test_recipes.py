"""What a recipe adds to training, in both twins: dropout, pooling, weights, schedules.

Through the learners, on batches of real reviews, in float64; what is not the frameworks' own is
held to them, or to NumPy.
"""

import dataclasses
import itertools
import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import jax_impl.classifier
import jax_impl.learner
import torch_impl.classifier
import torch_impl.learner
from common import params
from common.data import corpus
from common.data.batches import Batch
from common.errors import InputError
from common.params import NO_LABEL, POOLING, ModelConfig
from common.training import dropout
from common.training.options import TrainConfig
from common.training.recipe import Recipe, learning_rate, recipe_of
from tests.parity.test_optimizers import D, assert_within, reviews

TWINS = (torch_impl.learner, jax_impl.learner)
CLASSIFIERS = ((torch_impl.classifier, torch.from_numpy), (jax_impl.classifier, jnp.asarray))
EVERY_POOLING = ["+".join(ways) for n in range(1, 4) for ways in itertools.permutations(POOLING, n)]
ALL = TrainConfig(
    device="cpu",
    num_layers=2,
    model="bigru",
    hidden_size=16,
    pooling="last+max+mean",
    relu=False,
    warmup=0.1,
    schedule="linear",
    word_dropout=0.1,
    vector_dropout=0.2,
    feature_dropout=0.4,
    class_weights="1,1.5",
)
# What meets the step that word vectors take, if they are trained: of the words in a batch alone.
MEETS_VECTORS = {"word_dropout", "vector_dropout", "schedule"}
pytestmark = pytest.mark.usefixtures("x64")


def learners(training: TrainConfig, steps: int, train_vectors: bool = False, twins=TWINS) -> list:
    """A learner of the options in each framework, with the same parameters."""
    vectors = np.random.default_rng(0).standard_normal((len(corpus.load("imdb").vocabulary), D))
    config = training.model_config(vectors.shape, 2, train_vectors)
    recipe = recipe_of(training, steps, np.array([0, 1]), 2)
    values = params.init(config, 1, vectors)
    return [twin.Learner(config, training, vectors, values, "float64", recipe) for twin in twins]


def test_300_steps_with_everything_on():
    in_torch, in_jax = learners(ALL, 300)
    losses = np.array([[float(in_torch.step(b)), float(in_jax.step(b))] for b in reviews(300)])
    assert np.abs(losses[:, 0] - losses[:, 1]).max() <= 1e-8
    assert losses[-32:].mean() < losses[:32].mean()
    assert_within(1e-8, in_torch, in_jax)


@pytest.mark.parametrize(
    "one",
    [
        {"word_dropout": 0.3},
        {"vector_dropout": 0.3},
        {"feature_dropout": 0.3},
        {"schedule": "linear", "warmup": 0.2},
        {"class_weights": "2,0.5"},
        {"pooling": "mean+max", "relu": False},
    ],
    ids=lambda one: next(iter(one)),
)
def test_each_option_has_the_same_effect_in_both_twins(one):
    """One option at a time: 20 steps agree between the frameworks and differ from the default."""
    train_vectors = not MEETS_VECTORS.isdisjoint(one)
    large = {"num_layers": 2, "model": "bigru"} if "pooling" in one else {}
    plain = TrainConfig(device="cpu", hidden_size=16, **large)
    in_torch, in_jax = learners(dataclasses.replace(plain, **one), 20, train_vectors)
    without = None if "pooling" in one else learners(plain, 20, train_vectors, TWINS[:1])[0]
    for batch in reviews(20):
        for each in (in_torch, in_jax, without):
            if each is not None:
                each.step(batch)
    assert_within(1e-10, in_torch, in_jax)
    if without is not None:
        name = "gru.0.forward.weight_hh"
        assert np.abs(in_torch.parameters()[name] - without.parameters()[name]).max() > 1e-6


@pytest.mark.parametrize("twin", TWINS, ids=["torch", "jax"])
def test_resumed_run_takes_the_same_steps(twin):
    """A resumed run has the same bits: dropout and the schedule continue."""
    batches = reviews(12)
    (whole,) = learners(ALL, 12, twins=[twin])
    (after,) = learners(ALL, 12, twins=[twin])
    for batch in batches[:5]:
        whole.step(batch)
    after.load(whole.parameters(), whole.optimizer_state())
    losses = [float(whole.step(batch)) for batch in batches[5:]]
    assert [float(after.step(batch)) for batch in batches[5:]] == losses
    for name, value in whole.optimizer_state().items():
        np.testing.assert_array_equal(after.optimizer_state()[name], value, err_msg=name)


@pytest.mark.parametrize("order", [1, -1])
def test_one_framework_continues_the_run_of_the_other(order):
    batches = reviews(40)
    first, second = learners(ALL, 40)[::order]
    for batch in batches[:20]:
        first.step(batch)
    second.load(first.parameters(), first.optimizer_state())
    for batch in batches[20:]:
        first.step(batch)
        second.step(batch)
    assert_within(1e-10, first, second)


# Pooling.


@pytest.mark.parametrize("pooling", EVERY_POOLING)
def test_pooling_is_that_of_numpy(pooling):
    """Padding does not affect pooling, and a row without words gives zeros."""
    rng = np.random.default_rng(0)
    T, B, R, H = 6, 5, 2, 3
    lengths = np.array([6, 4, 1, 0, 3], np.int32)
    words = np.arange(T)[:, None] < lengths
    outputs = np.where(words[..., None], rng.standard_normal((T, B, R * H)) - 2, 0)
    h_last = rng.standard_normal((R, B, H))
    rows = [outputs[:n, i] for i, n in enumerate(lengths)]
    nothing = np.zeros(R * H)
    ways = {
        "last": np.concatenate(list(h_last), -1),
        "max": np.stack([row.max(0) if len(row) else nothing for row in rows]),
        "mean": np.stack([row.mean(0) if len(row) else nothing for row in rows]),
    }
    expected = np.concatenate([ways[way] for way in pooling.split("+")], -1)
    for module, convert in CLASSIFIERS:

        def pool(*arrays, module=module, convert=convert):
            return np.asarray(module.pool(*map(convert, arrays), pooling))

        np.testing.assert_allclose(pool(outputs, h_last, lengths), expected, rtol=1e-14)
        empty = pool(outputs[:0], h_last, np.zeros(B, np.int32))
        assert empty.shape == expected.shape and np.isfinite(empty).all()


@pytest.mark.parametrize("pooling", ["max", "last+max+mean"])
@pytest.mark.parametrize("model", ["gru", "bigru"])
def test_the_builtin_layer_is_pooled_alike(model, pooling):
    """nn.GRU with the same parameters and dropout has the loss of the handwritten GRU."""
    options = {"pooling": pooling, "reset_after": True, "model": model}
    training = dataclasses.replace(ALL, **options)
    builtin = dataclasses.replace(training, model=f"nn.{model}")
    (ours,), (theirs,) = (learners(each, 5, twins=TWINS[:1]) for each in (training, builtin))
    for batch in reviews(5):
        assert float(ours.step(batch)) == pytest.approx(float(theirs.step(batch)), rel=1e-9)


# Dropout.


def batch_of(K: int, B: int) -> Batch:
    of = np.ones(B, np.int32)
    return Batch(np.arange(K, dtype=np.int32), np.zeros((2, B), np.int32), of, of, of.astype(int))


def drop(step: int, seed: int = 0, **rates: float) -> dict[str, np.ndarray]:
    config = ModelConfig(50, 20, num_layers=3, bidirectional=True, pooling="max+mean")
    options = TrainConfig(seed=seed, num_layers=3, **rates)
    return dropout.masks(config, options, batch_of(400, 32), step)


def test_masks_have_their_rates_and_keep_the_mean():
    result = drop(0, vector_dropout=0.2, feature_dropout=0.4)
    result |= drop(0, vector_dropout=0.2, word_dropout=0.25)
    shapes = {"elements": (400, 50), "words": (400, 1), "features": (32, 80)}
    rates = {"elements": 0.2, "words": 0.25, "features": 0.4}
    scale = {rate: 256 / (256 - round(256 * rate)) for rate in (0.2, 0.25, 0.4)}
    times = {"elements": 1, "words": scale[0.2] * scale[0.25], "features": scale[0.4]}
    assert result.keys() == shapes.keys()
    for name, mask in result.items():
        dtype = np.uint8 if name == "elements" else np.float32
        assert mask.shape == shapes[name] and mask.dtype == dtype
        # A rate is rounded to a 256th.
        allowed = 1 / 512 + 4 * (0.25 / mask.size) ** 0.5
        assert (mask == 0).mean() == pytest.approx(rates[name], abs=allowed)
        np.testing.assert_allclose(mask[mask > 0], times[name], rtol=1e-6)
    assert drop(0) == {}


def test_masks_are_a_function_of_seed_step_and_purpose():
    rates = {"vector_dropout": 0.5, "feature_dropout": 0.5}
    first, again = drop(3, 7, **rates), drop(3, 7, **rates)
    first.pop("words"), again.pop("words")  # one number
    for name, mask in first.items():
        np.testing.assert_array_equal(mask, again[name])
        for other in (drop(4, 7, **rates), drop(3, 8, **rates)):
            assert 0.4 < (mask == other[name]).mean() < 0.6
    flat = [mask.ravel()[:2000] > 0 for mask in first.values()]
    for one, other in itertools.combinations(flat, 2):
        assert 0.4 < (one == other).mean() < 0.6
    # A mask does not depend on the other masks.
    np.testing.assert_array_equal(drop(3, 7, feature_dropout=0.5)["features"], first["features"])


def test_masks_are_those_of_philox():
    """The masks stay the same in all releases: the first random numbers have known values."""
    raw = np.random.Philox(key=[7, 3], counter=[0, 0, 0, 5]).random_raw(320)
    drawn = np.array([[word >> (8 * i) & 0xFF for i in range(8)] for word in raw.tolist()])
    expected = drawn.reshape(32, 80) >= 0.25 * 256
    np.testing.assert_array_equal(drop(5, 7, feature_dropout=0.25)["features"] > 0, expected)


# The loss.


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.25]])
def test_the_loss_is_that_of_numpy(weights):
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((7, 3)), np.array([0, 2, 1, NO_LABEL, 2, 0, NO_LABEL])
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    weight, total = np.array(weights or [1.0] * 3), 0.0
    rows = np.flatnonzero(labels != NO_LABEL)
    for i in rows:
        total -= weight[labels[i]] * log_p[i, labels[i]]
    expected = total / weight[labels[rows]].sum()
    for module, convert in CLASSIFIERS:
        arguments = None if weights is None else convert(np.array(weights))
        result = module.cross_entropy(convert(logits), convert(labels), arguments)
        assert float(result) == pytest.approx(expected, rel=1e-13)


def test_class_weights():
    labels = np.array([0, 0, 0, 1])

    def weights(text: str) -> tuple[float, ...] | None:
        return recipe_of(TrainConfig(class_weights=text), 1, labels, 2).class_weights

    assert weights("none") is None
    assert weights("balanced") == pytest.approx((4 / 6, 2.0))  # as scikit-learn has it
    assert weights("1,2.5") == (1.0, 2.5)
    with pytest.raises(InputError, match="--class-weights 1,2,3: 3 numbers for 2 classes"):
        weights("1,2,3")


# The size of a step.


@pytest.mark.parametrize("warmup", [0.0, 0.1])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_schedules_are_those_of_the_frameworks(schedule, warmup):
    options, steps = TrainConfig(learning_rate=0.01, schedule=schedule, warmup=warmup), 200
    result = [learning_rate(options, Recipe(steps), step) for step in range(steps)]
    warm = math.ceil(warmup * steps)
    left = steps - warm
    after = {
        "constant": optax.constant_schedule(0.01),
        "linear": optax.linear_schedule(0.01, 0, left),
    }[schedule]
    # What they reach after a step of growing is ours before it: the first step is no step of zero.
    grow = optax.linear_schedule(0.01 / max(warm, 1), 0.01, max(warm - 1, 1))
    theirs = optax.join_schedules([grow, after], [warm])
    np.testing.assert_allclose(result, [float(theirs(step)) for step in range(steps)], rtol=1e-5)

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.01)
    scheduler = torch.optim.lr_scheduler
    after = {
        "constant": lambda: scheduler.ConstantLR(optimizer, 1, 0),
        "linear": lambda: scheduler.LinearLR(optimizer, 1, 0, left),
    }[schedule]()
    if warm:
        grow = scheduler.LinearLR(optimizer, 1 / warm, 1, warm - 1)
        after = scheduler.SequentialLR(optimizer, [grow, after], [warm])
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        after.step()
    np.testing.assert_allclose(result, rates, rtol=1e-9)
