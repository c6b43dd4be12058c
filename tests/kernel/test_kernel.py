"""The CPU kernel against the oracle."""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common import kernels
from common.kernels import build
from common.params import CELLS, DIRECTIONS, GRU_PARAMETERS
from tests import ROOT
from tests.cases import (
    Array,
    Arrays,
    Case,
    call_kernel,
    draw,
    each_part,
    instruction_sets,
    reference,
)

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the kernel has not been built")

CORES = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 0
FORWARD, BACKWARD = DIRECTIONS[:1], DIRECTIONS[1:]
NAMES = [f"gru.0.forward.{name}" for name in GRU_PARAMETERS]


def assert_right(results: Arrays, case: Case, reset_after: bool) -> None:
    """Compare with the oracle, relative to the largest value of each array.

    The bound for float32 is twice NumPy's own float32 error, plus 8 ULP of the largest value,
    because a small case's own error may be 0 by luck.
    """
    exact = dict(each_part(case, reference(case, reset_after)))
    is_single = case.x.dtype == np.float32
    own = dict(each_part(case, reference(case, reset_after, np.float32))) if is_single else {}
    for name, array in each_part(case, results):
        expected = exact[name]
        size = np.abs(expected).max(initial=0)
        if is_single:
            bound = 2 * np.abs(own[name] - expected).max(initial=0) + 8 * 2**-23 * size
        else:
            bound = (1e-12 if name.startswith(("outputs", "h_last")) else 1e-11) * size
        error = np.abs(array - expected).max(initial=0)
        assert error <= bound, f"{name}: {error} of {size}"
        assert array.shape == expected.shape


def check(case: Case, reset_after: bool, **options: bool) -> None:
    assert_right(call_kernel(case, reset_after, **options), case, reset_after)


def assert_equal(got: Arrays, want: Arrays) -> None:
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
each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])
instruction_set = instruction_sets("avx512", "avx2", "baseline")


@both
@each_dtype
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_one_direction(size, dtype, reset_after, instruction_set):
    """The direction alternates between the sizes, the dtypes and the positions of the reset."""
    is_reversed = (SIZES.index(size) + reset_after + (dtype == np.float64)) % 2
    check(draw(*size, sides=BACKWARD if is_reversed else FORWARD, dtype=dtype), reset_after)


@both
@each_dtype
def test_every_remainder(dtype, reset_after, instruction_set):
    """Sizes with every remainder of a division by the kernel's blocks.

    H and D are divided by two vectors (at most 32 units), B by the 16 rows of a row block, and the
    rows of several steps by the 128 rows of a chunk of the weights' gradient.
    """
    for H in range(1, 36):
        B, D = 1 + 7 * H % 36, 1 + 11 * H % 35
        sides = BACKWARD if H % 5 < 2 else FORWARD
        case = draw(12, B, D, H, H % 3 * 5, sides=sides, dtype=dtype)
        if H % 2:
            case.lengths = None
        check(case, reset_after)


EDGES = [edge + by for edge in (96, 128, 192, 256) for by in (-1, 0, 1)]


@both
@each_dtype
def test_every_remainder_of_the_input_product(dtype, reset_after, instruction_set):
    """Sizes with every remainder of a division by the blocks of the input product.

    D is divided by two vectors and by the four panels of a part; the rows of x that a step reads
    are divided by the 96 rows of a part and by the 128 rows of a chunk of the weights' gradient.
    """
    for D, rows in [*((D, 1 + 7 * D % 40) for D in range(1, 67)), *((150, n) for n in EDGES)]:
        steps, K = -(-rows // 20), rows + 5  # no step reads five of the rows
        case = draw(steps, 20, D, 2 + D % 7 * 6, K, dtype=dtype)
        tokens = np.random.default_rng(D).permutation(K)[:rows].astype(np.int32)
        case = replace(case, lengths=None, tokens=np.resize(tokens, (steps, 20)))
        check(case, reset_after)


RNN_SIZES = [
    (7, 5, 4, 3, 4),
    (12, 3, 33, 127, 0),
    (6, 67, 20, 130, 50),
    (0, 4, 2, 5, 3),
    (60, 1, 5, 130, 7),
    (6, 150, 12, 19, 129),
]


@each_dtype
@pytest.mark.parametrize("sides", [FORWARD, BACKWARD, DIRECTIONS], ids=str)
def test_tanh_rnn(sides, dtype, instruction_set):
    """The RNN with tokens, with resets, and with one row block that threads share."""
    for size in RNN_SIZES:
        case = draw(*size, sides=sides, dtype=dtype, cell="rnn")
        check(case, False)
        check(case, True, backward=False)


BOTH_SIZES = [
    (11, 9, 7, 24, 20),
    (6, 150, 30, 23, 0),  # more than eight row blocks in each direction
    (6, 150, 12, 19, 129),  # 129 distinct tokens: one chunk of 128 rows and one row
    (3, 2, 60, 300, 4),  # threads share the packing of the weights
    (20, 50, 130, 40, 0),  # threads share the input product
]


@both
@each_dtype
@pytest.mark.parametrize("options", [{}, {"shared": True}, {"d_x": False}], ids=str)
@pytest.mark.parametrize("size", BOTH_SIZES, ids=str)
def test_both_directions_at_once(size, options, dtype, reset_after):
    check(draw(*size, sides=DIRECTIONS, dtype=dtype), reset_after, **options)


@both
@pytest.mark.parametrize(
    "missing",
    ["lengths", "h0", "d_outputs", "d_h_last", "resets", "h_reset", "outputs", "backward", "d_x"],
)
@pytest.mark.parametrize("K", [0, 9])
def test_optional_arrays(K, missing, reset_after):
    case = draw(8, 5, 6, 20, K)
    if missing in ("outputs", "backward", "d_x"):
        check(case, reset_after, **{missing: False})
    else:
        check(replace(case, **{missing: None}), reset_after)


@both
@pytest.mark.parametrize("K", [0, 9])
def test_padding_is_not_read(K, reset_after):
    """All lengths are zero, although there are time steps."""
    case = draw(8, 5, 6, 20, K, sides=DIRECTIONS)
    check(replace(case, lengths=np.zeros(5, np.int32)), reset_after)


@both
@each_dtype
@pytest.mark.parametrize(
    ("size", "sides"),
    [
        ((30, 70, 25, 40, 50), DIRECTIONS),
        ((30, 70, 25, 40, 0), DIRECTIONS),
        ((2, 4, 300, 300, 5), DIRECTIONS),
        # One thread projects the inputs of a few steps before these steps. Two threads, which would
        # not share so short a recurrence, project those of all steps of both row blocks first.
        ((60, 20, 400, 10, 0), BACKWARD),
    ],
    ids=str,
)
def test_threads_do_not_matter(size, sides, dtype, reset_after):
    case = draw(*size, sides=sides, dtype=dtype)
    one = call_kernel(case, reset_after, threads=1)
    for threads in (2, 2, 2, 2, 1000):  # the distribution of the tasks differs from call to call
        assert_equal(call_kernel(case, reset_after, threads=threads), one)


@both
@pytest.mark.parametrize("K", [0, 7])
@pytest.mark.parametrize(("B", "sides"), [(1, FORWARD), (3, BACKWARD), (6, FORWARD)])
def test_threads_take_turns_at_few_rows(B, sides, K, reset_after, instruction_set):
    """With few rows, threads share the units of each step; the results are those of one thread."""
    case = draw(60, B, 5, 130, K, sides=sides)
    one = call_kernel(case, reset_after, threads=1)
    assert_right(one, case, reset_after)
    for backward in (True, False) * 10:
        actual = call_kernel(case, reset_after, backward=backward)
        assert_equal(actual, {name: one[name] for name in actual})


@pytest.mark.parametrize(("dtype", "reset_after"), [(np.float32, False), (np.float64, True)])
@pytest.mark.parametrize("size", [(5, 3, 32, 32), (40, 1, 32, 128)])  # threads share the second
def test_inference_detects_changed_weights(size, dtype, reset_after, instruction_set):
    """An inference keeps packed weights, and packs them again after any change.

    The changes are one number, one number at the end, and the signs of 32 numbers, whose sum may
    remain the same.
    """
    case = draw(*size, dtype=dtype)
    check(case, reset_after, backward=False)
    for name in NAMES:
        for changed in (np.s_[17:18], np.s_[:32], np.s_[-1:]):
            case.parameters[name][changed] *= -1
            check(case, reset_after, backward=False)


def test_inference_keeps_no_weights_that_changed_while_it_packed_them():
    """While another thread changes a weight and restores it, no changed weight is kept."""
    first, name = draw(1, 1, 1024, 256, dtype=np.float32), "gru.0.forward.weight_hh"
    cases = [  # copies at new addresses
        replace(first, parameters=first.parameters | {name: first.parameters[name].copy()})
        for _ in range(30)
    ]
    expected = call_kernel(first, False, backward=False)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that the thread runs while the kernel does
    try:
        for case in cases:
            array, ended = case.parameters[name], threading.Event()

            def change(array: Array = array, ended: Any = ended) -> None:
                own = array[0, 0]
                while not ended.is_set():
                    for value in (50, own) * 50:
                        array[0, 0] = value

            thread = threading.Thread(target=change)
            thread.start()
            for _ in range(3):
                call_kernel(case, False, backward=False)
            ended.set()
            thread.join()
            assert_equal(call_kernel(case, False, backward=False), expected)
    finally:
        sys.setswitchinterval(interval)


@both
def test_inference_of_weights_in_the_order_of_nn_gru(reset_after, instruction_set):
    """The same memory is read in the canonical order and in the order of nn.GRU."""
    case = draw(5, 3, 33, 17, sides=DIRECTIONS)
    gates = {name: np.split(each, 3) for name, each in case.parameters.items()}
    own = {name: np.concatenate([-z, r, n]) for name, (r, z, n) in gates.items()}
    for _ in range(2):
        for nn_order, same in ((False, case), (True, replace(case, parameters=own))):
            actual = call_kernel(case, reset_after, backward=False, nn_order=nn_order)
            assert_right(actual, same, reset_after)


@both
@each_dtype
@pytest.mark.parametrize("K", [0, 9])
def test_calls_are_independent(K, dtype, reset_after):
    """The kernel reuses its memory, which an earlier, larger call has filled with NaN."""
    nothing = draw(8, 150, 70, 64, K and 300, sides=DIRECTIONS, dtype=dtype)
    arrays = [*nothing.parameters.values(), nothing.x, nothing.h0]
    for array in (*arrays, nothing.d_outputs, nothing.d_h_last):
        array[:] = np.nan
    case = draw(20, 37, 33, 40, K, dtype=dtype)
    for _ in range(5):
        call_kernel(nothing, reset_after)
        check(case, reset_after)


@both
@each_dtype
def test_an_infinite_gradient_stays_infinite(dtype, reset_after):
    """The padding of a vector must not turn an infinite gradient into NaN (infinity times 0)."""
    case = replace(draw(2, 1, 1, 1, resets=False, dtype=dtype, seed=28), lengths=None)
    case.d_h_last[0, 0] = np.inf
    with np.errstate(invalid="ignore"):
        expected = reference(case, reset_after, dtype)
    assert np.isinf(expected["d_x"]).any()
    for name, array in call_kernel(case, reset_after).items():
        np.testing.assert_array_equal(np.isnan(array), np.isnan(expected[name]), err_msg=name)
        np.testing.assert_array_equal(np.isinf(array), np.isinf(expected[name]), err_msg=name)


@each_dtype
def test_many_words(dtype):
    """134,400 words, more than 2 * 2^16, each with a token of its own or all with the same one."""
    T, B, H = 4200, 32, 4
    words, D = T * B, 3 * H
    case = replace(draw(T, B, D, H, dtype=dtype), lengths=None, d_h_last=None)
    W, b, c = (f"gru.0.forward.{name}" for name in ("weight_ih", "bias_ih", "bias_hh"))
    case.parameters[W] = np.eye(D, dtype=dtype)  # x and the pre-activations have equal gradients
    plain = call_kernel(case, False)
    tokens = np.random.default_rng(0).permutation(words).astype(np.int32)
    x = np.empty_like(case.rows)
    x[tokens] = case.rows
    own = call_kernel(replace(case, x=x, tokens=tokens.reshape(T, B)), False)
    own["d_x"] = own["d_x"][tokens].reshape(T, B, D)
    for name in (W, b):  # these are sums over the rows of x in another order
        scale = np.finfo(dtype).eps * words**0.5 * np.abs(plain[name]).max()
        np.testing.assert_allclose(own[name], plain.pop(name), 0, scale)
    assert_equal(own, plain)

    # With gradients of one sign, the sum grows, and each further term is small relative to it.
    case.d_outputs = np.abs(case.d_outputs)
    case.x[:] = case.x[0, 0]
    apart = call_kernel(case, False)
    tokens = np.zeros((T, B), np.int32)
    same = call_kernel(replace(case, x=case.rows[:2], tokens=tokens), False)
    assert (same["d_x"][1] == 0).all()
    assert_equal(apart, {name: same[name] for name in ("outputs", c)})
    rows = apart["d_x"].reshape(words, D)
    exact = [math.fsum(column) for column in rows.T]
    # Each addition errs by half an ULP of the sum so far at most. If the sum grows evenly, n such
    # errors, some up and some down, have a standard deviation of less than sqrt(n) / 6 ULP of the
    # whole: this allows six of them.
    bound = np.finfo(dtype).eps * words**0.5 * np.abs(rows).sum(0)
    for result in (same["d_x"][0], same[c], same[b], apart[b]):
        assert (np.abs(result - exact) <= bound).all()


EXTREMES = [np.nan, np.inf, -np.inf, 1e30, -1e30, 200.0, -200.0, 1e-30]


@both
@each_dtype
@pytest.mark.parametrize("value", EXTREMES)
def test_extreme_values(value, dtype, reset_after, instruction_set):
    """Extreme values give the results of the C library, and do not affect other rows."""
    weight, bias = "gru.0.forward.weight_ih", "gru.0.forward.bias_ih"
    fine = replace(draw(3, 4, 3, 20, dtype=dtype), lengths=None)
    alone = fine.parameters[weight] * np.repeat(np.eye(3, dtype=dtype), 20, 0)
    by_gate = replace(fine, parameters=fine.parameters | {weight: alone})
    for whole, name, index in [
        (fine, "x", (1, 1, 1)),
        (fine, "h0", (0, 1, 3)),
        (fine, "d_outputs", (1, 1, 3)),
        (fine, "d_h_last", (0, 1, 3)),
        *((by_gate, "x", (1, 1, gate)) for gate in range(3)),  # alone, unless infinite
        *((fine, bias, slice(20 * gate, 20 * gate + 20)) for gate in range(3)),
    ]:
        case = replace(whole, parameters=dict(whole.parameters))
        arrays = case.parameters if name == bias else vars(case)
        arrays[name] = arrays[name].copy()
        arrays[name][index] = value
        actual = call_kernel(case, reset_after)
        with np.errstate(invalid="ignore", over="ignore"):
            expected = reference(case, reset_after, dtype)
        assert name == bias or np.isfinite(actual["outputs"][:, 0]).all()
        for key, array in actual.items():
            odd = ~np.isfinite(expected[key])
            np.testing.assert_array_equal(array[odd], expected[key][odd], err_msg=f"{name} {key}")
            scale = np.abs(expected[key][~odd]).max(initial=0) * 100 * np.finfo(dtype).eps
            np.testing.assert_allclose(array[~odd], expected[key][~odd], 0, scale)


@each_dtype
def test_gates_are_precise(dtype):
    """With H = 1 and no recurrent weights, the state after one step is z * n, within 4 ULP."""
    edge = np.log(np.finfo(dtype).max) - 2  # beyond it, sigmoid(-x) is soon too small to be normal
    x = np.concatenate(
        [np.linspace(-a, a, 40_001) for a in (30, edge)] + [np.geomspace(1e-30, 1, 10_000)]
    )
    case = draw(1, len(x), 3, 1, resets=False, dtype=dtype)
    case = replace(case, lengths=None, h0=None, d_outputs=None, d_h_last=None)
    for array in case.parameters.values():
        array[:] = 0
    case.parameters[NAMES[0]] = np.eye(3, dtype=dtype)
    gates = case.x[0].T  # the pre-activations of z, r and n, as a view
    gates[:] = np.full_like(x, 200), x, x
    exact = gates[1].astype(np.longdouble)
    for gate, expected in ((2, np.tanh(exact)), (0, 1 / (1 + np.exp(-exact)))):
        gates[0], gates[2] = 200, 200
        gates[gate] = gates[1]
        h_last = call_kernel(case, False)["h_last"][0, :, 0]
        assert (np.abs(h_last - expected) / np.spacing(np.abs(expected).astype(dtype))).max() < 4


@each_dtype
def test_denormal_numbers_are_zero(dtype):
    """The kernel flushes denormal numbers, which are slow; the caller's arithmetic keeps them."""
    case = draw(1, 4, 3, 20, dtype=dtype)
    case = replace(case, d_outputs=None, lengths=None, h0=None)
    for array in (case.x, *case.parameters.values()):
        array[:] = 0  # z is 1/2, and the gradient of h0 half of that of h_last
    smallest = np.finfo(dtype).smallest_normal
    case.d_h_last[:] = smallest
    assert (call_kernel(case, False)["d_h0"] == 0).all()
    assert smallest * dtype(0.5) > 0
    case.d_h_last[:] = 2 * smallest
    assert (call_kernel(case, False)["d_h0"] == smallest).all()
    # Coming in, too: the weights would make of this h0, and of this x, numbers that are not small.
    case.h0 = np.full((1, 4, 20), smallest * dtype(0.5))
    case.parameters[NAMES[1]][:] = dtype(1e-8) / smallest
    assert (call_kernel(case, True)["h_last"] == 0).all()
    case.x[:] = smallest * dtype(0.5)
    case.parameters[NAMES[0]][:] = dtype(1e-8) / smallest
    assert (call_kernel(case, True)["h_last"] == 0).all()


def test_denormal_numbers_are_zero_in_every_thread():
    """Gradients that vanish over the steps become zero in every thread."""
    case = replace(draw(300, 64, 8, 16, dtype=np.float32), lengths=None, d_outputs=None)
    for _ in range(5):
        d_x = call_kernel(case, False)["d_x"]
        small = np.abs(d_x) < np.finfo(np.float32).smallest_normal
        assert small.any()
        assert (d_x[small] == 0).all()


def test_bad_input_is_refused():
    case = draw(4, 3, 2, 5, 6)
    for name, place, values in (("tokens", (2, 1), (6, -1)), ("lengths", 1, (5, -1))):
        array = getattr(case, name)
        good = array[place]
        for value in values:
            array[place] = value
            with pytest.raises(ValueError, match=name):
                call_kernel(case, False)
        array[place] = good
    check(case, False)


@pytest.mark.parametrize(("inputs", "hidden"), [(1, 1 << 24), (1 << 44, 1)])
def test_too_large_a_problem_is_refused(inputs, hidden):
    """A problem without enough memory is refused, and the next call is right."""
    sizes = {"steps": 1, "batch": 1, "inputs": inputs, "hidden": hidden, "distinct": 1}
    problem = kernels.Problem(**sizes, directions=1, threads=1)
    with pytest.raises(MemoryError):  # the weights would take petabytes
        kernels.forward(problem, (kernels.Direction * 1)())
    check(draw(4, 3, 2, 5, 6), False)


def test_choice_of_an_instruction_set():
    lib = kernels.library()
    assert lib is not None
    best = lib.gru_instruction_set(None)
    names = (b"amx", b"avx512bf16", b"avx512", b"avx2", b"baseline")
    known = [name for name in names if lib.gru_instruction_set(name)]
    case = draw(20, 8, 10, 30, dtype=np.float32)
    results = []
    for name in known:
        assert lib.gru_instruction_set(name) == name
        assert lib.gru_instruction_set(b"none such") is None
        assert lib.gru_instruction_set(None) == name
        results.append(call_kernel(case, False)["h_last"])
    lib.gru_instruction_set(best)
    assert best == known[0]
    # The better ones multiply and add in one, with one rounding.
    assert not any(np.array_equal(result, results[-1]) for result in results[:-1])


# If calls did not wait, the first would be wrong, and the second wrong or stuck, or would crash.
@pytest.mark.parametrize("options", [{"threads": 1, "backward": False}, {}], ids=["one", "all"])
def test_concurrent_calls(options):
    """Concurrent calls of several threads wait for each other."""
    # Without lengths, both would lay out the same memory alike, and find no wild addresses in it.
    cases = [replace(draw(30, 70, 30, 24, seed=seed), lengths=None) for seed in (1, 2)]
    wants = [call_kernel(case, False, **options) for case in cases]
    wrong = []

    def repeat(case: Case, expected: Arrays) -> None:
        for _ in range(20):
            actual = call_kernel(case, False, **options)
            wrong.extend(
                name for name in expected if not np.array_equal(actual[name], expected[name])
            )

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


def test_single_threaded_calls_run_concurrently(monkeypatch):
    """Calls with one thread do not wait: short calls finish during a long one."""
    forward = kernels.forward
    spans: list[tuple[float, float]] = []

    def timed(*arguments: Any) -> None:
        started = time.perf_counter()
        forward(*arguments)
        spans.append((started, time.perf_counter()))

    monkeypatch.setattr(kernels, "forward", timed)
    long, short = draw(200, 64, 8, 256), draw(2, 2, 3, 4)
    options = {"threads": 1, "backward": False}
    thread = threading.Thread(target=call_kernel, args=(long, False), kwargs=options)
    thread.start()
    while thread.is_alive():
        call_kernel(short, False, **options)
    thread.join()
    start, end = max(spans, key=lambda span: span[1] - span[0])
    margin = (end - start) / 10  # it may take a moment to begin
    assert any(start + margin < begun and ended < end - margin for begun, ended in spans)


def cpu_seconds() -> tuple[float, float]:
    """The CPU seconds of this thread, and of all other threads of the process."""
    own, others = str(threading.get_native_id()), 0.0
    for thread in os.listdir("/proc/self/task"):
        if thread != own:
            with suppress(OSError):  # it has just ended
                others += time.clock_gettime(~int(thread) << 3 | 6)
    return time.thread_time(), others


@pytest.mark.skipif(CORES < 2, reason="needs two cores, and Linux's /proc")
@pytest.mark.parametrize(("T", "B"), [(400, 1), (60, 40)], ids=["turns at a row", "rows"])
def test_a_long_recurrence_is_computed_by_two_threads(T: int, B: int) -> None:
    """Only the recurrence is long enough for a second thread: x has one number per step."""
    case = draw(T, B, 1, 256, 1)
    call_kernel(case, False, backward=False)
    before = cpu_seconds()
    for _ in range(100):  # on a busy machine, the system may run the second thread too late
        call_kernel(case, False, backward=False)
        own, others = (a - b for a, b in zip(cpu_seconds(), before, strict=True))
        if others > own / 10:
            return
    pytest.fail(f"this thread computed for {own} s, all others for {others} s")


def child_fails(case: Case, want: Arrays, **how: bool) -> bool:
    """Whether a forked child returns other results, or does not finish within seconds."""
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # kills the child if it hangs
        actual = call_kernel(case, False, **how)
        os._exit(not np.array_equal(actual["h_last"], want["h_last"]))
    return os.waitpid(child, 0)[1] != 0


def test_after_fork():
    """A child forked during a call of another thread must not wait for threads of its parent."""
    case = draw(30, 70, 30, 24)
    expected = call_kernel(case, False)
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            call_kernel(case, False)

    thread = threading.Thread(target=keep_busy)
    thread.start()
    failed = any(child_fails(case, expected) for _ in range(20))
    stop.set()
    thread.join()
    assert not failed


def threads_of_this_process() -> set[str]:
    return {*os.listdir("/proc/self/task")} if sys.platform == "linux" else set()


def test_threads_of_openmp():
    """The kernel uses the threads of PyTorch's OpenMP runtime; a forked child starts new ones."""
    import torch

    case = draw(30, 70, 30, 24)
    expected = call_kernel(case, False, threads=1)
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    torch.ones(1_000_000).sum()
    there = threads_of_this_process()
    for _ in range(10):
        assert_equal(call_kernel(case, False, threads=5, openmp=True), expected)
    assert there <= threads_of_this_process()  # to begin new ones takes long
    torch.set_num_threads(before)
    assert not child_fails(case, expected, openmp=True)


@pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
def test_build_returns_the_library(tmp_path, monkeypatch):
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" __attribute__((visibility("default"))) int one() { return 1; }')
    monkeypatch.setattr(build, "kernel_sources", lambda amx: [])
    monkeypatch.setattr(build, "SOURCES", [(source, [])])
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


def test_cells_are_those_of_the_header():
    lib = kernels.library()
    for cell, saved in kernels.CELLS.items():
        index = kernels.cell_index(cell)
        assert lib.gru_gates(index) == CELLS[cell].blocks
        assert tuple(lib.gru_saved_size(1, 1, 1, index, after) for after in (0, 1)) == saved


@pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
def test_each_header_compiles_by_itself():
    """Each header compiles with compile_flags.txt, as in an editor; xla_arrays.h needs jaxlib."""
    flags = (build.FOLDER / "compile_flags.txt").read_text().split()
    command = [str(build.compiler()), *flags, *build.ffi_flags(), "-w", "-fsyntax-only"]
    files = build.FOLDER.glob("*.h")  # the sources compile whenever the kernel is built
    processes = [
        subprocess.Popen([*command, str(file)], stderr=subprocess.PIPE, text=True)
        for file in files
        if build.ffi_flags() or file.name != "xla_arrays.h"
    ]
    assert [process.communicate()[1] for process in processes] == [""] * len(processes)


MGU = """
import numpy as np
from common import kernels, oracle, params
from common.kernels import build
from common.params import DIRECTIONS, CellSpec

params.CELLS["mgu"] = CellSpec("mgu", blocks=2, gates=("f",))
names = {"np": np, "_sigmoid": oracle._sigmoid, "CELLS": {}}
exec(open("oracle_of_mgu.py").read(), names)
step, back, between = names["CELLS"]["mgu"]
oracle.CELLS["mgu"] = (
    lambda a, h, U, c, reset_after: step(a, h, U, c, 1.0, reset_after),
    lambda d, between, U, c, reset_after: back(d, between, U, c, 1.0, reset_after)[:4],
    between,
)
assert build.build(build.FOLDER, ["-O0"])
from tests.cases import call_kernel, draw, reference
for number, size in enumerate([(7, 5, 4, 3, 4), (6, 20, 9, 33, 0), (60, 1, 5, 130, 7)]):
    for dtype in (np.float32, np.float64):
        case = draw(*size, sides=DIRECTIONS, dtype=dtype, cell="mgu")
        want = reference(case, False)
        found = call_kernel(case, False)
        assert found.keys() == want.keys()
        for name, array in want.items():
            bound = (1e-5 if dtype == np.float32 else 1e-12) * np.abs(array).max()
            assert np.abs(found[name] - array).max() < bound, (size, dtype, name)
"""


@pytest.mark.long
@pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
def test_a_cell_that_is_added_as_the_page_says(tmp_path):
    """The minimal gated unit of docs/extending.md, compiled in a copy, agrees with its oracle."""
    page = (ROOT / "docs" / "extending.md").read_text()
    for folder in ("common", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    folder = tmp_path / "common" / "kernels"
    code = page.partition("`common/kernels/cell_mgu.h`:\n\n```cpp\n")[2].partition("```")[0]
    (folder / "cell_mgu.h").write_text(code)
    text = page.partition("at the end of `common/oracle.py`:\n\n```python\n")[2]
    (tmp_path / "oracle_of_mgu.py").write_text(text.partition("```")[0])
    # The lines of the table, each after the line it follows.
    lines = re.findall(r"^\| common/kernels/([^ ,]+).*? \| `(.*)` \|$", page, re.MULTILINE)
    after = (
        '#include "cell_rnn.h"',
        "{cell<E, Rnn>, cell<E, Rnn>},",
        "GRU_CELL_RNN,",
        '"rnn": (2, 2)}',
    )
    assert len(lines) == len(after)
    for (name, line), place in zip(lines, after, strict=True):
        path = folder / name.replace("\\", "")
        assert path.read_text().count(place) == 1
        path.write_text(path.read_text().replace(place, f"{place}\n{line}"))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", MGU]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_structures_match_the_header():
    """The ctypes structures have the sizes of gru.h; a difference would not raise an error."""
    assert ctypes.sizeof(kernels.Problem) == 112
    assert ctypes.sizeof(kernels.Direction) == 152
