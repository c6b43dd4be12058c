"""`python compare.py gpu`: the first ten minutes on an NVIDIA GPU.

The kernels are compiled, then checked against the float64 oracle in both frameworks; only where
they are right, they are timed beside everything else that computes a GRU there, and NVIDIA's
compute-sanitizer looks at them at work.

The bounds of parity are argued, as those of parity.py: with factors in full ("Float32") the CPU
kernel's, twice the error of what people trust today. TF32 has 11 bits, so that a factor is rounded
by at most 2^-12 = 2.4e-4 of itself, and results may be off by 3e-4 of the largest a layer;
gradients, which have been through such products on the way there and on the way back, by twice
that. bfloat16 has 8 bits: what its rounding costs is known from scan with the same factors rounded,
and to that, half of a unit in the last place of a bfloat16, 5e-3, is allowed in the same way.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import product

import jax
import numpy as np
import torch

import jax_impl.cuda
import jax_impl.gru
import torch_impl.cuda
import torch_impl.gru
from common.kernels import cuda
from common.kernels.cuda import nvrtc
from common.report.schema import Check, Task
from comparison import parity
from comparison.implementations import Case, Implementation, Layer, Result, equations
from comparison.parity import Size
from comparison.peers import jax as jax_peer
from comparison.peers import torch as torch_peer

FACTORS = tuple(dict.fromkeys(kind for kind, _ in cuda.CONFIGURATIONS))
BOUNDS = {"Tf32": 3e-4, "Bf16": 5e-3}
# The parity suite's, which 64 units hold, and one for each kernel that there is.
LARGE = tuple(
    Size(f"{size} units", 3, 8, size, 1, 1 + (size <= 128), [3, 0, 1, 2, 3], resets=size <= 128)
    for size in (64, 128, 256, 512)
)
SIZES = (*parity.SIZES, *parity.RESETS, *LARGE)
FEW = (*parity.SIZES[2:4], LARGE[0])
TASKS = tuple(
    Task(B, 200, H, backward=backward, bfloat16=bfloat16)
    for H, B in product((64, 128, 256, 512), (32, 64, 128, 256))
    for bfloat16, backward in product((False, True), repeat=2)
)
FAST = ("torch cuda", "jax cuda", "nn.GRU padded", "nn.GRU packed")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SECONDS = 60  # for a tool


@cache  # JAX compiles anew what is not the same function
def layer(gru: Layer, factors: str) -> Layer:
    """A framework's gru, on the kernel."""
    return partial(gru, implementation="cuda", bfloat16=factors == "Bf16")


@dataclass(frozen=True)
class Kernel:
    """The kernel in one framework, with one kind of factors."""

    framework: str
    factors: str

    def run(self, case: Case) -> Result:
        """What compute of the framework's layers module returns, from the kernel."""
        if self.framework == "torch":
            with torch.backends.cudnn.flags(allow_tf32=self.factors != "Float32"):
                return torch_peer.compute(case, layer(torch_impl.gru.gru, self.factors))
        with jax.default_matmul_precision("highest" if self.factors == "Float32" else "default"):
            return jax_peer.compute(case, layer(jax_impl.gru.gru, self.factors))

    def fits(self, hidden: int) -> bool:
        """Whether there is a kernel for so many units here."""
        return cuda.instance(hidden, self.factors, False, False, torch_impl.cuda.arch()) is not None

    def check(self, size: Size, reset_after: bool) -> Check:
        """The tensor of a random case that comes closest to its bound, or goes furthest beyond."""
        name = f"{self.framework} cuda, {self.factors}"
        ours = Implementation(name, self.run, dtypes=("float32",), resets=True)
        # What is of few numbers is drawn several times: see parity.py.
        few = parity.DRAWS if self.factors == "Float32" and size not in LARGE else 1
        draws = tuple(
            parity.without_head(parity.draw(size, reset_after, seed)) for seed in range(few)
        )
        if self.factors == "Float32":
            rows = parity.check(ours, draws, np.float32)
        else:
            (case,) = (each.astype(np.float32) for each in draws)
            # The oracle takes the very numbers of the case.
            full = case.astype(np.float64), np.float64
            exact = equations(*full) if self.factors == "Tf32" else by_rounding(case)
            found, rows = ours.run(case), []
            for tensor, theirs in exact.items():
                error, ulp = parity.difference([found.get(tensor)], [theirs], np.dtype(np.float32))
                passes = 2 if tensor.startswith("d ") else 1
                bound = passes * size.layers * BOUNDS[self.factors]
                rows.append(Check.of([name, "oracle"], tensor, "float32", error, bound, ulp))
        alone = [row for row in rows if not row.check.startswith(("logits", "loss", "d head."))]
        worst = max(alone, key=lambda row: row.strain)
        kind = "after" if reset_after else "before"
        worst.check = f"{size.name}, reset {kind}: {worst.check}"
        return worst


def by_rounding(case: Case) -> Result:
    """scan in PyTorch on the CPU, with factors rounded to bfloat16."""
    layer = partial(torch_impl.gru.gru, implementation="scan", bfloat16=True)
    with torch_peer.on("cpu"):
        return torch_peer.compute(case, layer)


@torch_peer.one_thread()
def check(device: str, report: Callable[[str], object]) -> list[Check]:
    """Compile every kernel and check it on PyTorch's device; returns each case's worst row.

    report is called with a line of text before each step.
    """
    torch_peer.place(device)
    compile_all(report)
    rows = []
    for framework, factors in product(("torch", "jax"), FACTORS):
        kernel = Kernel(framework, factors)
        report(f"checking {framework} cuda, {factors}")
        sizes = SIZES
        if cuda.rehearsed and framework == "jax":  # it is PyTorch's kernel, and XLA compiles long
            sizes = FEW if factors == "Float32" else LARGE[:2]
        for size, reset_after in product(sizes, (False, True)):
            if kernel.fits(size.H):
                rows.append(kernel.check(size, reset_after))
    return rows


def device_name() -> str | None:
    """What the GPU is called; None where there is none for both frameworks."""
    if not torch_impl.cuda.available() or not jax_impl.cuda.available():
        return None
    return torch.cuda.get_device_name()


def compile_all(report: Callable[[str], object]) -> None:
    """Compile every kernel for the device that is here, so that nothing later waits for it."""
    arch = torch_impl.cuda.arch()
    started = time.perf_counter()
    flags = product((False, True), repeat=2)
    for (factors, size), (reset_after, backward) in product(cuda.CONFIGURATIONS, flags):
        if kernel := cuda.instance(size, factors, reset_after, backward, arch):
            nvrtc.ready(kernel, arch)
    report(f"every kernel for sm_{arch[0]}{arch[1]}: {time.perf_counter() - started:.1f} s")


def chosen(name: str, task: Task) -> bool:
    """What is timed on a task: what takes long, and what has no bfloat16, not on all of them."""
    few = task.B == 64 and task.H in (128, 256) and not task.bfloat16
    return name in FAST or (few and not name.endswith((" loop", ", denormals")))


def sanitize(report: Callable[[str], object]) -> bool:
    """NVIDIA's compute-sanitizer on a small case of each framework; whether it found something."""
    if shutil.which("compute-sanitizer") is None:
        report("compute-sanitizer is not there: its checks are left out")
        return False
    found = False
    for tool in TOOLS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        try:
            result = subprocess.run(
                [*command, sys.executable, "-m", "comparison.gpu"],
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            report(f"compute-sanitizer {tool}: no answer in {SECONDS} s")
            continue
        found |= result.returncode == 9
        report(f"compute-sanitizer {tool}: {result.stdout.strip().rpartition(chr(10))[2]}")
    return found


def small() -> None:
    """One case of each kind of factors, for compute-sanitizer to look at."""
    for factors in FACTORS:
        Kernel("torch", factors).check(LARGE[1], False)


if __name__ == "__main__":
    small()
