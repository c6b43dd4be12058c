"""A GPU that is not there: the kernel runs on the CPU, in an emulator, behind a driver of ours."""

import ctypes
import hashlib
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from common.data.cache import cached
from common.kernels import cuda
from common.kernels.build import compiler
from common.kernels.cuda import nvrtc

FOLDER = Path(__file__).parent
SOURCES = ("emulator.h", "mock_cuda.cpp")
H100 = (9, 0)
FLAGS = ("-std=c++17", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-variable")


def build(into: Path, configurations: Iterable[str], flags: Sequence[str] = ("-O1",)) -> Path:
    """Compile the driver, with kernels of these configurations. Raises RuntimeError."""
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler (set CXX)")

    def run(*arguments: str) -> None:
        result = subprocess.run(
            [cxx, *FLAGS, *flags, *arguments], capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise RuntimeError(result.stderr)

    include, names = f'#include "{FOLDER / "mock_cuda.cpp"}"\n', list(configurations)
    sources = [include]
    for some in filter(None, (names[::2], names[1::2])):  # on two cores
        added = "".join(f"ADD({each})\n" for each in some)
        sources.append(f"#define KERNELS\n{include}{added}")
    paths = [into / f"{number}.cpp" for number in range(len(sources))]
    for path, text in zip(paths, sources, strict=True):
        path.write_text(text)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda path: run("-c", str(path), "-o", f"{path}.o"), paths))
    library = into / "libcuda.so.1"
    run("-shared", "-Wl,-soname,libcuda.so.1", *(f"{path}.o" for path in paths), "-o", str(library))
    return library


def every_configuration() -> list[str]:
    """As the template of recurrence.cu takes them, without its last two arguments."""
    return [
        ",".join(map(str, (*key, *configuration)))
        for key, configuration in cuda.CONFIGURATIONS.items()
    ]


def start(
    arch: cuda.Arch = H100,
    configurations: dict[tuple[str, int], tuple[int, int, int]] | None = None,
    sanitizer: str = "",
) -> ctypes.CDLL:
    """From here on in this process, the device is one that is emulated. Returns its driver.

    configurations: instead of cuda.CONFIGURATIONS, such as are built and run sooner; sanitizer: one
    of GCC's, whose library has to be there already (LD_PRELOAD).
    """
    if configurations is not None:
        cuda.CONFIGURATIONS = configurations
    kernel = Path(cuda.__file__).parent
    sources = [FOLDER / name for name in SOURCES]
    sources += [kernel / name for name in ("recurrence.cu", "call.h", "driver.h")]
    everything = b"".join(path.read_bytes() for path in sources)
    wanted = every_configuration()
    sanitized = ("-O0", "-g1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    flags = sanitized if sanitizer else ("-O1",)
    key = {
        "sources": hashlib.sha256(everything).hexdigest(),
        "flags": [*FLAGS, *flags],
        "configurations": wanted,
    }

    def fill(into: Path) -> None:
        build(into, wanted, flags)

    folder = cached("rehearsal", key, fill)
    # By this name the library's own dlopen finds it.
    driver = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    cuda.rehearsed = arch
    # What XLA makes around the kernel runs once or twice: to compile it well takes longer.
    jax.config.update("jax_disable_most_optimizations", True)
    nvrtc.compile = lambda kernel, arch: kernel.template.encode() + b"\0"
    return driver
