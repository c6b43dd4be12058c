"""Compiles recurrence.cu at its first use with NVRTC, which needs no GPU."""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from common.cache import cached
from common.errors import InputError
from common.kernels.cuda import Arch, Instance, library

FOLDER = Path(__file__).parent
HEADERS = ("call.h", "device.h")


@cache
def ready(kernel: Instance, arch: Arch) -> str:
    """Compile a kernel for a device and register it with driver.cpp, once in a process.

    Returns the key by which driver.cpp launches it. Raises as `compile` does.
    """
    image = compile(kernel, arch)
    key = f"{kernel.template},sm_{arch[0]}{arch[1]}"
    cluster = kernel.configuration[0]
    sizes = (len(image), cluster, kernel.threads, kernel.shared_bytes)
    library().gru_cuda_add(key.encode(), image, *sizes)
    return key


def compile(kernel: Instance, arch: Arch) -> bytes:
    """The machine code, from the cache if it can be written.

    Raises InputError without NVRTC, RuntimeError with NVRTC's log if it fails.
    """
    version()  # raises InputError, which below means that the cache cannot be written
    try:
        return (compiled(kernel, arch) / "kernel.cubin").read_bytes()
    except InputError:
        return _compile(_options(kernel, arch))[0]


def compiled(kernel: Instance, arch: Arch) -> Path:
    """The cache folder with the machine code, kernel.cubin, and the compiler's log, log.txt.

    Raises InputError if the cache cannot be written, and as `compile` does.
    """
    options = _options(kernel, arch)
    key = {
        "source": hashlib.sha256(b"".join(_sources())).hexdigest(),
        "options": options,
        "nvrtc": version(),
    }

    def build(into: Path) -> None:
        image, log = _compile(options)
        (into / "kernel.cubin").write_bytes(image)
        (into / "log.txt").write_text(log)

    return cached("cubin", key, build)


def version() -> tuple[int, int]:
    """NVRTC's version. Raises InputError without NVRTC."""
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # the package, or its library, is missing
        reason = str(error).partition("\n")[0]
        raise InputError(f"NVRTC, which the extra cuda installs, is missing ({reason})") from None
    return major, minor


def _sources() -> list[bytes]:
    return [(FOLDER / name).read_bytes() for name in ("recurrence.cu", *HEADERS)]


def _options(kernel: Instance, arch: Arch) -> list[str]:
    return [
        "--std=c++17",
        f"--gpu-architecture=sm_{arch[0]}{arch[1]}",
        "--ptxas-options=-v",
        f"-DINSTANCE={kernel.template}",
        f"-DTHREADS={kernel.threads}",
        f"-DSHARED={kernel.shared_bytes}",
    ]


def _compile(options: list[str]) -> tuple[bytes, str]:
    """The machine code and the log."""
    from cuda.bindings import nvrtc

    def call(function: Callable[..., tuple], *arguments: Any) -> Any:
        status, *results = function(*arguments)
        if status:
            raise RuntimeError(f"NVRTC: {status.name}")
        return results[0] if results else None

    source, *headers = _sources()
    names = [name.encode() for name in HEADERS]
    program = call(nvrtc.nvrtcCreateProgram, source, b"recurrence.cu", len(names), headers, names)
    encoded = [option.encode() for option in options]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), encoded)
    log = bytes(call(nvrtc.nvrtcGetProgramLogSize, program))
    call(nvrtc.nvrtcGetProgramLog, program, log)
    text = log.rstrip(b"\0").decode()
    if status:
        raise RuntimeError(f"NVRTC: {text.strip().partition(chr(10))[0] or status.name}")
    image = bytes(call(nvrtc.nvrtcGetCUBINSize, program))
    call(nvrtc.nvrtcGetCUBIN, program, image)
    return image, text
