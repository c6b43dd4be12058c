"""The GPU's kernel in the emulator (tests/gpu), under the sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from common.kernels.build import compiler

PROGRAM = Path(__file__).parent / "gpu/sanitize.cpp"
FLAGS = ["-O0", "-g1", "-std=c++17", "-Wno-unknown-pragmas", "-fno-sanitize-recover=all"]
# A fiber is no thread that AddressSanitizer could have a stack for; there are many of them.
OPTIONS = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=0",
    "TSAN_OPTIONS": "history_size=4",
}


@pytest.fixture(params=["thread", "address,undefined"])
def program(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """What runs the kernel. Built here: what does not compile is no finding of sanitizers."""
    cxx = compiler()
    if cxx is None:
        pytest.skip("needs a C++ compiler")
    # ThreadSanitizer does not get on with the address randomisation of new kernels.
    fixed = ["setarch", "-R"] if request.param == "thread" else []
    if fixed and (not shutil.which("setarch") or run([*fixed, "true"]).returncode):
        pytest.skip("setarch -R is refused")
    path = str(tmp_path / "sanitize")
    built = run([cxx, *FLAGS, f"-fsanitize={request.param}", str(PROGRAM), "-o", path])
    if "cannot find" in built.stderr:
        pytest.skip(f"the compiler has no {request.param} sanitizer")
    assert built.returncode == 0, built.stderr
    return [*fixed, path]


def test_the_kernel_does_nothing_that_it_must_not(program: list[str]) -> None:
    ran = run(program)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=os.environ | OPTIONS, capture_output=True, text=True, check=False
    )
