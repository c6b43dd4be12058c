"""Every implementation of both twins, and the frameworks' own GRUs, against the oracle."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from common import kernels, oracle
from comparison import implementations, parity
from comparison.implementations import Implementation
from comparison.peers.jax import jax_cell
from comparison.peers.torch import torch_cell
from tests.cases import MOST, apart
from tools.rounding_oracle import rounding_oracle

IMPLEMENTATIONS = {each.name: each for each in parity.implementations()}
CASES = {
    f"{case.cell}, {case.name}, reset {'after' if case.reset_after else 'before'}": (case, *others)
    for case, *others in parity.cases()
}
# The default tests: float64 reaches all of the code; float32 checks its rounding, and bfloat16 is
# float32, rounded once. .ci/long runs every implementation on every case.
BY_DEFAULT = {
    "float64": "(?!.*(one row|long|real)|gru, (three|distinct).* after)",
    "float32": "gru, (ties|(resets, reset|long, reset) before|real.* after)|rnn, (ties|long)",
    "bfloat16": "gru, (ties, zeros, unsorted, reset after|resets, distinct.* before)|rnn, ties",
}
# Each of these takes a second or more, mostly in XLA's compiler. By default, they run only on these
# of the cases above. In float64, JAX's GRUs meet both places of the reset gate, resets and tokens.
SLOW = {
    ("jax loop", "float64"): "ties.* after|resets, distinct.* before",
    ("jax scan", "float64"): "ties, zeros, unsorted, reset after|(no step|resets, dist).* before",
    ("jax rnn", "float64"): "ties|distinct",
    ("jax rnn scan", "float64"): "ties|distinct",
    ("flax.linen.GRUCell", "float64"): "ties.* after",
    ("torch loop", "float32"): "ties, zeros, unsorted, reset after|long",
    ("jax loop", "float32"): "none",
    ("jax scan", "float32"): "long",
    ("jax fused", "float32"): "ties.* after|resets, reset before",
    ("jax rnn", "float32"): "long",
    ("jax rnn scan", "float32"): "none",
    ("flax.linen.GRUCell", "float32"): "none",
    ("flax.nnx.GRUCell", "float32"): "none",
    ("jax loop", "bfloat16"): "none",
    ("jax scan", "bfloat16"): "ties",
}


def checks():
    """(case, dtype, implementation) for each case that an implementation supports."""
    for dtype, default in BY_DEFAULT.items():
        for case, draws in CASES.items():
            for name, each in IMPLEMENTATIONS.items():
                if not each.can(draws[0], dtype):
                    continue
                # This case is for implementations without that bias; torch loop runs all cases.
                if "no hidden bias" in case and not each.lacks and name != "torch loop":
                    continue
                is_default = re.match(default, case)
                is_default = is_default and re.search(SLOW.get((name, dtype), ""), case)
                yield pytest.param(case, dtype, name, marks=() if is_default else pytest.mark.long)


@pytest.mark.parametrize(("case", "dtype", "name"), [*checks()])
def test_everything_agrees_with_the_oracle(case, dtype, name, request):
    if dtype != "float64" and "torch" not in name:  # The bounds depend on how XLA rounds.
        request.getfixturevalue("optimized")
    draws, implementation = CASES[case], IMPLEMENTATIONS[name]
    rows = parity.check(implementation, draws, dtype)
    assert [row for row in rows if not row.passed] == []
    # Each result and each gradient was compared.
    names = parity.equations(draws[0], np.float64).keys()
    names = {
        each for each in names if not (each[:2] == "d " and each.endswith(implementation.lacks))
    }
    if dtype == "bfloat16":  # Only the layer computes in bfloat16.
        names = {each for each in names if not each.startswith(("logits", "loss", "d head"))}
    assert {row.check for row in rows} == names


# With tokens, the gradients that the kernel rounds are sums over the words of a token, which the
# oracle does not form; tests/kernel/test_bfloat16.py has these.
ROUNDED = [
    pytest.param(name, cell, marks=() if re.match(default, name) else pytest.mark.long)
    for cell, default in (("torch", BY_DEFAULT["bfloat16"]), ("jax", "gru, ties.* reset after"))
    for name, (case, *_) in CASES.items()
    if case.tokens is None
]


@pytest.mark.parametrize(("case", "framework"), ROUNDED)
def test_products_in_bfloat16_agree_with_the_oracle_that_rounds(case, framework, monkeypatch):
    """Both frameworks stay within the bounds of tests/kernel/test_bfloat16.py."""
    if not kernels.bfloat16():
        pytest.skip("fused needs the instruction")
    draws = [parity.without_head(each).astype(np.float32) for each in CASES[case]]
    of_framework = {"torch": torch_cell, "jax": jax_cell}[framework]
    run = of_framework("fused", draws[0].cell, "bfloat16").run
    actual = [run(each) for each in draws]
    exact = [implementations.equations(each.astype(np.float64), np.float64) for each in draws]
    monkeypatch.setattr(implementations, "oracle", rounding_oracle())
    expected = [implementations.equations(each.astype(np.float64), np.float64) for each in draws]
    names = [each for each in expected[0] if not each.startswith(("logits", "loss", "d head."))]
    result = apart(
        *([{n: each[n] for n in names} for each in all_] for all_ in (actual, expected, exact))
    )
    assert max(result.values()) < MOST, result


@pytest.mark.parametrize("marked", ["not long", pytest.param("long", marks=pytest.mark.long)])
def test_the_frameworks_on_the_matrix_unit(marked, emulated_kernel):
    """Another process runs these tests on the emulated kernel; a process loads one kernel."""
    products = f"{__file__}::{test_products_in_bfloat16_agree_with_the_oracle_that_rounds.__name__}"
    tests = [products, "tests/kernel/test_bfloat16.py::test_twins"]
    command = [sys.executable, "-m", "tools.emulation", str(emulated_kernel.parent)]
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")}
    ran = subprocess.run(
        [*command, "-m", marked, *tests],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


YARDSTICKS = (parity.NN_GRU, parity.SIMPLE_CELL, *parity.LOOPS.values())


@pytest.mark.parametrize("yardstick", YARDSTICKS, ids=lambda each: each.name)
def test_every_reference_is_right(yardstick):
    """An error in a yardstick would remain undetected: bounds are twice its rounding errors."""
    cases = [draws for draws in CASES.values() if yardstick.can(draws[0], "float64")]
    if yardstick is parity.SIMPLE_CELL:  # XLA takes seconds to compile each case.
        cases = [draws for draws in cases if draws[0].name in ("ties, zeros, unsorted", "long")]
    assert cases
    rows = [row for draws in cases for row in parity.check(yardstick, draws, "float64")]
    assert [row for row in rows if not row.passed or row.is_excess] == []


@pytest.mark.parametrize("size", parity.RESETS, ids=lambda size: size.name)
def test_sequences_begin_within_rows_in_both_directions(size):
    """Every draw has a reset within a row, and without it the results of both directions differ."""
    for seed in range(parity.DRAWS):
        case = parity.draw(size, False, seed)
        assert case.resets is not None
        live = np.arange(len(case.resets))[:, None] < case.lengths
        inner = case.resets & live
        inner[0] = False
        assert 0 < inner.sum() < live[1:].sum()
        step, row = np.argwhere(inner)[0]
        without = replace(case, resets=case.resets & ~inner)
        changed = [
            np.abs(a - b).max(-1)
            for a, b in zip(forward_and_backward(case), forward_and_backward(without), strict=True)
        ]
        forward, backward = (each[:, row] > 1e-3 for each in changed)
        assert not forward[:step].any() and forward[step]
        last = np.argwhere(inner[:, row])[-1, 0]
        assert not backward[last : case.lengths[row]].any() and backward[last - 1]


def forward_and_backward(case):
    """The outputs of the first layer's two directions."""
    first = {n: p for n, p in case.parameters.items() if ".1." not in n and "head" not in n}
    x = case.x if case.tokens is None else case.x[case.tokens]
    states = [None if each is None else each[:2] for each in (case.h0, case.h_reset)]
    run = oracle.forward(
        first, x, case.lengths, states[0], case.resets, states[1], reset_after=case.reset_after
    )
    return np.split(run.outputs, 2, axis=-1)


@pytest.mark.parametrize("peer", [False, True])
@pytest.mark.parametrize("share", [1.02, 4.1])
def test_peer_fails_only_far_above_its_bound(share, peer):
    (case, *_) = CASES["gru, ties, zeros, unsorted, reset after"]
    result = parity.equations(case, np.float64)
    off = share * parity.BOUND_GRADIENT * np.abs(result["d x"]).max()
    result["d x"] = result["d x"] + off
    rows = parity.check(Implementation("off", lambda case: result, peer=peer), (case,), np.float64)
    allowed = peer and share < 4
    assert [row.check for row in rows if not row.passed] == ([] if allowed else ["d x"])
    assert [row.check for row in rows if row.is_excess] == (["d x"] if allowed else [])


def test_implementations_of_other_libraries_are_peers():
    peers = {"torch nn.GRU", "flax.linen.GRUCell", "flax.nnx.GRUCell"}
    assert {name for name, each in IMPLEMENTATIONS.items() if each.peer} == peers
    assert parity.SIMPLE_CELL.peer
