"""`python compare.py gpu` without a GPU: the kernel runs on the CPU, in an emulator.

python -m tools.gpu.rehearsal            a minute or two; exit status 1 where a check fails

All kernels are compiled and checked in both frameworks, and what is timed runs once. The emulator
stands behind a driver of this project, in place of libcuda; a C++ compiler builds both.
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
    """Compile the driver, with these templates of recurrence.cu. Raises RuntimeError."""
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
    """From here on in this process, the device is one that is emulated. Returns its driver.

    sanitizer: one of GCC's, whose library has to be there already (LD_PRELOAD).
    """
    sources = [*FOLDER.glob("*.*"), *Path(cuda.__file__).parent.glob("*.*")]
    everything = b"".join(path.read_bytes() for path in sorted(sources))
    flags = product((False, True), repeat=2)
    kernels = [cuda.Instance(*key, *each).template for each in flags for key in cuda.CONFIGURATIONS]
    checked = ["-O0", "-g1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    how = checked if sanitizer else ["-O1"]
    key = {"of": [hashlib.sha256(everything).hexdigest(), how, kernels]}
    folder = cached("rehearsal", key, partial(build, kernels=kernels, flags=how))
    trial.program = ["-m", "tools.gpu.trial", str(folder / LIBRARY), repr(cuda.CONFIGURATIONS)]
    return load(folder / LIBRARY)


def load(library: Path) -> ctypes.CDLL:
    """Make the device of this process one that this driver emulates."""
    # By this name the library's own dlopen finds it.
    driver = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    cuda.rehearsed = H100
    # What XLA makes around the kernel runs once or twice: to compile it well takes longer.
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
    print(f"ran what is timed: {', '.join(names)}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
