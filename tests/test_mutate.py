"""The mutants of tools/mutate.py: changed, unchanged and invalid code."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import InputError
from tests import ROOT
from tools.mutate import (
    KERNEL,
    TEXT_TESTS,
    Measured,
    Mutant,
    Outcome,
    cpp_mutants,
    draw,
    parts,
    python_mutants,
    table,
)

PYTHON = b'''"""Text 1 < 2."""
def f(a: int = 3, *, b: "1 + 1" = True) -> "2 < 3":
    if a <= 4 and not b:
        g(a, b, c=5)
    x[0] += 1.5
'''
CPP = b"""#define N 3
// i < 4
/* i == 3
   i = i + 4; */
    if (i < 5 && ready) f(i, "6 < 7");
    total = i + 8;
"""


def lines(mutants: Iterator[Mutant], source: bytes) -> set[tuple[str, str]]:
    """Each mutant's kind and the new text of the line that it changes."""
    every = list(mutants)
    assert all(mutant.is_valid(source) for mutant in every)
    return {(each.kind, each.shown(source).split("→ `")[1].rstrip("`")) for each in every}


def test_python_is_changed_by_its_syntax_tree() -> None:
    assert lines(python_mutants("a.py", PYTHON), PYTHON) == {
        ("constant", 'def f(a: int = 4, *, b: "1 + 1" = True) -> "2 < 3":'),
        ("constant", 'def f(a: int = 3, *, b: "1 + 1" = False) -> "2 < 3":'),
        ("boolean", "if a <= 4 or not b:"),
        ("comparison", "if a < 4 and not b:"),
        ("constant", "if a <= 5 and not b:"),
        ("boolean", "if a <= 4 and b:"),
        ("dropped statement", "pass"),
        ("swapped arguments", "g(b, a, c=5)"),
        ("dropped keyword argument", "g(a, b)"),
        ("constant", "g(a, b, c=6)"),
        ("arithmetic", "x[0] -= 1.5"),
        ("constant", "x[1] += 1.5"),
        ("constant", "x[0] += 3.0"),
    }


def test_cpp_is_changed_by_pattern() -> None:
    assert lines(cpp_mutants("a.cpp", CPP), CPP) == {
        ("comparison", 'if (i <= 5 && ready) f(i, "6 < 7");'),
        ("boolean", 'if (i < 5 || ready) f(i, "6 < 7");'),
        ("constant", 'if (i < 6 && ready) f(i, "6 < 7");'),
        ("arithmetic", "total = i - 8;"),
        ("constant", "total = i + 9;"),
        ("dropped statement", ";"),
    }


def test_a_change_that_does_not_parse_is_no_mutant() -> None:
    source = b"f(a, (b))\n"
    (swapped,) = (each for each in python_mutants("a.py", source) if each.kind.startswith("swap"))
    assert swapped.changed(source) == b"f(b, (a))\n" and swapped.is_valid(source)
    assert not Mutant("a.py", "", 0, 2, b"").is_valid(source)
    assert not Mutant("a.py", "", 4, 5, b"  ").is_valid(source)


def test_a_seed_gives_the_same_mutants_and_the_table_has_the_survivors() -> None:
    mutants = draw(["common/metrics.py"], 3, 0)
    assert mutants == draw(["common/metrics.py"], 3, 0)
    outcomes = (
        Outcome("tests/test_a.py::test", 3, 1.0),
        Outcome("", 7, 2.0),
        Outcome("", 5, 3, False),
    )
    text = table(dict(zip(mutants, outcomes, strict=True)))
    assert "| all | 3 | 1 | 1 |" in text
    survivors, undecided = text.split("| survivor |")[1].split("| not decided |")
    for part, tests in ((survivors, 7), (undecided, 5)):
        (line,) = (line for line in part.splitlines() if "→" in line)
        assert line.startswith("| common/metrics.py:") and line.endswith(f"| {tests} |")


def test_fast_tests_and_those_that_find_mutants_come_first() -> None:
    seconds = {"b::slow": 20.0, "b::fast": 0.3, "c::fast": 0.4, "b::faster": 0.2, "d::fails": 0.1}
    measured = Measured(seconds, {"a.py": {3: {*seconds, "e::long"}}}, failing={"d::fails"})
    assert measured.tests("a.py", 3) == ["c::fast", "b::faster", "b::fast", "b::slow"]
    measured.finds.update(["b", "b::fast"])
    assert measured.tests("a.py", 3) == ["b::fast", "b::faster", "c::fast", "b::slow"]
    kernel = dict.fromkeys(["tests/kernel/test_a.py::test", f"{TEXT_TESTS}::test"], 1.0)
    assert Measured(kernel, {}).tests(f"{KERNEL}/gru.cpp", 1) == ["tests/kernel/test_a.py::test"]
    assert parts([*"aabcdea"]) == [[*"aabcd"], [*"ea"]] and parts(["a"]) == [["a"]]


def test_pytest_runs_in_forks_with_time_limits(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/test_a.py").write_text(
        "import time\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert False\n"
        "def test_endless(): time.sleep(60)\n"
    )
    requests = [(["test_a.py::test_right"], {}, None), (["test_a.py::test_wrong"], {}, 30)]
    requests.append((["test_a.py::test_endless"], {"test_a.py::test_endless": 0.1}, 30))
    requests.append((["test_a.py::test_endless"], {}, 0.1))
    program = f"from tools.pytest_server import run; print([run(*each) for each in {requests}])"
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path / "tree",
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout == "[0, 1, 1, None]\n"


def test_a_path_without_a_program_is_refused() -> None:
    with pytest.raises(InputError, match=r"--paths docs/layer.md: no Python or C\+\+ file"):
        draw(["docs/layer.md"], 1, 0)
