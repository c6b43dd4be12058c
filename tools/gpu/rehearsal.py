"""Rehearses `python compare.py gpu` without a GPU: an emulator runs the kernel on the CPU.

Compiles and checks all kernels in both frameworks, and runs each timed contender once. A mock
driver with the emulator replaces libcuda; a C++ compiler builds both. The exit status is 1 if a
check fails.
"""

if __name__ == "__main__":
    from common import program

    program.start("torch", "jax", "report")

import ctypes
import hashlib
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import jax

from common.cache import cached
from common.errors import InputError, exit_on_input_error
from common.kernels import cuda
from common.kernels.build import compiler
from common.kernels.cuda import nvrtc, trial
from common.report.schema import Task

FOLDER = Path(__file__).parent
H100 = (9, 0)
LIBRARY = "libcuda.so.1"
TASK = Task(8, 2, 64, bfloat16=True)
FLAGS = ("-std=c++20", "-fPIC", "-shared", f"-Wl,-soname,{LIBRARY}")


def build(into: Path, kernels: Iterable[str], flags: Sequence[str] = ("-O1",)) -> None:
    """Compile the driver with these instances of recurrence.cu. Raises RuntimeError."""
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler (set CXX)")
    text = f'#include "{FOLDER / "mock_cuda.cpp"}"\n'
    for i, each in enumerate(kernels):
        text += f'static bool a{i} = add<{each.split(",")[2]}, Kernel<{each}>>("{each}");\n'
    (into / "driver.cpp").write_text(text)
    command = [cxx, *FLAGS, *flags, "driver.cpp", "-o", LIBRARY]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=into)
    if result.returncode:
        raise RuntimeError(result.stderr or f"{cxx}: exit status {result.returncode}")


def start(sanitizer: str = "") -> ctypes.CDLL:
    """Make the device of this process an emulated one. Returns its driver.

    sanitizer: a sanitizer of GCC, whose library must be preloaded (LD_PRELOAD).
    """
    sources = [*FOLDER.glob("*.*"), *Path(cuda.__file__).parent.glob("*.*")]
    everything = b"".join(path.read_bytes() for path in sorted(sources))
    flags = product((False, True), repeat=2)
    kernels = [cuda.Instance(*key, *each).template for each in flags for key in cuda.CONFIGURATIONS]
    sanitized = ["-O0", "-g1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    options = sanitized if sanitizer else ["-O1"]
    key = {"of": [hashlib.sha256(everything).hexdigest(), options, kernels]}
    folder = cached("rehearsal", key, partial(build, kernels=kernels, flags=options))
    trial.program = ["-m", "tools.gpu.trial", str(folder / LIBRARY), repr(cuda.CONFIGURATIONS)]
    return load(folder / LIBRARY)


def load(library: Path) -> ctypes.CDLL:
    """Make the device of this process the one that this driver emulates."""
    # The dlopen of driver.cpp finds the loaded library by its soname.
    driver = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    cuda.rehearsed = H100
    # The rest of an XLA program runs once or twice; optimizing it takes longer.
    jax.config.update("jax_disable_most_optimizations", True)
    nvrtc.compile = lambda kernel, arch: kernel.template.encode() + b"\0"
    nvrtc.version = lambda: (0, 0)
    return driver


def main() -> None:
    """The command line."""
    try:
        start()
    except RuntimeError as error:
        reason = str(error).strip().rpartition("\n")[2]
        raise InputError(f"the emulated GPU cannot be compiled: {reason}") from None
    from comparison import contenders, gpu

    rows = gpu.check("cpu", print)
    failed = [row for row in rows if not row.passed]
    for row in failed:
        print(f"parity check failed: {row}")
    print(f"{len(rows) - len(failed)} of {len(rows)} parity checks passed")
    names = [name for name in contenders.start("torch")[0] if gpu.chosen(name, TASK)]
    for name in names:
        contenders.ready(name, TASK)
    print(f"ran the timed contenders once: {', '.join(names)}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
