"""The GPU kernel on the emulated GPU of tools/gpu: see docs/gpu.md."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from common import kernels
from common.arguments import product_dtype
from common.kernels import cuda
from common.kernels.build import compiler
from comparison import gpu
from tests import ROOT

# pytest starts sooner without plugins.
FEW_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "xdist.plugin"}
pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(not kernels.available(), reason="the kernels have not been built"),
]


def run(*arguments: object, before: Sequence[str] = (), **environment: str) -> str:
    """Run Python with these arguments; returns its standard output."""
    command = [*before, sys.executable, *map(str, arguments)]
    env = os.environ | FEW_PLUGINS | environment
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("factors", gpu.FACTORS)
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_kernel_uses_requested_factors(
    framework: str, factors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both frameworks select the kernel by settings of the process during the call."""
    layers, twin = getattr(gpu, f"{framework}_peer"), getattr(gpu, f"{framework}_impl").cuda
    monkeypatch.setattr(
        layers,
        "compute",
        lambda _, layer: twin.factors_of(product_dtype(layer.keywords["bfloat16"])),
    )
    case: Any = None
    assert gpu.Kernel(framework, factors).run(case) == factors


@pytest.mark.long
def test_rehearsal_passes_all_parity_checks() -> None:
    """Every kernel, in both frameworks, on all sizes of the parity suite."""
    output = run("-m", "tools.gpu.rehearsal").splitlines()
    kinds = {factors for factors, _ in cuda.CONFIGURATIONS}
    for twin, kind in product(("torch", "jax"), kinds):
        assert f"checking {twin} cuda, {kind}" in output
    assert output[-2] == "90 of 90 parity checks passed"
    assert output[-1] == "ran the timed contenders once: torch cuda, nn.GRU padded, nn.GRU packed"


@pytest.mark.parametrize(
    ("sanitizer", "kinds", "number"),
    [
        ("thread", "(Tf32-63-False or Float32-31-True or Bf16-31-True)", 4),
        pytest.param("thread", "test", 17, marks=pytest.mark.long),
        pytest.param("address,undefined", "test", 17, marks=pytest.mark.long),
    ],
)
def test_kernel_under_sanitizers(sanitizer: str, kinds: str, number: int) -> None:
    """The tests of small.py in PyTorch, without the largest kernel, under GCC's sanitizers. The
    default case has all factors, both resets, one block and clusters of 2 and 4, one part and
    several."""
    names = ("tsan",) if sanitizer == "thread" else ("asan", "ubsan")
    requested = [[str(compiler()), f"-print-file-name=lib{name}.so"] for name in names]
    paths = [subprocess.check_output(each, text=True).strip() for each in requested]
    if not all(map(os.path.isabs, paths)):
        pytest.skip(f"the compiler has no {sanitizer} sanitizer")
    # ThreadSanitizer fails with the address space randomization of recent Linux kernels.
    fixed = ["setarch", "-R"] if sanitizer == "thread" else []
    if fixed and subprocess.run(["bash", "-c", "setarch -R true"], check=False).returncode:
        pytest.skip("setarch -R is refused")
    options = {
        "SANITIZER": sanitizer,
        "LD_PRELOAD": " ".join(paths),
        # AddressSanitizer has no stacks for fibers, of which there are many.
        "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1:history_size=4:ignore_noninstrumented_modules=1",
    }
    only = ("-m", "pytest", "-qs", "-n0", "--noconftest", "tests/gpu/small.py", "-k")
    output = run(*only, f"test_torch and {kinds}", before=fixed, **options)
    assert f"{number} passed" in output


# A process that uses the GRU on the emulated GPU and prints a line for each child process.
PROCESS = """
import subprocess, sys
from common.kernels import cuda
from tools.gpu import rehearsal
cuda.CONFIGURATIONS = {("Tf32", 16): (1, 1, 1)}
rehearsal.start()
class Child(subprocess.Popen):
    def __init__(self, command, **options):
        if "tools.gpu.trial" in command:
            print("a child", flush=True)
        super().__init__(command, **options)
subprocess.Popen = Child
print(__import__(sys.argv[1], fromlist=["gru"]).gru.CELL.resolve("auto", "cpu", "float32", 15))
"""


@pytest.mark.long
@pytest.mark.parametrize(("fault", "expected"), [("", "cuda"), ("crash", "scan")])
@pytest.mark.parametrize("twin", ["torch_impl", "jax_impl"])
def test_two_processes_at_once(twin: str, fault: str, expected: str, tmp_path: Path) -> None:
    """One process tries the kernel; both use its verdict."""
    env = {"MOCK_FAULT": fault, "GRU_TWINS_CACHE": str(tmp_path)}
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(run, "-c", PROCESS, twin, **env) for _ in range(2)]
        output = "".join(each.result() for each in both).split("\n")
    assert sorted(output) == ["", "a child", expected, expected]


@pytest.mark.long
def test_small_cases_and_use() -> None:
    """A few kernels, with one block and with clusters of 2 to 16, and tests of other files."""
    few = {
        "tests/gpu/small.py": "test",
        "tests/layers/test_modules.py": "torch_modules or torch_export or compile or recomputed"
        " or packed or drop or no_time or wrong_length",
        "tests/layers/test_arguments.py": "cuda or numbers",
        "tests/parity/test_derivatives.py": "torch_func or of_a_grad or (jax_transf and grad)",
    }
    chosen = " or ".join(f"({Path(file).name} and ({names}))" for file, names in few.items())
    output = run("-m", "pytest", "-q", "-n0", *few, "-k", chosen)
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed[1]) > 150, output
