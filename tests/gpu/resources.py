"""What NVRTC makes of the kernel, which takes no GPU: registers, and what a step executes.

    python -m tests.gpu.resources [sm_90]

prints a line for each kernel. Counts are of the code of the loop over time, with branches that a
step may skip, and are those of one warp.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.kernels.cuda import CONFIGURATIONS, Arch, Instance, instance, nvrtc

ARCHS = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0)}


@dataclass(frozen=True)
class Resources:
    """Of a kernel: bytes of the stack and spilled, instructions that name local memory; then those
    of a step: all, mma, barriers of threads (bar.sync), waits for other blocks, stores to them."""

    registers: int
    stack: int
    spilled: int
    local: int
    instructions: int
    products: int
    barriers: int
    waits: int
    stores: int


def kernels(arch: Arch, factors: str, size: int) -> Iterator[Instance]:
    """Those of a configuration, if the device has it: both resets, forward and backward."""
    for reset_after in (False, True):
        for backward in (False, True):
            kernel = instance(size, factors, reset_after, backward, arch)
            if kernel is not None and kernel.size == size:
                yield kernel


def of_a_wheel(pattern: str) -> Path | None:
    """The first such file of NVIDIA's wheels."""
    package = importlib.util.find_spec("nvidia")
    folders = package.submodule_search_locations if package else None
    return next((path for each in folders or () for path in Path(each).glob(pattern)), None)


def nvdisasm() -> str | None:
    """The disassembler, if there is one."""
    wheel = of_a_wheel("*/bin/nvdisasm")
    return str(wheel) if wheel else shutil.which("nvdisasm")


def resources(kernel: Instance, arch: Arch) -> Resources:
    """Raises as nvrtc.compiled does, and RuntimeError without the disassembler."""
    folder, program = nvrtc.compiled(kernel, arch), nvdisasm()
    if program is None:
        raise RuntimeError("no nvdisasm")
    log = (folder / "log.txt").read_text()

    def said(pattern: str) -> int:
        found = re.findall(pattern, log)
        if not found:
            raise RuntimeError(f"the compiler does not say: {pattern}")
        return sum(map(int, found))

    listing = subprocess.run(
        [program, "-c", str(folder / "kernel.cubin")], capture_output=True, text=True, check=True
    ).stdout
    code, step = code_and_step(listing)

    def count(pattern: str, lines: list[str] = step) -> int:
        return sum(bool(re.search(pattern, line)) for line in lines)

    return Resources(
        said(r"Used (\d+) registers"),
        said(r"(\d+) bytes stack frame"),
        said(r"(\d+) bytes spill"),
        count(r"\b(LDL|STL)\b", code),
        len(step),
        count(r"\bHMMA\b"),
        count(r"\bBAR\.SYNC\b"),
        count(r"\bSYNCS\.PHASECHK\b"),
        count(r"\bSTAS\b"),
    )


def code_and_step(listing: str) -> tuple[list[str], list[str]]:
    """All instructions, and those of the loop over time: the shortest with every mma in it. Behind
    the function's end, there are only the loops that wait for a barrier."""
    code: list[str] = []
    labels = {}
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*);", line):
            code.append(instruction[1])
    products = [at for at, line in enumerate(code) if "HMMA" in line]
    end_of_all = next(at for at in range(products[-1], len(code)) if "EXIT" in code[at])
    loops = []
    for end, line in enumerate(code[:end_of_all]):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if target and labels[target[1]] <= products[0] and products[-1] <= end:
            loops.append(code[labels[target[1]] : end + 1])
    return code, min(loops, key=len)


def main() -> None:
    """Print the counts."""
    arch = ARCHS[sys.argv[1] if len(sys.argv) > 1 else "sm_90"]
    for key in CONFIGURATIONS:
        for kernel in kernels(arch, *key):
            print(f"{kernel.template:34}", resources(kernel, arch))


if __name__ == "__main__":
    main()
