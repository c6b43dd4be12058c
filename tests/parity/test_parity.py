"""Every implementation of both twins, and the frameworks' own GRUs, against the oracle."""

import numpy as np
import pytest

from comparison import parity

IMPLEMENTATIONS = {each.name: each for each in parity.implementations()}
CASES = {
    f"{case.cell}, {case.name}, reset {'after' if case.reset_after else 'before'}": (case, *others)
    for case, *others in parity.cases()
}


# bfloat16 is float32, rounded once: a few cases show that it is.
ROUNDED = ("gru, ties", "gru, resets, distinct tokens", "rnn, ties")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, marks=() if few else pytest.mark.long)
        for dtype in ("float64", "float32", "bfloat16")
        for case in CASES
        for few in [dtype != "bfloat16" or case.startswith(ROUNDED)]
    ],
)
def test_everything_agrees_with_the_oracle(case, dtype, request):
    if dtype == "float64":  # whose bounds do not hang on how XLA rounds
        request.getfixturevalue("quick_compilation")
    draws = CASES[case]
    able = [each for each in IMPLEMENTATIONS.values() if each.can(draws[0], dtype)]
    rows = [row for each in able for row in parity.check(each, draws, dtype)]
    assert [row for row in rows if not row.passed] == []
    # Each result and each gradient was there to be compared.
    names = parity.equations(draws[0], np.float64).keys()
    if dtype == "bfloat16":  # of the cell alone
        head = ("logits", "loss", "d head")
        names = {name for name in names if not name.startswith(head)}
    assert {row.check for row in rows} == names
