"""The kernel for GPUs, on one that is emulated: see tests/gpu and docs/gpu.md."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from common import kernels
from common.kernels.build import compiler

ROOT = Path(__file__).parents[1]
QUICKLY = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "xdist.plugin"}  # to begin
SMALL = ("-m", "pytest", "-q", "--noconftest", "tests/gpu/small.py")
pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(not kernels.available(), reason="the kernels have not been built"),
]


def run(*arguments: object, before: Sequence[str] = (), **environment: str) -> str:
    """A command of ours; returns what it says."""
    command = [*before, sys.executable, *map(str, arguments)]
    result = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | QUICKLY | environment,
    )
    assert result.returncode == 0, result.stdout
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
    assert "22 passed" in run(*SMALL)


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_the_kernel_does_nothing_that_it_must_not(sanitizer: str) -> None:
    """The same in PyTorch but for the largest, under GCC's sanitizers."""
    names = ("tsan",) if sanitizer == "thread" else ("asan", "ubsan")
    asked = [[str(compiler()), f"-print-file-name=lib{name}.so"] for name in names]
    paths = [subprocess.check_output(each, text=True).strip() for each in asked]
    if not all(map(os.path.isabs, paths)):
        pytest.skip(f"the compiler has no {sanitizer} sanitizer")
    # ThreadSanitizer does not get on with the address randomisation of new kernels.
    fixed = ["setarch", "-R"] if sanitizer == "thread" else []
    if fixed and subprocess.run(["bash", "-c", "setarch -R true"], check=False).returncode:
        pytest.skip("setarch -R is refused")
    options = {
        "SANITIZER": sanitizer,
        "LD_PRELOAD": " ".join(paths),
        # A fiber is no thread that AddressSanitizer could have a stack for; there are many of them.
        "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1:history_size=4:ignore_noninstrumented_modules=1",
    }
    assert "16 passed" in run(*SMALL, "-s", "-k", "torch", before=fixed, **options)


def test_in_use() -> None:
    assert run("-m", "tests.gpu.use").strip() == "all right"
