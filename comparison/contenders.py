"""What `python compare.py speed` times: every GRU that runs here, one process a framework.

Frameworks are kept apart because the threads of one, waiting for work, slow the other down. The
process torch-default is nn.GRU as PyTorch has it unless told otherwise: it computes with denormal
numbers, which XLA takes for 0, and so does PyTorch in the others.
"""

import os
import signal
import time
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from common import params
from common.data import corpus, vectors
from common.data.batches import Batch, Batches
from common.report.schema import Task
from common.training.memory import keep_freed_memory
from common.training.options import TrainConfig
from comparison.implementations import converted

Run = Callable[[], object]
"""Does the work once, and returns when it is done."""
Contender = Callable[[Task], Run]
PROCESSES = ("torch", "torch-default", "jax", "keras-torch", "keras-jax")
ENOUGH_SECONDS = 0.2  # of runs in a row

# Of this process: what it can time, and what it has made ready to be timed.
_contenders: dict[str, Contender] = {}
_runs: dict[tuple[str, Task], Run] = {}


def start(process: str) -> None:
    """Make this process one of PROCESSES; it ends without a word at Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    keep_freed_memory()  # as in training
    if process in ("torch", "keras-torch"):
        import torch

        torch.set_flush_denormal(True)  # as XLA does: on Intel, nn.GRU is seven times as fast so
    if process.startswith("keras"):
        found = keras_contenders(process.partition("-")[2])
    elif process == "torch-default":
        there = torch_contenders()
        found = {f"{n}, denormals": there[n] for n in there if n.startswith("nn.GRU")}
    else:
        found = {"torch": torch_contenders, "jax": jax_contenders}[process]()
    _contenders.update(found)


def names() -> list[str]:
    """What this process can time."""
    return list(_contenders)


def seconds(name: str, task: Task) -> float:
    """How long a contender takes for a task."""
    if (name, task) not in _runs:
        _runs[name, task] = _contenders[name](task)
        _runs[name, task]()  # compiles
    return seconds_of(_runs[name, task])


def forget() -> None:
    """Free what was made ready."""
    _runs.clear()


@cache
def batch_of(B: int, T: int) -> Batch:
    """Real IMDB reviews of about T words, cut to their last T; the same in every process."""
    texts = corpus.load("imdb")
    counts = texts.train.counts()
    split = texts.train.renumber(
        np.where(counts >= vectors.RANDOM_MIN_COUNT, np.arange(len(counts)), -1)
    )
    long_enough = np.flatnonzero(split.lengths >= 0.75 * T)
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


def weights_of(task: Task, layout: str) -> dict[str, np.ndarray]:
    """Weights of the GRU in a layout of common.convert, float32."""
    config = params.ModelConfig(task.input_size, task.H, bidirectional=task.bidirectional)
    drawn = {
        # flax.nnx has no hidden bias for n, so it is zero for all.
        name: (0 if name.endswith("bias_hh") else 1) * value.astype(np.float32)
        for name, value in params.init(config, 0, np.zeros(0)).items()
    }
    if layout == "canonical":
        return {name: value for name, value in drawn.items() if not name.startswith("head.")}
    return converted(layout, drawn)


def contender(timed: Callable[..., Run], layer: Any, layout: str, task: Task) -> Run:
    """A layer on the task. Ours read the distinct words, others look each one up."""
    batch, table = batch_of(task.B, task.T), word_vectors(task.input_size)
    how = layer, weights_of(task, layout), task.backward
    if layout == "canonical":
        return timed(*how, table, batch.distinct, batch.lengths, None, batch.tokens)
    h0 = np.zeros((1 + task.bidirectional, task.B, task.H), np.float32)
    return timed(*how, table, None, batch.lengths, h0, batch.distinct[batch.tokens])


def ours(framework: str, timed: Callable[..., Run], implementation: str, task: Task) -> Run:
    """A layer of ours, or a step of the classifier's training."""
    if task.training:
        return training(framework, task, implementation=implementation)
    gru = import_module(f"{framework}_impl.gru").gru
    return contender(timed, partial(gru, implementation=implementation), "canonical", task)


def training(framework: str, task: Task, **how: Any) -> Run:
    """A step of the classifier's training, with Adam, as the training loop takes it."""
    learner_of = import_module(f"{framework}_impl.learner").Learner
    options = TrainConfig(hidden_size=task.H, clip_norm=None, **how)
    table = word_vectors(task.input_size)
    config = options.model_config(table.shape, classes=2, train_vectors=False)
    learner, batch = learner_of(config, options, table), batch_of(task.B, task.T)
    return lambda: float(learner.step(batch))


def torch_contenders() -> dict[str, Contender]:
    """Our implementations in PyTorch, and nn.GRU."""
    from comparison.torch_layers import OURS, nn_gru, timed

    def built_in(packed: bool, task: Task) -> Run:
        if task.training:
            return training("torch", task, model="nn.gru")
        return contender(timed, partial(nn_gru, packed=packed), "torch", task)

    found: dict[str, Contender] = {
        f"torch {name}": partial(ours, "torch", timed, name) for name in OURS
    }
    found |= {"nn.GRU padded": partial(built_in, False), "nn.GRU packed": partial(built_in, True)}
    return found


def jax_contenders() -> dict[str, Contender]:
    """Our implementations in JAX, Flax's two GRUCells under their RNN, and Equinox if installed."""
    from comparison.jax_layers import OURS, equinox_gru, linen_gru, nnx_gru, timed

    found: dict[str, Contender] = {
        f"jax {name}": partial(ours, "jax", timed, name) for name in OURS
    }
    found["flax.linen RNN"] = partial(contender, timed, linen_gru, "linen")
    found["flax.nnx RNN"] = partial(contender, timed, nnx_gru, "nnx")
    if find_spec("equinox"):
        found["Equinox scan"] = partial(contender, timed, equinox_gru, "equinox")
    return found


def keras_contenders(backend: str) -> dict[str, Contender]:
    """keras.layers.GRU on one backend, with the padding masked, as Keras users write it."""
    os.environ["KERAS_BACKEND"] = backend
    import keras

    timed = import_module(f"comparison.{backend}_layers").timed

    def contender(task: Task) -> Run:
        batch = batch_of(task.B, task.T)
        steps = len(batch.tokens)
        layer = keras.layers.GRU(task.H)
        if task.bidirectional:
            layer = keras.layers.Bidirectional(layer)
        layer.build((task.B, steps, task.input_size))
        trained = layer.trainable_variables
        fixed = [variable.value for variable in layer.non_trainable_variables]

        def last(weights: Any, x: Any, lengths: Any, h0: Any, **_: Any) -> Any:
            words = keras.ops.arange(steps) < keras.ops.expand_dims(lengths, 1)
            named = [weights[variable.path] for variable in trained]
            return None, layer.stateless_call(named, fixed, x, mask=words)[0]

        weights = {v.path: keras.ops.convert_to_numpy(v) for v in trained}
        x = word_vectors(task.input_size)[batch.distinct[batch.tokens].T]
        return timed(last, weights, task.backward, x, None, batch.lengths, None, None)

    return {f"Keras on {backend}": contender}


def seconds_of(run: Run) -> float:
    """How long a run takes in a row of runs, as in training, where one follows the other.

    The first finds the caches and the memory as another contender has left them.
    """
    durations: list[float] = []
    while sum(durations) < ENOUGH_SECONDS:
        started = time.perf_counter()
        run()
        durations.append(time.perf_counter() - started)
    return sum(durations[1:]) / len(durations[1:]) if durations[1:] else durations[0]


def peak(process: str) -> float:
    """Floating-point operations a second of a large float32 matrix product, in PyTorch or JAX."""
    a = np.random.default_rng(0).standard_normal((2048, 2048), np.float32)
    if process == "torch":
        import torch

        product: Run = partial(torch.mm, *[torch.from_numpy(a)] * 2)
    else:
        import jax

        multiply = jax.jit(lambda a: a @ a).lower(a).compile()
        product = partial(lambda a: multiply(a).block_until_ready(), jax.device_put(a))
    product()
    return 2 * 2048**3 / seconds_of(product)
