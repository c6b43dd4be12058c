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
from pathlib import Path

from common.kernels.cuda import CONFIGURATIONS, Arch, Instance, instance, nvrtc

ARCHS = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0)}


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


def resources(kernel: Instance, arch: Arch) -> dict[str, int]:
    """Of a kernel: registers, bytes of the stack and spilled; then those of a step: instructions,
    mma, barriers of threads, waits for other blocks. Raises as nvrtc.compiled does."""
    folder = nvrtc.compiled(kernel, arch)
    # Local memory is the stack's.
    said = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*"
        r"Used (\d+) registers",
        (folder / "log.txt").read_text(),
        re.DOTALL,
    )
    assert said, "the compiler says something else"
    stack, stores, loads, registers = map(int, said.groups())
    command = [str(nvdisasm()), "-c", str(folder / "kernel.cubin")]
    step = of_a_step(subprocess.check_output(command, text=True))
    wanted = {"products": "HMMA", "barriers": "BAR.SYNC", "waits": "SYNCS.PHASECHK"}
    counts = {name: sum(word in line for line in step) for name, word in wanted.items()}
    found = {"registers": registers, "stack": stack, "spilled": stores + loads}
    return found | {"instructions": len(step)} | counts


def of_a_step(listing: str) -> list[str]:
    """The instructions of the loop over time: the shortest with every mma in it. Behind the
    function's end, there are only the loops that wait for a barrier."""
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
    return min(loops, key=len)


def main() -> None:
    """Print the counts."""
    arch = ARCHS[sys.argv[1] if len(sys.argv) > 1 else "sm_90"]
    for key in CONFIGURATIONS:
        for kernel in kernels(arch, *key):
            print(f"{kernel.template:34}", resources(kernel, arch))


if __name__ == "__main__":
    main()
