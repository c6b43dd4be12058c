"""What `python compare.py speed` times: every GRU that runs here, one process a peer.

Peers are kept apart because the threads of one, waiting for work, slow the other down. The process
torch-default is nn.GRU as PyTorch has it unless told otherwise: it computes with denormal numbers,
which XLA takes for 0, and so does PyTorch in the others.

In inference, single calls forward are timed. All contenders read the same reviews of real words,
every one at least T words long and cut to T, so that there is no padding, and return the last
state, which is compared with the oracle's before it is timed.
"""

import signal
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np

from common import oracle, params
from common.data import corpus, vectors
from common.data.batches import Batch, Batches
from common.report.schema import Task
from common.training.memory import keep_freed_memory
from common.training.options import TrainConfig
from comparison import peers
from comparison.implementations import BFLOAT16, Inference, Layer, converted

Run = Callable[[], object]
"""Does the work once, and returns when it is done."""
ENOUGH_SECONDS = 0.2  # of runs in a row
# Of the last state, absolute; another kind of reset is a hundred times as far off.
TOLERANCE = 1e-4
# In a round of inference, at least so many seconds and calls. What another process has left behind
# (its threads spin for a while) is over after the first.
WARM_UP = 0.03, 3
TIMED = 0.1, 20


@dataclass(frozen=True)
class Contenders:
    """What is timed in a process, by name.

    training: a contender at a task, forward and backward. inference: called within the context
    `within`. tolerances: how far a last state in inference may be off, if not by TOLERANCE.
    """

    training: Mapping[str, Callable[[Task], Run]]
    inference: Mapping[str, Inference]
    within: Callable[[], AbstractContextManager] = nullcontext
    tolerances: Mapping[str, float] = field(default_factory=dict)


here: list[Contenders] = []
"""The last one is what this process times."""


def start(process: str, device: str = "cpu") -> tuple[list[str], list[str]]:
    """Make this process one of peers.PROCESSES; returns what it can time in training on a device,
    and what in inference.

    The process exits silently at Ctrl-C.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    keep_freed_memory()  # as in training
    peer, _, variant = process.partition("-")
    contenders = peers.function(peer, "contenders")
    here.append(contenders(variant, device) if contenders else Contenders({}, {}))
    return [*here[-1].training], [*here[-1].inference]


@cache
def ready(name: str, task: Task, inference: bool = False) -> Run:
    """A contender at a task, compiled.

    Raises ArithmeticError where its last state in inference is wrong.
    """
    process = here[-1]
    if not inference:
        run = process.training[name](task)
        run()
        return run
    weights, x, expected = problem(task)
    with process.within():
        run = process.inference[name](weights, x)
        error = np.abs(np.asarray(run()).reshape(expected.shape) - expected).max()
    if not error <= process.tolerances.get(name, TOLERANCE):
        raise ArithmeticError(f"{name}, {task.name}: the last state is off by {error:.1e}")
    return run


def seconds(name: str, task: Task, inference: bool = False) -> list[float]:
    """How long a contender takes for a task: one figure; in inference that of each call."""
    run = ready(name, task, inference)
    if not inference:
        return [seconds_of(run)]
    with here[-1].within():
        for enough, calls in (WARM_UP, TIMED):
            durations: list[float] = []
            end = time.perf_counter() + enough
            while len(durations) < calls or time.perf_counter() < end:
                started = time.perf_counter()
                run()
                durations.append(time.perf_counter() - started)
    return durations


@cache
def problem(task: Task) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The weights, x [T, B, D] and the last state that the oracle computes from them."""
    batch, weights = batch_of(task.B, task.T, shortest=1), weights_of(task)
    x = word_vectors(task.input_size)[batch.distinct[batch.tokens]]
    return weights, x, oracle.forward(weights, x, batch.lengths, reset_after=True).h_last


@cache
def batch_of(B: int, T: int, shortest: float = 0.75) -> Batch:
    """Real IMDB reviews of about T words, cut to their last T; the same in every process.

    shortest: that of which they have at least.
    """
    texts = corpus.load("imdb")
    counts = texts.train.counts()
    kept = np.where(counts >= vectors.RANDOM_MIN_COUNT, np.arange(len(counts)), -1)
    split = texts.train.renumber(kept)
    long_enough = np.flatnonzero(split.lengths >= shortest * T)
    rows = np.random.default_rng(T).choice(long_enough, B)
    rows = rows[np.argsort(-np.minimum(split.lengths[rows], T), kind="stable")]
    found = Batches(split, B, max_length=T).batch(rows)
    steps = int(found.lengths.max())
    distinct = found.distinct[: int(found.tokens.max()) + 1]
    return Batch(distinct, found.tokens[:steps], found.lengths, found.labels, found.reviews)


@cache
def word_vectors(input_size: int) -> np.ndarray:
    """Random ones: what they hold does not matter to the time it takes."""
    size = len(corpus.load("imdb").vocabulary), input_size
    return np.random.default_rng(0).standard_normal(size, np.float32) * vectors.STANDARD_DEVIATION


def weights_of(task: Task) -> dict[str, np.ndarray]:
    """Canonical ones; flax.nnx has no hidden bias for n, so it is zero for all."""
    config = params.ModelConfig(task.input_size, task.H, bidirectional=task.bidirectional)
    return {
        name: (0 if name.endswith("bias_hh") else 1) * value.astype(np.float32)
        for name, value in params.init(config, 0, np.zeros(0)).items()
    }


def training_of(
    learner_of: Callable[..., Any],
    layers: Mapping[str, tuple[Layer, str]],
    timed: Callable[..., Run],
) -> dict[str, Callable[[Task], Run]]:
    """Layers of a framework as contenders, from each layer and the layout of its weights.

    learner_of: the framework's Learner. timed: runs a layer, as comparison/peers/torch.py does.
    """

    def run(name: str, layer: Layer, layout: str, task: Task) -> Run:
        is_own = layout == "canonical"
        batch, table = batch_of(task.B, task.T), word_vectors(task.input_size)
        if task.training:  # a step with Adam, as the training loop takes it
            kind: dict[str, Any] = (
                {"implementation": name.split()[1]} if is_own else {"model": "nn.gru"}
            )
            options = TrainConfig(hidden_size=task.H, clip_norm=None, **kind)
            config = options.model_config(table.shape, classes=2, train_vectors=False)
            learner = learner_of(config, options, table)
            return lambda: float(learner.step(batch))
        weights = converted(layout, weights_of(task))
        if is_own:  # ours read the distinct words, others look each one up
            layer = partial(layer, bfloat16=True) if task.bfloat16 else layer
            places = batch.distinct, batch.lengths, None, batch.tokens
            return timed(layer, weights, task.backward, table, *places)
        # With no other way to bfloat16, all of its numbers are.
        dtype = BFLOAT16 if task.bfloat16 else np.float32
        weights = {name: weight.astype(dtype) for name, weight in weights.items()}
        h0 = np.zeros((1 + task.bidirectional, task.B, task.H), dtype)
        rest = None, batch.lengths, h0, batch.distinct[batch.tokens]
        return timed(layer, weights, task.backward, table.astype(dtype, copy=False), *rest)

    return {name: partial(run, name, *pair) for name, pair in layers.items()}


def seconds_of(run: Run) -> float:
    """How long a run takes in a row of runs, as in training, where one follows the other.

    The first finds the caches and the memory as another contender has left them.
    """
    durations: list[float] = []
    while sum(durations) < ENOUGH_SECONDS:
        started = time.perf_counter()
        run()
        durations.append(time.perf_counter() - started)
    return float(np.mean(durations[1:] or durations))


def peak(framework: str) -> float:
    """Floating-point operations a second of a large float32 matrix product, in PyTorch or JAX."""
    a = np.random.default_rng(0).standard_normal((2048, 2048), np.float32)

    def square(weights: Any, x: Any, lengths: Any, h0: Any, **_: Any) -> tuple[None, Any]:
        return None, x @ x

    timed: Any = peers.function(framework, "timed")
    product: Run = timed(square, {}, False, a, None, None, None, None)
    product()
    return 2 * 2048**3 / seconds_of(product)
