"""Checks and times the GPU kernels: `python compare.py gpu`, the first ten minutes on a GPU.

All kernels are compiled and checked against the float64 oracle in both frameworks. If all checks
pass, the kernels are timed together with the other GRUs on the GPU, and NVIDIA's compute-sanitizer
examines them.

The bounds are argued, as those of parity.py. With float32 factors, they are those of the CPU
kernel: twice the error of the implementations that are trusted today. TF32 has 11 bits, so a factor
is rounded by at most 2^-12 = 2.4e-4 of its value; results may differ by 3e-4 of the largest value
per layer, and gradients, which pass through such products in both directions, by twice as much.
bfloat16 has 8 bits; the reference is scan with the same rounded factors, and half a unit in the
last place of a bfloat16, 5e-3, is allowed in the same way.
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
# The sizes of the parity suite, for which the kernel of 64 units suffices, and one for each kernel.
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
SECONDS = 60  # the limit for one tool


@cache  # JAX compiles a new function again
def layer(gru: Layer, factors: str) -> Layer:
    """A framework's gru, computed by the kernel."""
    return partial(gru, implementation="cuda", bfloat16=factors == "Bf16")


@dataclass(frozen=True)
class Kernel:
    """The kernel in a framework, with a precision of the factors of its products."""

    framework: str
    factors: str

    def run(self, case: Case) -> Result:
        """Results and gradients of the kernel."""
        if self.framework == "torch":
            with torch.backends.cudnn.flags(allow_tf32=self.factors != "Float32"):
                return torch_peer.compute(case, layer(torch_impl.gru.gru, self.factors))
        with jax.default_matmul_precision("highest" if self.factors == "Float32" else "default"):
            return jax_peer.compute(case, layer(jax_impl.gru.gru, self.factors))

    def fits(self, hidden: int) -> bool:
        """Whether this GPU has a kernel for this number of units."""
        return cuda.instance(hidden, self.factors, False, False, torch_impl.cuda.arch()) is not None

    def check(self, size: Size, reset_after: bool) -> Check:
        """Check a random case; returns the row of the largest error relative to its bound."""
        name = f"{self.framework} cuda, {self.factors}"
        ours = Implementation(name, self.run, dtypes=("float32",), resets=True)
        # Small tensors need several draws: see parity.py.
        few = parity.DRAWS if self.factors == "Float32" and size not in LARGE else 1
        draws = tuple(
            parity.without_head(parity.draw(size, reset_after, seed)) for seed in range(few)
        )
        if self.factors == "Float32":
            rows = parity.check(ours, draws, np.float32)
        else:
            (case,) = (each.astype(np.float32) for each in draws)
            # The oracle computes with the rounded numbers of the case.
            full = case.astype(np.float64), np.float64
            exact = equations(*full) if self.factors == "Tf32" else by_rounding(case)
            actual, rows = ours.run(case), []
            for tensor, value in exact.items():
                error, ulp = parity.difference([actual.get(tensor)], [value], np.dtype(np.float32))
                passes = 2 if tensor.startswith("d ") else 1
                bound = passes * size.layers * BOUNDS[self.factors]
                rows.append(Check.of([name, "oracle"], tensor, "float32", error, bound, ulp))
        alone = [row for row in rows if not row.check.startswith(("logits", "loss", "d head."))]
        worst = max(alone, key=lambda row: row.strain)
        kind = "after" if reset_after else "before"
        worst.check = f"{size.name}, reset {kind}: {worst.check}"
        return worst


def by_rounding(case: Case) -> Result:
    """The results of scan in PyTorch on the CPU, with factors rounded to bfloat16."""
    layer = partial(torch_impl.gru.gru, implementation="scan", bfloat16=True)
    with torch_peer.on("cpu"):
        return torch_peer.compute(case, layer)


@torch_peer.one_thread()
def check(device: str, report: Callable[[str], object]) -> list[Check]:
    """Compile and check every kernel on a device of PyTorch; returns a row per case.

    report receives lines of progress.
    """
    torch_peer.place(device)
    compile_all(report)
    rows = []
    for framework, factors in product(("torch", "jax"), FACTORS):
        kernel = Kernel(framework, factors)
        report(f"checking {framework} cuda, {factors}")
        sizes = SIZES
        if cuda.rehearsed and framework == "jax":  # PyTorch's kernel; XLA takes long to compile
            sizes = FEW if factors == "Float32" else LARGE[:2]
        for size, reset_after in product(sizes, (False, True)):
            if kernel.fits(size.H):
                rows.append(kernel.check(size, reset_after))
    return rows


def device_name() -> str | None:
    """The name of the GPU; None unless both frameworks find one."""
    if not torch_impl.cuda.available() or not jax_impl.cuda.available():
        return None
    return torch.cuda.get_device_name()


def compile_all(report: Callable[[str], object]) -> None:
    """Compile every kernel for this GPU, so that no later step waits for it."""
    arch = torch_impl.cuda.arch()
    started = time.perf_counter()
    flags = product((False, True), repeat=2)
    for (factors, size), (reset_after, backward) in product(cuda.CONFIGURATIONS, flags):
        if kernel := cuda.instance(size, factors, reset_after, backward, arch):
            nvrtc.ready(kernel, arch)
    report(f"every kernel for sm_{arch[0]}{arch[1]}: {time.perf_counter() - started:.1f} s")


def chosen(name: str, task: Task) -> bool:
    """Whether a contender is timed on a task; slow ones and those without bfloat16 on few tasks."""
    few = task.B == 64 and task.H in (128, 256) and not task.bfloat16
    return name in FAST or (few and not name.endswith((" loop", ", denormals")))


def sanitize(report: Callable[[str], object]) -> None:
    """Run a small case under NVIDIA's compute-sanitizer."""
    if shutil.which("compute-sanitizer") is None:
        report("compute-sanitizer is not installed: its checks are left out")
        return
    for tool in TOOLS:
        command = ["compute-sanitizer", "--tool", tool]
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
        report(f"compute-sanitizer {tool}: {result.stdout.strip().rpartition(chr(10))[2]}")


if __name__ == "__main__":  # the small case
    for factors in FACTORS:
        Kernel("torch", factors).check(LARGE[1], False)
