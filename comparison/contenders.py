"""What `python compare.py speed` times: every GRU that runs here, one process a framework.

    python -m comparison.contenders torch        (or torch-default, jax, keras-torch, keras-jax)

is such a process. It reads tasks, a JSON object a line, and answers each with the seconds that it
took; or, asked for "contenders", with their names. Frameworks are kept apart because the threads of
one, waiting for work, slow the other down. torch-default is nn.GRU as PyTorch has it unless told
otherwise: it computes with denormal numbers, which XLA takes for 0, and so does PyTorch here.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from common import params
from common.data import corpus, vectors
from common.data.batches import Batch, Batches
from common.training.memory import keep_freed_memory
from common.training.options import TrainConfig

Run = Callable[[], object]
"""Does the work once, and returns when it is done."""
PROCESSES = ("torch", "torch-default", "jax", "keras-torch", "keras-jax")
DIMENSION = 300
ENOUGH_SECONDS = 0.2  # of runs in a row
# How the kernel alone is called, in either framework.
ALONE: dict[str, Any] = {"reverse": [False], "reset_after": False, "return_sequences": False}


@dataclass(frozen=True)
class Task:
    """A batch of B reviews of at most T words through a GRU of H hidden units."""

    B: int
    T: int
    H: int
    bidirectional: bool = False
    backward: bool = True
    """Forward and backward (all gradients but that of the frozen vectors), or forward only."""
    training: bool = False
    """A whole training step of the classifier, with Adam."""
    recurrence: bool = False
    """The kernel alone: what the inputs' products are is given. Only for "fused"."""


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
def word_vectors() -> np.ndarray:
    """Random ones: what they hold does not matter to the time it takes."""
    size = len(corpus.load("imdb").vocabulary), DIMENSION
    return np.random.default_rng(0).standard_normal(size, np.float32) * vectors.STANDARD_DEVIATION


def weights_of(task: Task) -> dict[str, np.ndarray]:
    """Canonical parameters of the GRU, float32."""
    drawn = params.init_gru(DIMENSION, task.H, 1, task.bidirectional, seed=0)
    return {name: value.astype(np.float32) for name, value in drawn.items()}


def projections_of(task: Task) -> np.ndarray:
    """Products of the distinct inputs, [K, 3H] float32, random."""
    size = len(batch_of(task.B, task.T).distinct), 3 * task.H
    return np.random.default_rng(0).standard_normal(size, np.float32)


def torch_contenders() -> dict[str, Callable[[Task], Run]]:
    """Our implementations in PyTorch, and nn.GRU."""
    import torch
    from torch import nn
    from torch.nn.utils.rnn import pack_padded_sequence

    from torch_impl import fused
    from torch_impl.gru import CELL, gru

    def finish(task: Task, leaves: list[Any], last: Callable[[], Any]) -> Run:
        def run() -> None:
            with torch.set_grad_enabled(task.backward):
                h_last = last()
            if task.backward:
                torch.autograd.grad(h_last.sum(), leaves)

        return run

    def ours(implementation: str, task: Task) -> Run:
        if task.training:
            return training("torch", implementation, task)
        batch, table = batch_of(task.B, task.T), torch.from_numpy(word_vectors())
        weights = {n: torch.from_numpy(w).requires_grad_() for n, w in weights_of(task).items()}
        distinct, tokens, lengths = map(
            torch.from_numpy, (batch.distinct, batch.tokens, batch.lengths)
        )
        if task.recurrence:
            _, U, _, c = weights.values()
            a, h0 = torch.from_numpy(projections_of(task)), torch.zeros(1, task.B, task.H)
            alone = partial(fused.recur_all, [a], tokens, [U], [c], lengths, h0, **ALONE)
            return finish(task, [a.requires_grad_(), U, c], lambda: alone()[1])

        def last() -> Any:
            x = table[distinct]
            how: Any = {
                "tokens": tokens,
                "implementation": implementation,
                "return_sequences": False,
            }
            return gru(weights, x, lengths, **how)[1]

        return finish(task, list(weights.values()), last)

    def built_in(packed: bool, task: Task) -> Run:
        if task.training:
            return training("torch", "nn.GRU", task)
        batch, table = batch_of(task.B, task.T), torch.from_numpy(word_vectors())
        layer = nn.GRU(DIMENSION, task.H, bidirectional=task.bidirectional)
        ids, lengths = (
            torch.from_numpy(batch.distinct[batch.tokens]),
            torch.from_numpy(batch.lengths),
        )

        def last() -> Any:
            x = table[ids]
            return layer(pack_padded_sequence(x, lengths.to(torch.int64)) if packed else x)[1]

        return finish(task, list(layer.parameters()), last)

    found: dict[str, Callable[[Task], Run]] = {
        f"torch {name}": partial(ours, name) for name in CELL.implementations()
    }
    found |= {"nn.GRU padded": partial(built_in, False), "nn.GRU packed": partial(built_in, True)}
    return found


def jax_contenders() -> dict[str, Callable[[Task], Run]]:
    """Our implementations in JAX, Flax's two GRUCells under their RNN, and Equinox if installed."""
    import jax
    import jax.numpy as jnp
    from flax import linen, nnx

    from jax_impl import fused
    from jax_impl.gru import CELL, gru

    def finish(task: Task, weights: Any, last: Callable[..., Any], *arrays: Any) -> Run:
        """last(weights, *arrays) -> h_last, compiled, with its gradient if that is asked for."""
        if task.backward:
            compiled = jax.jit(jax.grad(lambda weights, *arrays: last(weights, *arrays).sum()))
        else:
            compiled = jax.jit(last)
        return lambda: jax.block_until_ready(compiled(weights, *arrays))

    def ours(implementation: str, task: Task) -> Run:
        if task.training:
            return training("jax", implementation, task)
        batch = batch_of(task.B, task.T)
        if task.recurrence:
            _, U, _, c = weights_of(task).values()
            h0 = jnp.zeros((1, task.B, task.H))

            def h_last(weights: Any, tokens: Any, lengths: Any) -> Any:
                a, U, c = weights
                return fused.recur_all([a], tokens, [U], [c], lengths, h0, **ALONE)[1]

            given = jax.device_put([projections_of(task), U, c])
            return finish(task, given, h_last, *jax.device_put((batch.tokens, batch.lengths)))

        def last(weights: Any, table: Any, distinct: Any, tokens: Any, lengths: Any) -> Any:
            how = {"tokens": tokens, "implementation": implementation, "return_sequences": False}
            return gru(weights, table[distinct], lengths, **how)[1]

        arrays = (word_vectors(), batch.distinct, batch.tokens, batch.lengths)
        return finish(task, jax.device_put(weights_of(task)), last, *jax.device_put(arrays))

    def flax_rnn(make: Callable[[Task], tuple[Any, Callable[..., Any]]], task: Task) -> Run:
        batch = batch_of(task.B, task.T)
        weights, rnn = make(task)

        def last(weights: Any, table: Any, ids: Any, lengths: Any) -> Any:
            return jnp.stack([rnn(each, table[ids], lengths, i) for i, each in enumerate(weights)])

        arrays = (word_vectors(), batch.distinct[batch.tokens], batch.lengths)
        return finish(task, weights, last, *jax.device_put(arrays))

    def linen_rnn(task: Task) -> tuple[Any, Callable[..., Any]]:
        def module(reverse: int) -> linen.RNN:
            cell = linen.GRUCell(task.H)
            return linen.RNN(cell, time_major=True, return_carry=True, reverse=bool(reverse))

        x = jnp.zeros((2, 1, DIMENSION))
        weights = [module(i).init(jax.random.key(i), x) for i in range(1 + task.bidirectional)]
        return weights, lambda w, x, lengths, i: module(i).apply(w, x, seq_lengths=lengths)[0]

    def nnx_rnn(task: Task) -> tuple[Any, Callable[..., Any]]:
        cells = [nnx.GRUCell(DIMENSION, task.H, rngs=nnx.Rngs(i)) for i in (0, 1)]
        split = [nnx.split(cell, nnx.Param, ...) for cell in cells[: 1 + task.bidirectional]]

        def rnn(weights: Any, x: Any, lengths: Any, i: int) -> Any:
            graph, _, *others = split[i]
            scan = nnx.RNN(
                nnx.merge(graph, weights, *others),
                time_major=True,
                return_carry=True,
                reverse=bool(i),
            )
            return scan(x, seq_lengths=lengths)[0]

        return [weights for _, weights, *_ in split], rnn

    found: dict[str, Callable[[Task], Run]] = {
        f"jax {name}": partial(ours, name) for name in CELL.implementations()
    }
    found["flax.linen RNN"] = partial(flax_rnn, linen_rnn)
    found["flax.nnx RNN"] = partial(flax_rnn, nnx_rnn)
    try:
        import equinox as eqx
    except ImportError:
        return found

    def equinox_scan(task: Task) -> tuple[Any, Callable[..., Any]]:
        keys = [jax.random.key(i) for i in range(1 + task.bidirectional)]
        cells = [eqx.nn.GRUCell(DIMENSION, task.H, key=key) for key in keys]

        def rnn(cell: Any, x: Any, lengths: Any, i: int) -> Any:
            def step(h: Any, x_t: Any) -> tuple[Any, None]:
                t, x = x_t
                return jnp.where((t < lengths)[:, None], jax.vmap(cell)(x, h), h), None

            steps = (jnp.arange(len(x)), x)
            h0 = jnp.zeros((x.shape[1], task.H))
            return jax.lax.scan(step, h0, steps, reverse=bool(i))[0]

        return cells, rnn

    found["Equinox scan"] = partial(flax_rnn, equinox_scan)
    return found


def keras_contenders(backend: str) -> dict[str, Callable[[Task], Run]]:
    """keras.layers.GRU on one backend, with the padding masked, as Keras users write it."""
    os.environ["KERAS_BACKEND"] = backend
    import keras

    def contender(task: Task) -> Run:
        batch = batch_of(task.B, task.T)
        layer = keras.layers.GRU(task.H)
        if task.bidirectional:
            layer = keras.layers.Bidirectional(layer)
        mask = np.arange(len(batch.tokens)) < batch.lengths[:, None]
        ids, table = batch.distinct[batch.tokens].T, word_vectors()
        layer.build((task.B, len(batch.tokens), DIMENSION))
        if backend == "torch":
            import torch

            x, words = torch.from_numpy(table)[torch.from_numpy(ids)], torch.from_numpy(mask)
            leaves = [variable.value for variable in layer.trainable_variables]

            def run() -> None:
                with torch.set_grad_enabled(task.backward):
                    h_last = layer(x, mask=words)
                if task.backward:
                    torch.autograd.grad(h_last.sum(), leaves)

            return run
        import jax

        def last(weights: Any, fixed: Any, x: Any, words: Any) -> Any:
            return layer.stateless_call(weights, fixed, x, mask=words)[0]

        if task.backward:
            compiled = jax.jit(jax.grad(lambda weights, *rest: last(weights, *rest).sum()))
        else:
            compiled = jax.jit(last)
        weights = [variable.value for variable in layer.trainable_variables]
        fixed = [variable.value for variable in layer.non_trainable_variables]
        arrays = jax.device_put((table[ids], mask))
        return lambda: jax.block_until_ready(compiled(weights, fixed, *arrays))

    return {f"Keras on {backend}": contender}


def training(framework: str, implementation: str, task: Task) -> Run:
    """A step of the classifier's training, with Adam, as the training loop takes it."""
    from importlib import import_module

    learner_of = import_module(f"{framework}_impl.learner").Learner
    built_in = implementation == "nn.GRU"
    options = TrainConfig(
        model="nn.gru" if built_in else "gru",
        hidden_size=task.H,
        implementation="auto" if built_in else implementation,
        clip_norm=None,
    )
    table = word_vectors()
    config = options.model_config(
        input_size=DIMENSION, classes=2, vocabulary_size=len(table), train_vectors=False
    )
    learner, batch = learner_of(config, options, table), batch_of(task.B, task.T)
    return lambda: float(learner.step(batch))


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


def main(process: str) -> None:
    """Answer tasks from standard input until it ends."""
    keep_freed_memory()  # as in training
    if process in ("torch", "keras-torch"):
        import torch

        torch.set_flush_denormal(True)  # as XLA does: on Intel, nn.GRU is seven times as fast so
    if process.startswith("keras"):
        found = keras_contenders(process.partition("-")[2])
    elif process == "torch-default":
        ours = torch_contenders()
        found = {f"{n}, denormals": ours[n] for n in ours if n.startswith("nn.GRU")}
    else:
        found = {"torch": torch_contenders, "jax": jax_contenders}[process]()
    runs: dict[tuple[str, str], Run] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if asked == "contenders":
            answer: object = list(found)
        elif asked == "peak":
            answer = peak(process)
        elif asked == "forget":
            runs.clear()
            answer = None
        else:
            name, task = asked["contender"], Task(**asked["task"])
            key = (name, json.dumps(asdict(task)))
            if key not in runs:
                runs[key] = found[name](task)
                runs[key]()  # compiles
            answer = seconds_of(runs[key])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
