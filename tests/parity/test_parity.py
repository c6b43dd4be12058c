"""Every implementation of both twins, and the frameworks' own GRUs, against the oracle."""

import pytest

from comparison import parity

IMPLEMENTATIONS = {each.name: each for each in parity.implementations()}
CASES = {
    f"{draws[0].name}, reset {'after' if draws[0].reset_after else 'before'}": draws
    for draws in parity.cases()
}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_everything_agrees_with_the_oracle(case, dtype):
    draws = CASES[case]
    able = [each for each in IMPLEMENTATIONS.values() if each.supports(draws[0])]
    rows = [row for each in able for row in parity.check(each, draws, dtype)]
    assert [row for row in rows if not row["passed"]] == []
    # Each result and each gradient was there to be compared.
    assert {row["check"] for row in rows} == parity.equations(draws[0], dtype).keys()
