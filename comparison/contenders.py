"""The contenders of `python compare.py speed`, one process per peer.

Each peer has its own process, because the threads of one, when they wait for work, slow the others
down. The process torch-default measures nn.GRU with PyTorch's default, which computes with denormal
numbers; the other processes flush them to zero, as XLA does.

In inference, single forward calls are timed. All contenders have the same batch of real reviews,
each with at least T words and truncated to T, so that there is no padding. They return the last
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

from common import kernels, oracle, params
from common.data import corpus, vectors
from common.data.batches import Batch, Batches
from common.report.schema import Task
from common.training.memory import keep_freed_memory
from common.training.options import TrainConfig
from comparison import peers
from comparison.implementations import BFLOAT16, Inference, Layer, Missing, converted

Run = Callable[[], object]
"""Does the work once, and returns when it is done."""
ENOUGH_SECONDS = 0.2  # of consecutive runs
# Absolute, for the last state; the other kind of reset differs by a hundred times as much.
TOLERANCE = 1e-4
# One unit in the last place of a bfloat16 below 1, for products or states in bfloat16.
BFLOAT16_TOLERANCE = 2**-8
# The minimum seconds and calls of a round of inference. The warm-up outlasts the effects of the
# previous process, whose threads spin for a while.
WARM_UP = 0.03, 3
TIMED = 0.1, 20


@dataclass(frozen=True)
class Contenders:
    """The contenders of a process, by name.

    training: from a task to a run, forward and backward. inference: called within the context
    `within`. tolerances: of the last states in inference, if not TOLERANCE.
    """

    training: Mapping[str, Callable[[Task], Run]]
    inference: Mapping[str, Inference]
    within: Callable[[], AbstractContextManager] = nullcontext
    tolerances: Mapping[str, float] = field(default_factory=dict)


here: list[Contenders] = []
"""The last entry has the contenders of this process."""


def start(process: str, device: str = "cpu") -> tuple[list[str], list[str]]:
    """Make this process one of peers.PROCESSES.

    Returns the names of its contenders on a device in training and in inference. Ctrl-C then ends
    the process silently.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    keep_freed_memory()  # as in training
    peer, _, variant = process.partition("-")
    contenders = peers.function(peer, "contenders")
    here.append(contenders(variant, device) if contenders else Contenders({}, {}))
    return [*here[-1].training], [*here[-1].inference]


@cache
def ready(name: str, task: Task, inference: bool = False) -> Run:
    """The compiled run of a contender on a task.

    Raises ArithmeticError if its last state in inference is wrong.
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
    """The duration of a contender's run on a task: the mean or, in inference, that of each call."""
    run = ready(name, task, inference)
    if not inference:
        return [seconds_of(run)]
    with here[-1].within():
        for duration, calls in (WARM_UP, TIMED):
            durations = _durations(run, duration, calls)
    return durations


def seconds_of(run: Run) -> float:
    """The mean duration of consecutive runs, as in training.

    The first run is excluded, because it starts with the caches of another contender.
    """
    durations = _durations(run, ENOUGH_SECONDS, 1)
    return float(np.mean(durations[1:] or durations))


def _durations(run: Run, duration: float, calls: int) -> list[float]:
    """The durations of consecutive runs, for this number of seconds and calls at least."""
    durations: list[float] = []
    end = time.perf_counter() + duration
    while len(durations) < calls or time.perf_counter() < end:
        started = time.perf_counter()
        run()
        durations.append(time.perf_counter() - started)
    return durations


@cache
def problem(task: Task) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The weights, x [T, B, D], and the oracle's last state."""
    batch, weights = batch_of(task.B, task.T, shortest=1), weights_of(task)
    x = word_vectors(task.input_size)[batch.distinct[batch.tokens]]
    return weights, x, oracle.forward(weights, x, batch.lengths, reset_after=True).h_last


@cache
def batch_of(B: int, T: int, shortest: float = 0.75) -> Batch:
    """IMDB reviews of at least `shortest` times T words, truncated to their last T.

    Every process has the same ones.
    """
    texts = corpus.load("imdb")
    counts = texts.train.counts()
    kept = np.where(counts >= vectors.RANDOM_MIN_COUNT, np.arange(len(counts)), -1)
    split = texts.train.renumber(kept)
    long_enough = np.flatnonzero(split.lengths >= shortest * T)
    rows = np.random.default_rng(T).choice(long_enough, B)
    rows = rows[np.argsort(-np.minimum(split.lengths[rows], T), kind="stable")]
    padded = Batches(split, B, max_length=T).batch(rows)
    steps = int(padded.lengths.max())
    distinct = padded.distinct[: int(padded.tokens.max()) + 1]
    return Batch(distinct, padded.tokens[:steps], padded.lengths, padded.labels, padded.reviews)


@cache
def word_vectors(input_size: int) -> np.ndarray:
    """Random vectors, because their values do not affect the speed."""
    size = len(corpus.load("imdb").vocabulary), input_size
    return np.random.default_rng(0).standard_normal(size, np.float32) * vectors.STANDARD_DEVIATION


def weights_of(task: Task) -> dict[str, np.ndarray]:
    """Canonical weights, without hidden biases, because flax.nnx has none for n."""
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

    learner_of: the framework's Learner. timed: as in comparison/peers/torch.py.
    """

    def run(name: str, layer: Layer, layout: str, task: Task) -> Run:
        is_own = layout == "canonical"
        batch, table = batch_of(task.B, task.T), word_vectors(task.input_size)
        if task.training:  # a step of the training loop, with Adam
            kind = {"implementation": name.split()[1]} if is_own else {"model": "nn.gru"}
            options = TrainConfig(hidden_size=task.H, clip_norm=None, **kind)  # type: ignore[arg-type]
            config = options.model_config(table.shape, classes=2, train_vectors=False)
            learner = learner_of(config, options, table)
            return lambda: float(learner.step(batch))
        weights = converted(layout, weights_of(task))
        if is_own:  # the twins take the distinct words, other layers every word
            layer = partial(layer, bfloat16=True) if task.bfloat16 else layer
            inputs = batch.distinct, batch.lengths, None, batch.tokens
            return timed(layer, weights, task.backward, table, *inputs)
        # Other layers have no products in bfloat16 with states in float32.
        dtype = BFLOAT16 if task.bfloat16 else np.float32
        weights = {name: weight.astype(dtype) for name, weight in weights.items()}
        h0 = np.zeros((1 + task.bidirectional, task.B, task.H), dtype)
        table, tokens = table.astype(dtype, copy=False), batch.distinct[batch.tokens]
        return timed(layer, weights, task.backward, table, None, batch.lengths, h0, tokens)

    return {name: partial(run, name, *pair) for name, pair in layers.items()}


def in_bfloat16(inference: Inference) -> Inference:
    """A twin's inference with products in bfloat16; raises Missing if the kernel lacks them."""

    def run(weights: Mapping[str, np.ndarray], x: np.ndarray) -> Run:
        if not kernels.bfloat16():
            raise Missing("the kernel has no bfloat16 products on this processor")
        return inference(weights, x)

    return run


def peak(framework: str) -> float:
    """Floating-point operations per second of a large float32 matrix product in a framework."""
    a = np.random.default_rng(0).standard_normal((2048, 2048), np.float32)

    def square(weights: Any, x: Any, lengths: Any, h0: Any, **_: Any) -> tuple[None, Any]:
        return None, x @ x

    timed: Any = peers.function(framework, "timed")
    product: Run = timed(square, {}, False, a, None, None, None, None)
    product()
    return 2 * 2048**3 / seconds_of(product)
