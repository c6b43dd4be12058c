"""The lists of planted faults fit the code as it is; the commands themselves take minutes."""

import pytest

from tools import planted_faults
from tools.gpu.planted_faults import FAULTS

ALL = [*planted_faults.FAULTS, *FAULTS]


@pytest.mark.parametrize("fault", ALL, ids=lambda fault: fault.name)
def test_each_can_be_planted(fault: planted_faults.Fault) -> None:
    assert (planted_faults.ROOT / fault.file).read_text().count(fault.old) == 1
    assert fault.new != fault.old


def test_every_line_of_the_table_is_read() -> None:
    texts = [text for fault in planted_faults.FAULTS for text in (fault.old, fault.new) if text]
    lines = planted_faults.TABLE.strip().splitlines()
    changed = sum(text.count("\n") + 1 for text in texts)
    assert len(lines) == changed + len(planted_faults.FAULTS) + sum(
        each[0] == "@" for each in lines
    )


def test_pytest_runs_as_they_run_it() -> None:
    """With the options of pyproject.toml, whatever plugin they belong to."""
    command = ("-m", "pytest", "--collect-only", *planted_faults.KERNEL_TESTS)
    status, output = planted_faults.python(planted_faults.ROOT, *command)
    assert status == 0, output


def test_names_are_unique() -> None:
    for faults in (planted_faults.FAULTS, FAULTS):
        names = [fault.name for fault in faults]
        assert len(set(names)) == len(names)
