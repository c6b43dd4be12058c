"""The list of tests/planted_faults.py fits the code as it is; the command itself takes minutes."""

import planted_faults
import pytest


@pytest.mark.parametrize("fault", planted_faults.FAULTS, ids=lambda fault: fault.name)
def test_each_can_be_planted(fault: planted_faults.Fault) -> None:
    assert (planted_faults.ROOT / fault.file).read_text().count(fault.old) == 1
    assert fault.new != fault.old


def test_names_are_unique() -> None:
    names = [fault.name for fault in planted_faults.FAULTS]
    assert len(set(names)) == len(names)
