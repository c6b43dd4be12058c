"""The CPU kernel against the equations, written out in NumPy with float64."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common import kernels
from common.kernels import build

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the kernel has not been built")

Array = NDArray[np.floating]
CORES = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 0


@dataclass
class Case:
    """One direction's inputs. Everything may be missing that gru.h lets be missing."""

    x: Array
    tokens: NDArray[np.int32] | None
    weight_ih: Array
    weight_hh: Array
    bias_ih: Array
    bias_hh: Array
    lengths: NDArray[np.int32] | None
    h0: Array | None
    steps: int
    batch: int
    d_outputs: Array | None
    d_h_last: Array | None
    resets: NDArray[np.bool_] | None = None
    h_reset: Array | None = None

    @property
    def hidden(self) -> int:
        return self.weight_hh.shape[1]

    @property
    def read(self) -> NDArray[np.bool_]:
        """Which rows of x some step reads."""
        T, B = self.steps, self.batch
        tokens = np.arange(T * B).reshape(T, B) if self.tokens is None else self.tokens
        on = np.arange(T)[:, None] < (np.full(B, T) if self.lengths is None else self.lengths)
        return np.isin(np.arange(len(self.x)), tokens[on])

    def astype(self, dtype: type) -> Case:
        return replace(
            self,
            **{
                name: value.astype(dtype)
                for name, value in vars(self).items()
                if isinstance(value, np.ndarray) and value.dtype.kind == "f"
            },
        )


def draw(T: int, B: int, D: int, H: int, *, K: int = 0, seed: int = 0) -> Case:
    """A random case; with K, of K distinct tokens; of an odd B, with resets."""
    rng = np.random.default_rng([T, B, D, H, K, seed])
    scale = 1 / np.sqrt(H)
    lengths = rng.integers(0, T + 1, B)
    lengths[: B // 2] = np.maximum(lengths[: B // 2], T // 2)
    lengths[: min(B, 1)] = T
    rng.shuffle(lengths)
    return Case(
        x=rng.normal(size=(K or T * B, D)),
        tokens=rng.integers(0, K, (T, B)).astype(np.int32) if K else None,
        weight_ih=rng.normal(size=(3 * H, D)) / np.sqrt(D),
        weight_hh=rng.uniform(-scale, scale, (3 * H, H)) * 2,
        bias_ih=rng.uniform(-scale, scale, 3 * H),
        bias_hh=rng.uniform(-scale, scale, 3 * H),
        lengths=lengths.astype(np.int32),
        h0=rng.normal(size=(B, H)),
        steps=T,
        batch=B,
        d_outputs=rng.normal(size=(T, B, H)),
        d_h_last=rng.normal(size=(B, H)),
        resets=rng.random((T, B)) < 1 / 4 if B % 2 else None,
        h_reset=rng.normal(size=(B, H)),
    )


def sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def reference(case: Case, reverse: bool, reset_after: bool) -> dict[str, Array]:
    """Forward, and backward by the chain rule, in the precision of the case."""
    T, B, H = case.steps, case.batch, case.hidden
    dtype = case.weight_hh.dtype
    tokens = np.arange(T * B).reshape(T, B) if case.tokens is None else case.tokens
    lengths = np.full(B, T) if case.lengths is None else case.lengths
    h = np.zeros((B, H), dtype) if case.h0 is None else case.h0
    a = case.x @ case.weight_ih.T + case.bias_ih
    U_z, U_r, U_n = case.weight_hh.reshape(3, H, H)
    c_z, c_r, c_n = case.bias_hh.reshape(3, H)
    order = range(T - 1, -1, -1) if reverse else range(T)
    h_reset = np.zeros((B, H), dtype) if case.h_reset is None else case.h_reset

    def begins(t: int) -> NDArray[np.bool_]:
        """The rows that start anew before step t."""
        t += reverse
        if case.resets is None or t == T:
            return np.zeros(B, bool)
        return case.resets[t] & (t < lengths)

    outputs, tape = np.zeros((T, B, H), dtype), {}
    for t in order:
        on = t < lengths
        h = np.where(begins(t)[:, None], h_reset, h)
        a_z, a_r, a_n = np.split(a[tokens[t]], 3, axis=-1)
        z, r = sigmoid(a_z + h @ U_z.T + c_z), sigmoid(a_r + h @ U_r.T + c_r)
        q = h @ U_n.T + c_n if reset_after else (r * h) @ U_n.T + c_n
        n = np.tanh(a_n + r * q if reset_after else a_n + q)
        tape[t] = h, z, r, q, n
        h = np.where(on[:, None], h + z * (n - h), h)
        outputs[t][on] = h[on]

    d_a = np.zeros_like(a)
    d_U, d_c, d_h_reset = np.zeros((3, H, H), dtype), np.zeros((3, H), dtype), np.zeros_like(h)
    d_h = np.zeros((B, H), dtype) if case.d_h_last is None else case.d_h_last.copy()
    for t in reversed(order):
        on = t < lengths
        before, z, r, q, n = (x[on] for x in tape[t])
        d = d_h[on] + (0 if case.d_outputs is None else case.d_outputs[t][on])
        d_z, d_n = d * (n - before) * z * (1 - z), d * z * (1 - n**2)
        d_q = d_n * r if reset_after else d_n
        d_operand = d_q @ U_n
        d_r = (d_n * q if reset_after else d_operand * before) * r * (1 - r)
        d_before = d * (1 - z) + (d_operand if reset_after else d_operand * r)
        d_h[on] = d_before + d_z @ U_z + d_r @ U_r
        operand = before if reset_after else r * before
        d_U += np.stack([d_z.T @ before, d_r.T @ before, d_q.T @ operand])
        d_c += np.stack([d_z.sum(0), d_r.sum(0), d_q.sum(0)])
        np.add.at(d_a, tokens[t][on], np.concatenate([d_z, d_r, d_n], axis=-1))
        d_h_reset[begins(t)] += d_h[begins(t)]
        d_h[begins(t)] = 0
    return {
        "outputs": outputs,
        "h_last": h,
        "d_x": d_a @ case.weight_ih,
        "d_weight_ih": d_a.T @ case.x,
        "d_weight_hh": d_U.reshape(3 * H, H),
        "d_bias_ih": d_a.sum(0),
        "d_bias_hh": d_c.reshape(3 * H),
        "d_h0": d_h,
        **({} if case.resets is None else {"d_h_reset": d_h_reset}),
    }


def references(cases: list[Case], reverse: bool, reset_after: bool) -> list[dict[str, Array]]:
    """Of each direction's case, which have x and its gradient in common."""
    results = [reference(case, reverse != bool(i), reset_after) for i, case in enumerate(cases)]
    d_x = sum(result["d_x"] for result in results)
    return [{**result, "d_x": d_x} for result in results]


def address(array: NDArray | None) -> int | None:
    return None if array is None else array.ctypes.data


BEHIND = 64  # elements behind each array that the kernel has no business with


def unwritten(*shape: int, dtype: np.dtype) -> Array:
    """NaN, and NaN behind it."""
    return np.full(math.prod(shape) + BEHIND, np.nan, dtype)[:-BEHIND].reshape(shape)


def run(
    cases: Case | list[Case],
    reverse: bool,
    reset_after: bool,
    *,
    threads: int = 2,
    outputs: bool = True,
    backward: bool = True,
    d_x: bool = True,
    shared: bool = False,
    openmp: bool = False,
    nn_order: bool = False,
) -> list[dict[str, Array]]:
    """The kernel on one case or, for both directions at once, on two; what it has to write is NaN
    before, and what it has not to write is so afterwards. So are the rows of x that no step reads.
    With shared, the directions' outputs are parts of shared matrices, a column between them."""
    cases = [cases] if isinstance(cases, Case) else cases
    lib = kernels.library()
    assert lib is not None
    first = cases[0]
    T, B, H, dtype = first.steps, first.batch, first.hidden, first.weight_hh.dtype
    R = len(cases)
    untouched = []

    def new(*shape: int) -> Array:
        array = unwritten(*shape, dtype=dtype)
        untouched.append(array.base[-BEHIND:])
        return array

    def parts(source: Sequence[Array | None] = ()) -> list[Array]:
        if shared:
            whole = new(T * B, R, H + 1)
            untouched.append(whole[..., -1])
            result = [whole[:, i, :-1] for i in range(R)]
        else:
            result = [new(T * B, H) for _ in range(R)]
        for part, values in zip(result, source, strict=False):
            if values is not None:
                part[:] = values.reshape(T * B, H)
        return result

    read = first.read
    x = np.where(read[:, None], first.x, dtype.type(np.nan))
    K, D = x.shape
    gradient = new(K, D)
    d_outputs = parts([case.d_outputs for case in cases])
    written_outputs = parts()
    saved_size = kernels.saved_size(T, B, H, reset_after)
    assert saved_size == lib.gru_saved_size(T, B, H, reset_after)
    results, keep = [], []
    directions = (kernels.Direction * R)()
    for i, case in enumerate(cases):
        written = {
            "h_last": new(B, H),
            "d_weight_ih": new(3 * H, D),
            "d_weight_hh": new(3 * H, H),
            "d_bias_ih": new(3 * H),
            "d_bias_hh": new(3 * H),
            "d_h0": new(B, H),
        }
        if case.resets is not None:
            written["d_h_reset"] = new(B, H)
        saved = new(saved_size)
        keep.append(saved)
        results.append({**written, "outputs": written_outputs[i], "d_x": gradient})
        directions[i] = kernels.Direction(
            reverse=reverse != bool(i),
            ld_outputs=(H + 1) * R if shared else H,
            weight_ih=address(case.weight_ih),
            weight_hh=address(case.weight_hh),
            bias_ih=address(case.bias_ih),
            bias_hh=address(case.bias_hh),
            h0=address(case.h0),
            h_reset=address(case.h_reset),
            outputs=address(written_outputs[i]) if outputs else None,
            saved=address(saved) if backward else None,
            d_outputs=None if case.d_outputs is None else address(d_outputs[i]),
            d_h_last=address(case.d_h_last),
            **{name: address(array) for name, array in written.items()},
        )
    problem = kernels.Problem(
        steps=T,
        batch=B,
        inputs=D,
        hidden=H,
        distinct=K,
        x=address(x),
        tokens=address(first.tokens),
        lengths=address(first.lengths),
        resets=address(first.resets),
        is_double=dtype == np.float64,
        reset_after=reset_after,
        nn_order=nn_order,
        directions=R,
        threads=threads,
        openmp=openmp,
        d_x=address(gradient) if d_x else None,
    )
    kernels.forward(problem, directions)
    if backward:
        kernels.backward(problem, directions)
        assert not d_x or (gradient[~read] == 0).all()
    assert all(np.isnan(array).all() for array in untouched)
    for result in results:
        result["outputs"] = result["outputs"].reshape(T, B, H)
    wanted = [
        name
        for name in results[0]
        if (outputs or name != "outputs") and (backward or not name.startswith("d_"))
        if d_x or name != "d_x"
    ]
    return [{name: result[name] for name in wanted} for result in results]


def assert_close(got: dict[str, Array], want: dict[str, Array], forward: float, gradient: float):
    """Relative to the largest value of each array."""
    for name, array in got.items():
        bound = gradient if name.startswith("d_") else forward
        error = np.abs(array - want[name]).max(initial=0)
        size = np.abs(want[name]).max(initial=0)
        assert error <= bound * size, f"{name}: {error} of {size}"
        assert array.shape == want[name].shape


def bounds(dtype: type, own: dict[str, Array], oracle: dict[str, Array]) -> dict[str, float]:
    """For float32, twice NumPy's own float32 error, plus 8 ULP of the largest value, because a
    small case's own error may be 0 by luck."""
    result = {}
    for name, array in oracle.items():
        size = np.abs(array).max(initial=0) or 1
        result[name] = 2 * np.abs(own[name] - array).max(initial=0) / size + 8 * np.finfo(dtype).eps
    return result


def assert_right(
    got: list[dict[str, Array]], cases: Case | list[Case], reverse: bool, reset_after: bool
):
    cases = [cases] if isinstance(cases, Case) else cases
    oracles = references([case.astype(np.float64) for case in cases], reverse, reset_after)
    owns = references(cases, reverse, reset_after)
    for case, found, own, oracle in zip(cases, got, owns, oracles, strict=True):
        if case.weight_hh.dtype == np.float64:
            assert_close(found, oracle, 1e-12, 1e-11)
            continue
        allowed = bounds(np.float32, own, oracle)
        for name, array in found.items():
            assert_close({name: array}, oracle, allowed[name], allowed[name])


def assert_equal(got: dict[str, Array], want: dict[str, Array]):
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


SIZES = [  # T, B, D, H, K
    (7, 5, 1, 1, 0),
    (7, 5, 4, 3, 4),
    (9, 1, 50, 100, 6),
    (12, 3, 33, 127, 0),
    (6, 67, 20, 130, 50),
    (3, 2, 1, 513, 5),
    (2, 3, 1601, 5, 0),
    (12, 33, 100, 128, 90),
    (40, 150, 9, 17, 300),
    (300, 1, 401, 16, 0),
    (1, 1, 8, 8, 1),
    (0, 4, 2, 5, 3),
    (0, 4, 2, 5, 0),
    (5, 0, 2, 5, 3),
    (0, 0, 2, 5, 0),
    (7, 5, 0, 3, 0),
    (7, 5, 0, 3, 4),
]
both = pytest.mark.parametrize("reset_after", [False, True])
either_way = pytest.mark.parametrize("reverse", [False, True])
each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def instruction_set(request: pytest.FixtureRequest):
    """Every instruction set that this processor has."""
    lib = kernels.library()
    assert lib is not None
    best = lib.gru_instruction_set(None)
    if lib.gru_instruction_set(request.param.encode()) is None:
        pytest.skip(f"this processor lacks {request.param}")
    yield
    lib.gru_instruction_set(best)


@both
@either_way
@each_dtype
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_one_direction(size, dtype, reverse, reset_after, instruction_set):
    T, B, D, H, K = size
    case = draw(T, B, D, H, K=K).astype(dtype)
    got = run(case, reverse, reset_after)
    assert_right(got, case, reverse, reset_after)


@both
@each_dtype
def test_every_remainder(dtype, reset_after, instruction_set):
    """Of H and D by two vectors, which are 32 units at most; of B by an item's 16 rows; of a few
    steps' rows by the 128 that the weights' gradient is computed from at once."""
    for H in range(1, 36):
        B, D = 1 + 7 * H % 36, 1 + 11 * H % 35
        case = draw(12, B, D, H, K=H % 3 * 5).astype(dtype)
        if H % 2:
            case.lengths = None
        reverse = H % 5 < 2
        got = run(case, reverse, reset_after)
        assert_right(got, case, reverse, reset_after)


EDGES = [edge + by for edge in (96, 128, 192, 256) for by in (-1, 0, 1)]


@both
@each_dtype
def test_every_remainder_of_the_input_product(dtype, reset_after, instruction_set):
    """Of D by two vectors, and by the four pairs of a part; of the rows that some step reads by a
    part's 96, and the 128 that are packed and that the weights' gradient is computed from."""
    for D, rows in [*((D, 1 + 7 * D % 40) for D in range(1, 67)), *((150, n) for n in EDGES)]:
        steps, K = -(-rows // 20), rows + 5  # five that nothing reads
        case = draw(steps, 20, D, 2 + D % 7 * 6, K=K).astype(dtype)
        tokens = np.random.default_rng(D).permutation(K)[:rows].astype(np.int32)
        case = replace(case, lengths=None, tokens=np.resize(tokens, (steps, 20)))
        assert case.read.sum() == rows
        got = run(case, False, reset_after)
        assert_right(got, case, False, reset_after)


@both
def test_reference_against_differences(reset_after):
    """The gradients above are those of the equations above."""
    case = draw(4, 3, 4, 5, K=6)
    want = reference(case, False, reset_after)

    def loss(changed: Case) -> float:
        result = reference(changed, False, reset_after)
        assert case.d_outputs is not None
        return (result["outputs"] * case.d_outputs).sum() + (result["h_last"] * case.d_h_last).sum()

    weights = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    for name in ("x", *weights, "h0", "h_reset"):
        direction = np.random.default_rng(1).normal(size=getattr(case, name).shape)
        step = 1e-6 * direction
        ahead = loss(replace(case, **{name: getattr(case, name) + step}))
        behind = loss(replace(case, **{name: getattr(case, name) - step}))
        slope = (want[f"d_{name}"] * direction).sum()
        assert (ahead - behind) / 2e-6 == pytest.approx(slope, rel=1e-6)


def draw_both(
    T: int, B: int, D: int, H: int, *, K: int = 0, dtype: type = np.float64
) -> list[Case]:
    """A case for each direction, of the same inputs and lengths."""
    one, two = (draw(T, B, D, H, K=K, seed=seed).astype(dtype) for seed in (1, 2))
    return [one, replace(two, x=one.x, tokens=one.tokens, lengths=one.lengths, resets=one.resets)]


BOTH_SIZES = [
    (11, 9, 7, 24, 20),
    (6, 150, 30, 23, 0),  # more than eight items in each direction
    (6, 150, 12, 19, 129),  # tokens by the 128, and one more
    (3, 2, 60, 300, 4),  # so many weights that threads share the packing of them
    (20, 50, 130, 40, 0),  # so many inputs that threads share the products
]


@both
@each_dtype
@pytest.mark.parametrize("how", [{}, {"shared": True}, {"d_x": False}], ids=str)
@pytest.mark.parametrize("size", BOTH_SIZES, ids=str)
def test_both_directions_at_once(size, how, dtype, reset_after):
    T, B, D, H, K = size
    cases = draw_both(T, B, D, H, K=K, dtype=dtype)
    got = run(cases, False, reset_after, **how)
    assert_right(got, cases, False, reset_after)


@both
@pytest.mark.parametrize(
    "missing",
    ["lengths", "h0", "d_outputs", "d_h_last", "resets", "h_reset", "outputs", "backward", "d_x"],
)
@pytest.mark.parametrize("K", [0, 9])
def test_what_may_be_missing(K, missing, reset_after):
    case, how = draw(8, 5, 6, 20, K=K), {}
    if missing in ("outputs", "backward", "d_x"):
        how[missing] = False
    else:
        case = replace(case, **{missing: None})
    got = run(case, False, reset_after, **how)
    assert_right(got, case, False, reset_after)


@both
@pytest.mark.parametrize("K", [0, 9])
def test_nothing_is_read(K, reset_after):
    """There are steps, and no row has one."""
    cases = draw_both(8, 5, 6, 20, K=K)
    for case in cases:
        case.lengths = np.zeros(5, np.int32)
    got = run(cases, False, reset_after)
    assert_right(got, cases, False, reset_after)


@both
@each_dtype
@pytest.mark.parametrize(
    "size", [(30, 70, 25, 40, 50), (30, 70, 25, 40, 0), (2, 4, 300, 300, 5)], ids=str
)
def test_threads_do_not_matter(size, dtype, reset_after):
    T, B, D, H, K = size
    cases = draw_both(T, B, D, H, K=K, dtype=dtype)
    one = run(cases, False, reset_after, threads=1)
    for threads in (2, 2, 2, 2, 1000):  # which thread gets what differs from call to call
        for got, want in zip(run(cases, False, reset_after, threads=threads), one, strict=True):
            assert_equal(got, want)


@both
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("B", [1, 3, 6])
def test_threads_take_turns_at_few_rows(B, reverse, reset_after, instruction_set):
    """Of a step, each computes some units, and waits for those of the others before the next."""
    case = draw(60, B, 5, 130, K=7)
    (one,) = run(case, reverse, reset_after, threads=1)
    assert_right([one], case, reverse, reset_after)
    for backward in (True, False) * 10:
        (got,) = run(case, reverse, reset_after, backward=backward)
        for name, array in got.items():
            np.testing.assert_array_equal(array, one[name], err_msg=name)


WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@both
@each_dtype
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("size", [(5, 3, 32, 32), (40, 1, 32, 128)])  # there, threads take turns
def test_inference_sees_that_weights_have_changed(name, size, dtype, reset_after, instruction_set):
    """It keeps them packed. A number, or a gate's signs, which cancel one another in a sum."""
    case = draw(*size).astype(dtype)
    array = getattr(case, name)
    assert_right(run(case, False, reset_after, backward=False), case, False, reset_after)
    for changed in (np.s_[17:18], np.s_[:32], np.s_[-1:]):
        array[changed] *= -1
        got = run(case, False, reset_after, backward=False)
        assert_right(got, case, False, reset_after)


@both
def test_inference_keeps_no_weights_that_changed_while_it_packed_them(reset_after):
    """Another thread changes a number and puts it back: what is kept is of the numbers it had."""
    first = draw(1, 1, 1024, 256).astype(np.float32)
    cases = [replace(first, weight_hh=first.weight_hh.copy()) for _ in range(30)]  # new addresses
    (wanted,) = run(first, False, reset_after, backward=False)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that the thread runs while the kernel does
    try:
        for case in cases:
            own, ended = first.weight_hh[0, 0], threading.Event()

            def change(case: Case = case, own: Any = own, ended: Any = ended) -> None:
                while not ended.is_set():
                    for value in (50, own) * 50:
                        case.weight_hh[0, 0] = value

            thread = threading.Thread(target=change)
            thread.start()
            for _ in range(3):
                run(case, False, reset_after, backward=False)
            ended.set()
            thread.join()
            (got,) = run(case, False, reset_after, backward=False)
            assert_equal(got, wanted)
    finally:
        sys.setswitchinterval(interval)


@both
def test_inference_of_weights_in_the_order_of_nn_gru(reset_after, instruction_set):
    """The same memory, read in the one order and in the other."""
    cases = draw_both(5, 3, 33, 17)
    canonical = []
    for case in cases:
        gates = {name: np.split(getattr(case, name), 3) for name in WEIGHTS}
        own = {name: np.concatenate([-z, r, n]) for name, (r, z, n) in gates.items()}
        canonical.append(replace(case, **own))
    for _ in range(2):
        for nn_order, same in ((False, cases), (True, canonical)):
            got = run(cases, False, reset_after, backward=False, nn_order=nn_order)
            assert_right(got, same, False, reset_after)


@both
@each_dtype
@pytest.mark.parametrize("K", [0, 9])
def test_nothing_is_left_of_an_earlier_call(K, dtype, reset_after):
    """The kernel keeps its memory: here it is full of NaN, from a larger call on nothing else."""
    nothing = draw(8, 150, 70, 64, K=K and 300).astype(dtype)
    for array in vars(nothing).values():
        if isinstance(array, np.ndarray) and array.dtype == dtype:
            array[:] = np.nan
    case = draw(20, 37, 33, 40, K=K).astype(dtype)
    for _ in range(5):
        run([nothing, nothing], False, reset_after)
        got = run(case, False, reset_after)
        assert_right(got, case, False, reset_after)


@both
@each_dtype
def test_an_infinite_gradient_stays_infinite(dtype, reset_after):
    """Beside a unit, there is a vector's worth of none: infinity times 0 would be NaN."""
    case = replace(draw(2, 1, 1, 1), lengths=None, resets=None).astype(dtype)
    assert case.d_h_last is not None
    case.d_h_last[0, 0] = np.inf
    (got,) = run(case, False, reset_after)
    (want,) = references([case], False, reset_after)
    assert np.isinf(want["d_x"]).any()
    for name, array in got.items():
        np.testing.assert_array_equal(np.isnan(array), np.isnan(want[name]), err_msg=name)
        np.testing.assert_array_equal(np.isinf(array), np.isinf(want[name]), err_msg=name)


@each_dtype
def test_many_words(dtype):
    """134,400 of them, more than fit 16 bits twice: each a token of its own, or all the same."""
    T, B, H = 4200, 32, 4
    words, W = T * B, np.eye(3 * H)  # with it, the gradient of x is that of the pre-activations
    case = replace(draw(T, B, 3 * H, H), lengths=None, d_h_last=None, weight_ih=W).astype(dtype)
    (plain,) = run(case, False, False)
    tokens = np.random.default_rng(0).permutation(words).astype(np.int32)
    x = np.empty_like(case.x)
    x[tokens] = case.x
    (own,) = run(replace(case, x=x, tokens=tokens.reshape(T, B)), False, False)
    own["d_x"] = own["d_x"][tokens]
    for name in ("d_weight_ih", "d_bias_ih"):  # sums over the rows of x, in another order
        scale = np.finfo(dtype).eps * words**0.5 * np.abs(plain[name]).max()
        np.testing.assert_allclose(own[name], plain.pop(name), 0, scale)
    assert_equal(own, plain)

    # Gradients of one sign, so that the sum grows and what is added becomes small beside it.
    assert case.d_outputs is not None
    case.d_outputs = np.abs(case.d_outputs)
    case.x[:] = case.x[0]
    (apart,) = run(case, False, False)
    tokens = np.zeros((T, B), np.int32)
    (same,) = run(replace(case, x=case.x[:2], tokens=tokens), False, False)
    assert (same["d_x"][1] == 0).all()
    assert_equal(apart, {name: same[name] for name in ("outputs", "d_bias_hh")})
    exact = [math.fsum(column) for column in apart["d_x"].T]
    # Each addition errs by half an ULP of the sum so far at most. If the sum grows evenly, n such
    # errors, some up and some down, have a standard deviation of less than sqrt(n) / 6 ULP of the
    # whole: this allows six of them.
    bound = np.finfo(dtype).eps * words**0.5 * np.abs(apart["d_x"]).sum(0)
    for found in (same["d_x"][0], same["d_bias_hh"], same["d_bias_ih"], apart["d_bias_ih"]):
        assert (np.abs(found - exact) <= bound).all()


EXTREMES = [np.nan, np.inf, -np.inf, 1e30, -1e30, 200.0, -200.0, 1e-30]


@both
@each_dtype
@pytest.mark.parametrize("value", EXTREMES)
def test_extreme_values(value, dtype, reset_after, instruction_set):
    """As with the C library's functions, and without touching other rows of the batch."""
    fine = draw(3, 4, 3, 20).astype(dtype)
    fine.lengths = None
    by_gate = replace(fine, weight_ih=fine.weight_ih * np.repeat(np.eye(3, dtype=dtype), 20, 0))
    gates = [slice(20 * gate, 20 * gate + 20) for gate in range(3)]
    places = {"x": [(5, 1)], "h0": [(1, 3)], "d_outputs": [(1, 1, 3)], "d_h_last": [(1, 3)]}
    for whole, name, index in [
        *((fine, name, index) for name, indices in places.items() for index in indices),
        *((by_gate, "x", (5, gate)) for gate in range(3)),  # alone, unless infinite
        *((fine, "bias_ih", gate) for gate in gates),
    ]:
        case = replace(whole, **{name: getattr(whole, name).copy()})
        getattr(case, name)[index] = value
        (got,) = run(case, False, reset_after)
        with np.errstate(invalid="ignore", over="ignore"):
            want = reference(case, False, reset_after)
        assert name == "bias_ih" or np.isfinite(got["outputs"][:, 0]).all()
        for key, array in got.items():
            odd = ~np.isfinite(want[key])
            np.testing.assert_array_equal(array[odd], want[key][odd], err_msg=f"{name} {key}")
            scale = np.abs(want[key][~odd]).max(initial=0) * 100 * np.finfo(dtype).eps
            np.testing.assert_allclose(array[~odd], want[key][~odd], 0, scale)


@each_dtype
def test_gates_are_precise(dtype):
    """With H = 1 and no recurrent weights, the state after one step is z * n. Within 4 ULP."""
    edge = np.log(np.finfo(dtype).max) - 2  # beyond it, sigmoid(-x) is soon too small to be normal
    x = np.concatenate(
        [np.linspace(-a, a, 40_001) for a in (30, edge)] + [np.geomspace(1e-30, 1, 10_000)]
    )
    case = Case(
        x=np.stack([np.full_like(x, 200), x, x], -1).astype(dtype),
        tokens=None,
        weight_ih=np.eye(3, dtype=dtype),
        weight_hh=np.zeros((3, 1), dtype),
        bias_ih=np.zeros(3, dtype),
        bias_hh=np.zeros(3, dtype),
        lengths=None,
        h0=None,
        steps=1,
        batch=len(x),
        d_outputs=None,
        d_h_last=None,
    )
    exact = case.x[:, 1].astype(np.longdouble)
    (got,) = run(case, False, False)
    ulp = np.spacing(np.abs(np.tanh(exact)).astype(dtype))
    assert (np.abs(got["h_last"][:, 0] - np.tanh(exact)) / ulp).max() < 4
    case.x[:, 0], case.x[:, 2] = case.x[:, 2], 200
    (got,) = run(case, False, False)
    ulp = np.spacing(sigmoid(exact).astype(dtype))
    assert (np.abs(got["h_last"][:, 0] - sigmoid(exact)) / ulp).max() < 4


@each_dtype
def test_denormal_numbers_are_zero(dtype):
    """They would take a hundred times as long. The caller's own arithmetic keeps them."""
    case = draw(1, 4, 3, 20).astype(dtype)
    case.d_outputs, case.lengths, case.h0 = None, None, None
    for array in (case.x, case.weight_ih, case.weight_hh, case.bias_ih, case.bias_hh):
        array[:] = 0  # z is 1/2, and the gradient of h0 half of that of h_last
    smallest = np.finfo(dtype).smallest_normal
    assert case.d_h_last is not None
    case.d_h_last[:] = smallest
    (got,) = run(case, False, False)
    assert (got["d_h0"] == 0).all()
    assert smallest * dtype(0.5) > 0
    case.d_h_last[:] = 2 * smallest
    (got,) = run(case, False, False)
    assert (got["d_h0"] == smallest).all()
    # Coming in, too: the weights would make of this h0, and of this x, numbers that are not small.
    case.h0 = np.full((4, 20), smallest * dtype(0.5))
    case.weight_hh[:] = dtype(1e-8) / smallest
    (got,) = run(case, False, True)
    assert (got["h_last"] == 0).all()
    case.x[:] = smallest * dtype(0.5)
    case.weight_ih[:] = dtype(1e-8) / smallest
    (got,) = run(case, False, True)
    assert (got["h_last"] == 0).all()


def test_denormal_numbers_are_zero_in_every_thread():
    """There are none in gradients that vanish over the steps."""
    case = replace(draw(300, 64, 8, 16).astype(np.float32), lengths=None, d_outputs=None)
    for _ in range(5):
        (got,) = run(case, False, False)
        small = np.abs(got["d_x"]) < np.finfo(np.float32).smallest_normal
        assert small.any()
        assert (got["d_x"][small] == 0).all()


def test_bad_input_is_refused():
    case = draw(4, 3, 2, 5, K=6)
    assert case.tokens is not None and case.lengths is not None
    case.tokens[2, 1] = 6
    with pytest.raises(ValueError, match="tokens"):
        run(case, False, False)
    case.tokens[2, 1] = -1
    with pytest.raises(ValueError, match="tokens"):
        run(case, False, False)
    case.tokens[2, 1] = 0
    for length in (5, -1):
        case.lengths[1] = length
        with pytest.raises(ValueError, match="lengths"):
            run(case, False, False)


@pytest.mark.parametrize(("inputs", "hidden"), [(1, 1 << 24), (1 << 44, 1)])
def test_too_large_a_problem_is_refused(inputs, hidden):
    """And the next call is none the worse."""
    sizes = {"steps": 1, "batch": 1, "inputs": inputs, "hidden": hidden, "distinct": 1}
    problem = kernels.Problem(**sizes, directions=1, threads=1)
    with pytest.raises(MemoryError):  # the weights would take petabytes
        kernels.forward(problem, (kernels.Direction * 1)())
    case = draw(4, 3, 2, 5, K=6)
    got = run(case, False, False)
    assert_right(got, case, False, False)


def test_choice_of_an_instruction_set():
    lib = kernels.library()
    assert lib is not None
    best = lib.gru_instruction_set(None)
    names = (b"avx512bf16", b"avx512", b"avx2", b"baseline")
    known = [name for name in names if lib.gru_instruction_set(name)]
    case = draw(20, 8, 10, 30).astype(np.float32)
    results = []
    for name in known:
        assert lib.gru_instruction_set(name) == name
        assert lib.gru_instruction_set(b"none such") is None
        assert lib.gru_instruction_set(None) == name
        results.append(run(case, False, False)[0]["h_last"])
    lib.gru_instruction_set(best)
    assert best == known[0]
    # The better ones multiply and add in one, with one rounding.
    assert not any(np.array_equal(result, results[-1]) for result in results[:-1])


# If calls did not wait, the first would be wrong, and the second wrong or stuck, or would crash.
@pytest.mark.parametrize("how", [{"threads": 1, "backward": False}, {}], ids=["one", "all"])
def test_calls_at_once(how):
    """They wait for one another."""
    # Without lengths, both would lay out the same memory alike, and find no wild addresses in it.
    cases = [replace(draw(30, 70, 30, 24, seed=seed), lengths=None) for seed in (1, 2)]
    wants = [run(case, False, False, **how)[0] for case in cases]
    wrong = []

    def repeat(case: Case, want: dict[str, Array]) -> None:
        for _ in range(20):
            (got,) = run(case, False, False, **how)
            wrong.extend(name for name in want if not np.array_equal(got[name], want[name]))

    threads = [
        threading.Thread(target=repeat, args=each, daemon=True)
        for each in zip(cases, wants, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def test_calls_of_one_thread_each_run_side_by_side(monkeypatch):
    """Short calls begin and end in the middle of a long one, instead of waiting for its end."""
    forward = kernels.forward
    spans: list[tuple[float, float]] = []

    def timed(*arguments: Any) -> None:
        started = time.perf_counter()
        forward(*arguments)
        spans.append((started, time.perf_counter()))

    monkeypatch.setattr(kernels, "forward", timed)
    long, short = draw(200, 64, 8, 256), draw(2, 2, 3, 4)
    how = {"threads": 1, "backward": False}
    thread = threading.Thread(target=run, args=([long], False, False), kwargs=how)
    thread.start()
    while thread.is_alive():
        run([short], False, False, **how)
    thread.join()
    start, end = max(spans, key=lambda span: span[1] - span[0])
    margin = (end - start) / 10  # it may take a moment to begin
    assert any(start + margin < begun and ended < end - margin for begun, ended in spans)


def cpu_seconds() -> tuple[float, float]:
    """The processor's time that this thread, and that all others of the process, have taken."""
    own, others = str(threading.get_native_id()), 0.0
    for thread in os.listdir("/proc/self/task"):
        if thread != own:
            with suppress(OSError):  # it has just ended
                others += time.clock_gettime(~int(thread) << 3 | 6)
    return time.thread_time(), others


@pytest.mark.skipif(CORES < 2, reason="needs two cores, and Linux's /proc")
@pytest.mark.parametrize(("T", "B"), [(400, 1), (60, 40)], ids=["turns at a row", "rows"])
def test_a_long_recurrence_is_computed_by_two_threads(T: int, B: int) -> None:
    """Nothing else of this case is worth a second thread: there is one input, of one number."""
    case = draw(T, B, 1, 256, K=1)
    run(case, False, False, backward=False)
    before = cpu_seconds()
    for _ in range(100):  # on a busy machine, the system may run the second thread too late
        run(case, False, False, backward=False)
        own, others = (a - b for a, b in zip(cpu_seconds(), before, strict=True))
        if others > own / 10:
            return
    pytest.fail(f"this thread computed for {own} s, all others for {others} s")


def child_fails(case: Case, want: dict[str, Array], **how: bool) -> bool:
    """Whether a forked child does not get the same, or not within seconds."""
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # kills the child if it hangs
        (got,) = run(case, False, False, **how)
        os._exit(not np.array_equal(got["h_last"], want["h_last"]))
    return os.waitpid(child, 0)[1] != 0


def test_after_fork():
    """A child forked in the middle of another thread's call has neither that thread nor the
    kernel's own: it must wait for none of them."""
    case = draw(30, 70, 30, 24)
    (want,) = run(case, False, False)
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            run(case, False, False)

    thread = threading.Thread(target=keep_busy)
    thread.start()
    failed = any(child_fails(case, want) for _ in range(20))
    stop.set()
    thread.join()
    assert not failed


def threads_of_this_process() -> set[str]:
    return {*os.listdir("/proc/self/task")} if sys.platform == "linux" else set()


def test_threads_of_openmp():
    """Those of the runtime that PyTorch brings; a forked child starts its own."""
    import torch

    case = draw(30, 70, 30, 24)
    (want,) = run(case, False, False, threads=1)
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    torch.ones(1_000_000).sum()
    there = threads_of_this_process()
    for _ in range(10):
        (got,) = run(case, False, False, threads=5, openmp=True)
        assert_equal(got, want)
    assert there <= threads_of_this_process()  # to begin new ones takes long
    torch.set_num_threads(before)
    assert not child_fails(case, want, openmp=True)


@pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
def test_build_returns_the_library(tmp_path, monkeypatch):
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" __attribute__((visibility("default"))) int one() { return 1; }')
    monkeypatch.setattr(build, "SOURCES", [source])
    path = build.build(tmp_path / "built")
    assert path == tmp_path / "built" / kernels.LIBRARY
    assert ctypes.CDLL(str(path)).one() == 1


def test_build_without_a_compiler_returns_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "compiler", lambda: None)
    assert build.build(tmp_path) is None
    assert "no C++ compiler" in capsys.readouterr().err


def test_import_without_the_library():
    code = "from common import kernels; kernels.PATH = 'absent.so'; assert not kernels.available()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_structures_match_the_header():
    """An error in ctypes' picture of gru.h would be read as garbage, not reported."""
    assert ctypes.sizeof(kernels.Problem) == 112
    assert ctypes.sizeof(kernels.Direction) == 152
