"""The CPU kernel under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

import shutil
import subprocess
from pathlib import Path

import pytest

from common.kernels.build import FOLDER, compiler, kernel_sources, link
from tools import emulation

DRIVER = Path(__file__).with_name("sanitizers.cpp")


@pytest.mark.long
@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_kernel_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    flags = [*emulation.FLAGS, "-O1", "-g1", "-std=c++17", "-pthread", "-Wno-psabi"]
    flags += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", f"-I{FOLDER}"]
    program = tmp_path / sanitizer
    sources = [*kernel_sources(emulation.AMX), (DRIVER, [])]
    try:
        link(str(compiler()), sources, flags, ["-ldl", "-o", str(program)])
    except subprocess.CalledProcessError as error:
        if "cannot find" in error.stderr:
            pytest.skip(f"the compiler has no {sanitizer} sanitizer")
        pytest.fail(error.stderr)
    # ThreadSanitizer fails with the address space randomization of recent Linux kernels.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    ran = subprocess.run([*fixed, str(program)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
