"""The GPU's kernel in the emulator (tests/gpu), under the sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from common.kernels.build import compiler

PROGRAM = Path(__file__).parent / "gpu/sanitize.cpp"
# Few fibers return from their functions, and there are many of them.
OPTIONS = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=0",
    "TSAN_OPTIONS": "history_size=4",
}


@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_the_kernel_does_nothing_that_it_must_not(sanitizer: str, tmp_path: Path) -> None:
    # ThreadSanitizer does not get on with the address randomisation of new kernels.
    fixed = ["setarch", "-R"] if sanitizer == "thread" else []
    if fixed and (not shutil.which("setarch") or run([*fixed, "true"]).returncode):
        pytest.skip("setarch -R is refused")
    flags = ["-O0", "-g1", "-std=c++17", "-Wno-unknown-pragmas", f"-fsanitize={sanitizer}"]
    flags += ["-fno-sanitize-recover=all"]
    program = tmp_path / "sanitize"
    built = run([str(compiler()), *flags, str(PROGRAM), "-o", str(program)])
    if "cannot find" in built.stderr:
        pytest.skip(f"the compiler has no {sanitizer} sanitizer")
    assert built.returncode == 0, built.stderr
    ran = run([*fixed, str(program)])
    assert ran.returncode == 0, ran.stdout + ran.stderr


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=os.environ | OPTIONS, capture_output=True, text=True, check=False
    )
