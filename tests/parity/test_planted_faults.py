"""The parity suite's own check is checked: each fault planted in an implementation fails it."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_impl.gru
import torch_impl.gru
from common.cells import Recurrence
from comparison.implementations import Case, Implementation
from comparison.parity import RESETS, SIZES, check, draw
from comparison.peers.jax import jax_cell
from comparison.peers.torch import OURS, torch_cell
from tests.cases import combinations

SIZE = next(size for size in SIZES if size.name == "ties, zeros, unsorted")
DRAWS = {after: tuple(draw(SIZE, after, seed) for seed in range(4)) for after in (False, True)}
DTYPES = ("float64", "float32")

Gates = tuple[np.ndarray, np.ndarray, np.ndarray]


def in_parameters(change: Callable[..., Gates], ending: str = "") -> Callable[[Case], Case]:
    """The fault of an implementation that reads the gates z, r, n of its parameters wrongly."""

    def fault(case: Case) -> Case:
        parameters = {
            name: np.concatenate(change(*np.split(value, 3)))
            if name.startswith("gru.") and name.endswith(ending)
            else value
            for name, value in case.parameters.items()
        }
        return replace(case, parameters=parameters)

    return fault


FAULTS = {
    "r and z swapped": in_parameters(lambda z, r, n: (r, z, n)),
    "z of the other sign": in_parameters(lambda z, r, n: (-z, r, n)),
    "b_z dropped": in_parameters(lambda z, r, n: (0 * z, r, n), "bias_ih"),
    "b_r dropped": in_parameters(lambda z, r, n: (z, 0 * r, n), "bias_ih"),
    "b_n dropped": in_parameters(lambda z, r, n: (z, r, 0 * n), "bias_ih"),
    "c_z dropped": in_parameters(lambda z, r, n: (0 * z, r, n), "bias_hh"),
    "c_r dropped": in_parameters(lambda z, r, n: (z, 0 * r, n), "bias_hh"),
    "c_n dropped": in_parameters(lambda z, r, n: (z, r, 0 * n), "bias_hh"),
    "the other reset": lambda case: replace(case, reset_after=not case.reset_after),
    "h0 ignored": lambda case: replace(case, h0=0 * case.h0),
}


def failed(implementation: Implementation, reset_after: bool, dtype: str) -> set[str]:
    """The names of the results and gradients that do not pass."""
    rows = check(implementation, DRAWS[reset_after], dtype)
    return {row.check for row in rows if not row.passed}


# PyTorch's, whose loop has a yardstick of its own: these faults are planted in what they are given.
each_implementation = pytest.mark.parametrize("implementation", [*map(torch_cell, OURS)], ids=OURS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


# scan has the yardstick of fused; and each dtype takes one kind of reset by default.
@combinations(
    "000 011 200 211",
    implementation=[*map(torch_cell, OURS)],
    reset_after=(False, True),
    dtype=DTYPES,
)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_equations_fails(implementation, fault, reset_after, dtype):
    faulty = replace(implementation, run=lambda case: implementation.run(FAULTS[fault](case)))
    missed = {"outputs", "h_last", "loss", "d x"} - failed(faulty, reset_after, dtype)
    assert missed == set()


TWINS = {
    "torch": (torch_cell, torch_impl.gru, torch_impl.layers, torch.cat),
    "jax": (jax_cell, jax_impl.gru, jax_impl.layers, jnp.concatenate),
}


@pytest.mark.parametrize(
    ("twin", "recurrence", "reset_after", "dtype"),
    [
        *product(["torch"], ["loop", "scan"], [False, True], DTYPES),
        pytest.param("jax", "scan", True, "float64", marks=pytest.mark.long),
    ],
)
def test_a_backward_direction_that_starts_at_the_padding_fails(
    twin, recurrence, reset_after, dtype, monkeypatch
):
    make, module, layers, join = TWINS[twin]
    correct = module.RECURRENCES[recurrence].compute

    def faulty(call):
        outputs, h_last = correct(call)
        others, last = correct(call._replace(lengths=call.lengths * 0 + call.steps))
        H, mask = call.h0.shape[-1], layers.within(call.lengths, call.steps)[..., None]
        outputs = join([outputs[..., :H], others[..., H:] * mask], -1)
        return outputs, join([h_last[:1], last[1:]], 0)

    assert failed(make(recurrence), reset_after, dtype) == set()
    monkeypatch.setitem(module.RECURRENCES, recurrence, Recurrence(faulty))
    assert {"outputs", "h_last", "d x", "d h0"} <= failed(make(recurrence), reset_after, dtype)


RESET_FAULTS = {
    "resets ignored": lambda case: replace(case, resets=np.zeros_like(case.resets)),
    "a step late": lambda case: replace(case, resets=np.roll(case.resets, 1, 0)),
    "h0 for h_reset": lambda case: replace(case, h_reset=case.h0),
}


@each_dtype
@pytest.mark.parametrize("fault", RESET_FAULTS)
@each_implementation
def test_a_fault_in_resets_fails(implementation, fault, dtype):
    draws = tuple(draw(RESETS[0], False, seed) for seed in range(4))
    faulty = replace(implementation, run=lambda case: implementation.run(RESET_FAULTS[fault](case)))
    assert [row for row in check(implementation, draws, dtype) if not row.passed] == []
    wrong = {row.check for row in check(faulty, draws, dtype) if not row.passed}
    assert {"outputs", "h_last", "d x", "d h_reset"} - wrong == set()


TENSOR_FAULTS = {
    "one entry off": lambda a: (
        a * np.where(np.abs(a) == np.abs(a).max(), 1 + 5e-5, 1).astype(a.dtype)
    ),
    "missing": lambda a: None,
    "NaN": lambda a: np.where(np.abs(a) == np.abs(a).max(), np.nan, a),
    "wrong shape": lambda a: a[None],
    "wrong dtype": lambda a: a.astype(np.float16),
}


@each_dtype
@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_a_fault_in_any_one_tensor_fails(fault, dtype):
    case = DRAWS[True][0]
    result = torch_cell("scan").run(case.astype(dtype))
    for name, value in result.items():
        faulty = result | {name: TENSOR_FAULTS[fault](value)}
        rows = check(Implementation("faulty", lambda _, faulty=faulty: faulty), (case,), dtype)
        assert [row.check for row in rows if not row.passed] == [name]
