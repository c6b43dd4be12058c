"""The parity checks: every implementation against the float64 oracle, tensor by tensor.

`python compare.py parity` and tests/parity run them.

The bounds are argued, not tuned. The error of a tensor is the largest difference from the oracle,
relative to the oracle's largest value.

float64: at most 1e-12 in results and 1e-11 in gradients. An operation rounds by 1.1e-16, so three
    orders of magnitude are left for the sums over time steps and rows. Every fault in a formula,
    and every float32 intermediate result, is far above.
float32: at most twice the larger error of two yardsticks on the same draws, plus one unit in the
    last place (ULP) of the largest value. The first yardstick is the trusted implementation,
    PyTorch's nn.GRU or, for functions that nn.GRU lacks (the reset before the product, sequences
    that begin within a row), the plain loop of tensor operations, torch_impl's "loop". The tanh RNN
    in JAX is compared with Flax's, which has the same tanh: XLA's float32 tanh has an error of
    several ULP, PyTorch's of less than one, and nothing in this cell damps it. The second, and the
    only yardstick of the loop itself, is NumPy, which computes the equations in float32 and adds up
    gradients one by one, as XLA does; PyTorch adds up pairs.
bfloat16: both twins compute in float32 and round once, so the bound is half a ULP of a bfloat16 of
    the largest value, plus the bound of float32 for the same numbers. Only the GRU is checked, its
    results and its gradients without the classifier's head, which rounds at every operation.

The bounds apply to the implementations of this project. The rounding of a peer, a layer of another
library, depends on the versions of its library and of XLA: its errors are reported with the bound,
and fail only above PEER_BOUNDS times the bound, which rounding cannot explain.

The largest of a few rounding errors is random, and a tensor may have a single entry. Therefore each
float32 case is drawn several times, and the draws of a tensor count as one tensor. The error of the
yardstick is random, too: on the draw where errors grow most, it may happen to cancel. Therefore the
yardsticks also compute neighbours of each draw, which differ from it by millionths: errors grow as
in the draw, but all roundings differ. docs/parity.md has measurements.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice

import numpy as np
from numpy.typing import DTypeLike

from common import oracle
from common.data import corpus
from common.data.batches import Batches, Shape
from common.params import ModelConfig, shapes
from common.report.schema import Check
from comparison import peers
from comparison.implementations import BFLOAT16, EVERY, Case, Implementation, Result, equations
from comparison.peers.jax import flax_simple_cell, jax_cell
from comparison.peers.torch import CELLS, NN_GRU, one_thread, torch_cell

BOUND_RESULT, BOUND_GRADIENT = 1e-12, 1e-11
DRAWS, NEIGHBOURS = 8, 4
# The quantities, each a row of the table, and the prefixes of the names of their tensors.
QUANTITIES = {
    "outputs": ("outputs",),
    "last states": ("h_last",),
    "loss": ("loss", "logits"),
    "d x": ("d x",),
    "d h0": ("d h0", "d h_reset"),
    "d params": (*(f"d {cell}." for cell in oracle.CELLS), "d head."),
}

LOOPS = {name: torch_cell(next(iter(CELLS[name].recurrences)), name) for name in oracle.CELLS}
OTHERS = [name for name in oracle.CELLS if name != "gru"]
JAX_RNN, SIMPLE_CELL = jax_cell("auto", "rnn"), flax_simple_cell()
NUMPY = Implementation("NumPy", lambda case: equations(case, case.x.dtype))  # rounding alone


def implementations() -> list[Implementation]:
    """All implementations on this machine."""
    functions = (peers.function(name, "implementations") for name in peers.INSTALLED)
    return [each for function in functions if function for each in function()]


@dataclass(frozen=True)
class Size:
    """The sizes of a random case; the number of lengths is the number of rows."""

    name: str
    T: int
    D: int
    H: int
    layers: int
    directions: int
    lengths: Sequence[int]
    h0: bool = True
    distinct: int | None = None
    """If given, the number of distinct inputs, which tokens index."""
    cell: str = "gru"
    resets: bool = False
    """Whether sequences begin within rows, at a quarter of the steps; with h0, from h_reset."""


SIZES = (
    Size("one word", 1, 3, 1, 1, 1, [1]),
    Size("one row", 12, 6, 10, 1, 2, [9], h0=False),
    Size("no step", 0, 4, 3, 1, 2, [0, 0, 0]),
    Size("ties, zeros, unsorted", 9, 5, 7, 2, 2, [3, 9, 0, 3, 0, 9]),
    Size("three layers", 6, 4, 5, 3, 1, [6, 1, 4]),
    Size("distinct tokens", 11, 8, 16, 1, 2, [11, 11, 7, 2, 0], h0=False, distinct=13),
    Size("long", 80, 16, 32, 1, 1, [80, 79, 40, 1]),
)
RESETS = (
    Size("resets", 13, 5, 7, 2, 2, [13, 9, 0, 13, 2], resets=True),
    Size("resets, distinct tokens", 13, 5, 7, 1, 2, [9, 13, 1], False, 11, resets=True),
)


def draw(size: Size, reset_after: bool, seed: int = 0) -> Case:
    """A random case in which all parameters differ from zero and from each other.

    Therefore every swap, wrong sign and missing bias changes the result.
    """
    rng = np.random.default_rng(seed)
    B, R = len(size.lengths), size.directions
    config = ModelConfig(size.D, size.H, size.layers, R == 2, classes=3, cell=size.cell)
    parameters = {
        name: rng.uniform(0.2, 1, shape) * rng.choice([-1, 1], shape) / np.sqrt(size.H)
        for name, shape in shapes(config).items()
    }
    x = rng.standard_normal((size.T, B, size.D))
    tokens = None
    if size.distinct is not None:
        x = rng.standard_normal((size.distinct, size.D))
        tokens = rng.integers(0, size.distinct, (size.T, B))
    states = (size.layers * R, B, size.H)
    return Case(
        name=size.name,
        reset_after=reset_after,
        parameters=parameters,
        x=x,
        lengths=np.array(size.lengths),
        h0=rng.standard_normal(states) if size.h0 else None,
        labels=rng.integers(0, config.classes, B),
        d_outputs=rng.standard_normal((size.T, B, size.H * R)),
        d_h_last=rng.standard_normal(states),
        tokens=tokens,
        resets=rng.random((size.T, B)) < 1 / 4 if size.resets else None,
        h_reset=rng.standard_normal(states) if size.resets and size.h0 else None,
    )


def real(reset_after: bool) -> tuple[Case, ...]:
    """Batches of IMDB reviews, as in training, with random vectors of the words."""
    corpus_ = corpus.load("imdb")
    batches = Batches(corpus_.train.subset(256), 8, max_length=40, shapes=[Shape(40, 320)])
    size = Size("real reviews", 40, 16, 16, 1, 2, [0] * 8)
    vectors = np.random.default_rng(0).standard_normal((len(corpus_.vocabulary), size.D))
    return tuple(
        replace(
            draw(size, reset_after, seed),
            x=vectors[batch.distinct],
            tokens=batch.tokens,
            lengths=batch.lengths,
            labels=batch.labels.astype(np.int64),  # for PyTorch's cross-entropy
        )
        for seed, batch in enumerate(islice(batches.epoch(), DRAWS))
    )


def without_hidden_bias(case: Case) -> Case:
    """The case with a hidden bias of zero for n, for a layout that has none."""
    parameters = dict(case.parameters)
    for name, value in parameters.items():
        if name.endswith("bias_hh"):
            parameters[name] = np.concatenate([*np.split(value, 3)[:2], np.zeros(len(value) // 3)])
    return replace(case, name=f"{case.name}, no hidden bias of n", parameters=parameters)


# The results are cached, because the caches below identify cases by identity.
@lru_cache(maxsize=2 * DRAWS)
def without_head(case: Case) -> Case:
    """The case with a head of zeros, which adds nothing to the gradients."""
    head = {n: 0 * p for n, p in case.parameters.items() if n.startswith("head.")}
    return replace(case, parameters=case.parameters | head)


@lru_cache(maxsize=2 * DRAWS)
def _through_bfloat16(case: Case) -> Case:
    """The case rounded to bfloat16, in float32."""
    return case.astype(BFLOAT16).astype(np.float32)


@lru_cache(maxsize=2 * DRAWS)
def neighbours(case: Case) -> tuple[Case, ...]:
    """The case, and cases whose numbers differ from its numbers by at most a millionth."""
    rng = np.random.default_rng(0)
    others = (
        case.map(lambda array: array * (1 + rng.uniform(-1e-6, 1e-6, array.shape)))
        for _ in range(NEIGHBOURS - 1)
    )
    return case, *others


def cases() -> list[tuple[Case, ...]]:
    """Draws of every size and real reviews, with both kinds of reset, a case without c_n, and some
    sizes of every other cell."""

    def draws(sizes: Iterable[Size], reset_after: bool) -> list[tuple[Case, ...]]:
        return [tuple(draw(size, reset_after, seed) for seed in range(DRAWS)) for size in sizes]

    after = draws(SIZES + RESETS, True)
    without = tuple(map(without_hidden_bias, after[3]))
    plain = draws((replace(size, cell=cell) for cell in OTHERS for size in SIZES[2:]), False)
    return [*draws(SIZES + RESETS, False), *after, without, real(False), real(True), *plain]


def check(implementation: Implementation, draws: tuple[Case, ...], dtype: DTypeLike) -> list[Check]:
    """Compare an implementation in dtype with the oracle on draws of a case.

    Returns a row for each result and gradient, with its name in "check". A missing tensor, a wrong
    shape and NaN fail.
    """
    dtype = np.dtype(dtype)
    loop = LOOPS[draws[0].cell]
    yardsticks = [NUMPY]
    if draws[0].reset_after and NN_GRU.can(draws[0], "float32"):
        yardsticks.append(NN_GRU)
    elif implementation.name == JAX_RNN.name:
        yardsticks.append(SIMPLE_CELL)
    elif implementation.name != loop.name:
        yardsticks.append(loop)
    measured = draws
    if dtype == np.float64:  # a fixed bound needs no draws
        draws = draws[:1]
    elif dtype == BFLOAT16:
        draws = tuple(map(without_head, draws))
        measured = tuple(map(_through_bfloat16, draws))
    measured = tuple(chain.from_iterable(map(neighbours, measured)))
    rows: list[Check] = []
    for name, (error, ulp) in _errors(implementation, draws, dtype).items():
        if dtype == BFLOAT16 and name.startswith(("logits", "loss", "d head.")):
            continue
        if dtype == np.float64:
            bound = BOUND_GRADIENT if name.startswith("d ") else BOUND_RESULT
        else:
            allowed, ulp_allowed = max(
                _errors(yardstick, measured, np.dtype(np.float32))[name] for yardstick in yardsticks
            )
            bound = 2 * allowed + ulp_allowed + (ulp / 2 if dtype == BFLOAT16 else 0)
        models = [implementation.name, "oracle"]
        rows.append(Check.of(models, name, dtype.name, error, bound, ulp, implementation.peer))
    return rows


@one_thread()
def run(
    chosen: Sequence[Implementation] | None = None,
    problems: Iterable[tuple[Case, ...]] | None = None,
) -> list[Check]:
    """Check implementations (default: all) on every problem (default: `cases`) that they support.

    Returns a row for each implementation, kind of reset, dtype and quantity (see `QUANTITIES`):
    that of the tensor with the largest error relative to its bound. "check" is "QUANTITY, reset
    before", "… after" or, for a cell without a reset gate, "… none".
    """
    chosen = implementations() if chosen is None else chosen
    worst: dict[tuple[str, str, str], Check] = {}
    for draws in cases() if problems is None else problems:
        kind = "reset after" if draws[0].reset_after else "reset before"
        kind = kind if CELLS[draws[0].cell].spec.reset_gate else "reset none"
        for dtype in EVERY:
            for implementation in (each for each in chosen if each.can(draws[0], dtype)):
                for row in check(implementation, draws, dtype):
                    quantity = next(q for q, p in QUANTITIES.items() if row.check.startswith(p))
                    row.check = f"{quantity}, {kind}"
                    key = (implementation.name, row.check, row.dtype)
                    if key not in worst or row.strain > worst[key].strain:
                        worst[key] = row
    return list(worst.values())


# The implementations share the errors of the yardsticks and the results of the oracle.
@lru_cache(maxsize=16)
def _errors(
    implementation: Implementation, draws: tuple[Case, ...], dtype: np.dtype
) -> dict[str, tuple[float, float]]:
    """The largest error of each tensor, and one unit in the last place, relative to the oracle's
    largest value."""
    actual = [implementation.run(case.astype(dtype)) for case in draws]
    exact = [_exact(case, dtype) for case in draws]
    return {
        name: difference([each.get(name) for each in actual], [each[name] for each in exact], dtype)
        for name in exact[0]
        if not (name.startswith("d ") and name.endswith(implementation.lacks))
    }


@lru_cache(maxsize=2 * DRAWS * NEIGHBOURS)
def _exact(case: Case, dtype: np.dtype) -> Result:
    """The result of the oracle for the case rounded to dtype."""
    return equations(case.astype(dtype).astype(np.float64), np.float64)


def difference(
    actual: Iterable[np.ndarray | None], exact: Sequence[np.ndarray], dtype: np.dtype
) -> tuple[float, float]:
    """The largest error in draws of a tensor, and one unit in the last place, both relative to the
    largest value; infinite if an array cannot be compared."""
    largest = 0.0
    for ours, theirs in zip(actual, exact, strict=True):
        if ours is None or ours.shape != theirs.shape or ours.dtype != dtype:
            return np.inf, 0.0
        difference = np.nan_to_num(np.abs(ours.astype(np.float64) - theirs), nan=np.inf)
        largest = max(largest, difference.max(initial=0))
    scale = max(np.abs(each).max(initial=0) for each in exact)
    if scale == 0:  # only an exact result passes
        return np.inf if largest else 0.0, 0.0
    return float(largest / scale), float(np.spacing(np.asarray(scale, dtype)) / scale)
