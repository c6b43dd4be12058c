"""Adam in PyTorch and in optax: one step, and a training run.

All of it through the learners, on batches of real reviews, in float64.
"""

import dataclasses
from functools import cache
from itertools import chain, count, islice

import numpy as np
import pytest
import torch

import jax_impl.learner
import torch_impl.learner
from common import params
from common.data import corpus
from common.data.batches import Batch, Batches
from common.params import ModelConfig
from common.training.options import TrainConfig

TRAINING = TrainConfig(device="cpu")
D = 8
pytestmark = pytest.mark.usefixtures("x64")


@cache
def reviews(steps: int) -> list[Batch]:
    """The first batches of a training run on real reviews."""
    split = corpus.load("imdb").train.subset(256)
    batches = Batches(split, batch_size=8, max_length=20)
    return list(islice(chain.from_iterable(map(batches.epoch, count())), steps))


def learners(
    bidirectional: bool, reset_after: bool, train_vectors: bool = False, training=TRAINING
):
    """A learner in each framework, with the same parameters."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((len(corpus.load("imdb").vocabulary), D))
    config = ModelConfig(
        D,
        16,
        bidirectional=bidirectional,
        reset_after=reset_after,
        vocabulary_size=len(vectors),
        train_vectors=train_vectors,
    )
    return [
        twin.Learner(config, training, vectors, params.init(config, 1, vectors), "float64")
        for twin in (torch_impl.learner, jax_impl.learner)
    ]


def assert_within(bound: float, one, other) -> None:
    """Parameters and moments differ by no more than the bound, each relative to its largest."""
    for one_state, other_state in (
        (one.parameters(), other.parameters()),
        (one.optimizer_state(), other.optimizer_state()),
    ):
        assert one_state.keys() == other_state.keys()
        for name, value in one_state.items():
            assert value.dtype in (np.float64, np.int64), name
            gap = np.abs(value - other_state[name]).max()
            assert gap <= bound * max(1, np.abs(value).max()), name


@pytest.mark.parametrize(("reset_after", "train_vectors"), [(False, True), (True, False)])
def test_one_step(reset_after, train_vectors):
    (batch,) = reviews(1)
    in_torch, in_jax = learners(True, reset_after, train_vectors)
    start = in_torch.parameters()
    losses = [float(learner.step(batch)) for learner in (in_torch, in_jax)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert_within(1e-12, in_torch, in_jax)
    moved = {name: np.abs(value - start[name]).max() for name, value in in_jax.parameters().items()}
    assert min(moved.values()) > TRAINING.learning_rate / 10


@pytest.mark.parametrize("twin", [torch_impl.learner, jax_impl.learner], ids=["torch", "jax"])
def test_training_leaves_the_arrays_it_started_from_alone(twin):
    config = ModelConfig(D, 16)
    vectors = np.zeros((len(corpus.load("imdb").vocabulary), D))
    parameters = params.init(config, 1, vectors)
    stored = {name: value.copy() for name, value in parameters.items()}
    twin.Learner(config, TRAINING, vectors, parameters, "float64").step(*reviews(1))
    for name, value in stored.items():
        assert np.array_equal(parameters[name], value), name


def test_300_steps():
    in_torch, in_jax = learners(False, reset_after=False)
    losses = np.array([[float(in_torch.step(b)), float(in_jax.step(b))] for b in reviews(300)])
    assert np.abs(losses[:, 0] - losses[:, 1]).max() <= 1e-8
    assert losses[-32:].mean() < losses[:32].mean()  # it was training, not standing still
    values = in_torch.parameters(), in_jax.parameters()
    for name, value in values[0].items():
        assert np.abs(value - values[1][name]).max() <= 1e-8, name


def test_the_gradient_is_clipped_alike():
    clip = 0.05
    training = TrainConfig(device="cpu", clip_norm=clip)
    in_torch, in_jax = learners(True, reset_after=False, training=training)
    for number, batch in enumerate(reviews(20)):
        in_torch.step(batch)
        in_jax.step(batch)
        norms = float(in_torch.gradient_norm), float(in_jax.gradient_norm)
        assert norms[0] == pytest.approx(norms[1], rel=1e-10)
        assert norms[0] > clip  # so that there is something to clip
        if number == 0:  # the first moment is then (1 - beta) times the gradient
            state = in_torch.optimizer_state()
            moments = [value for name, value in state.items() if name.startswith("first_moment")]
            length = np.sqrt(sum(np.square(moment).sum() for moment in moments))
            assert length / (1 - training.betas[0]) == pytest.approx(clip, rel=1e-4)
    assert_within(1e-10, in_torch, in_jax)


@pytest.mark.parametrize("twin", [0, 1], ids=["torch", "jax"])
def test_word_vectors_take_the_step_of_sparse_adam(twin):
    """torch.optim.SparseAdam's, on the same gradients: words not in a batch stay as they are.

    So does word 0, which the padding of `distinct` names, where the batch has not got it. eps is
    too small to matter: torch.optim.Adam and optax add it to another number than SparseAdam.
    """
    training = TrainConfig(device="cpu", clip_norm=None, eps=1e-30)
    learner = learners(True, False, True, training)[twin]
    name = "vectors.weight"
    weight = torch.nn.Parameter(torch.from_numpy(learner.parameters()[name]))
    theirs = torch.optim.SparseAdam([weight], training.learning_rate, training.betas, training.eps)
    assert max(len(batch.distinct) - batch.num_distinct for batch in reviews(12)) > 0
    for number, read in enumerate(reviews(12)):
        there = np.arange(len(read.distinct)) < read.num_distinct
        shifted = np.where(there, read.distinct + number % 2, 0)
        batch = dataclasses.replace(read, distinct=shifted.astype(np.int32))
        rows = torch.from_numpy(batch.distinct[there]).long()
        gradient = torch.from_numpy(learner.gradients(batch)[1][name])
        assert torch.count_nonzero(gradient.abs().sum(1)) == len(rows)
        values = rows[None], gradient[rows], gradient.shape
        weight.grad = torch.sparse_coo_tensor(*values, check_invariants=True)
        theirs.step()
        before = learner.parameters()[name]
        learner.step(batch)
        others = np.setdiff1d(np.arange(len(before)), rows.numpy())
        np.testing.assert_array_equal(learner.parameters()[name][others], before[others])
    result = learner.optimizer_state()
    for ours, value in (
        (learner.parameters()[name], weight.detach()),
        (result[f"first_moment.{name}"], theirs.state[weight]["exp_avg"]),
        (result[f"second_moment.{name}"], theirs.state[weight]["exp_avg_sq"]),
    ):
        np.testing.assert_allclose(ours, value.numpy(), rtol=1e-9, atol=1e-13)
