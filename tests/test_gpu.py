"""The kernel for GPUs, on one that is emulated: see tests/gpu and docs/gpu.md."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common import kernels
from common.kernels.build import compiler

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(not kernels.available(), reason="the kernels have not been built"),
]


def run(*arguments: object) -> str:
    """A command of ours; returns what it says."""
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.long
def test_the_first_ten_minutes_rehearsed(tmp_path: Path) -> None:
    """Every kernel, in both frameworks, on all sizes of the parity suite."""
    said = run("compare.py", "gpu", "--mock", "--out", tmp_path)
    assert "rehearsed the timing" in said
    rows = json.loads((tmp_path / "results.json").read_text())["parity"]
    assert len(rows) == 90
    assert all(row["passed"] for row in rows)
    names = {row["models"][0] for row in rows}
    kinds = ("Bf16", "Tf32", "Float32")
    assert names == {
        f"{twin} cuda, {kind}, emulated" for twin in ("torch", "jax") for kind in kinds
    }


def test_small_cases() -> None:
    """A few kernels, of one block and of clusters of 2 to 16, in both frameworks."""
    said = run("-m", "pytest", "-q", "--noconftest", "tests/gpu/small.py")
    assert "12 passed" in said


def test_in_use() -> None:
    assert run("-m", "tests.gpu.use").strip() == "all right"
