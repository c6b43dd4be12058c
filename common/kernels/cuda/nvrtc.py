"""Compiles recurrence.cu at first use: NVRTC needs no GPU."""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from common.cache import cached
from common.kernels.cuda import Arch, Instance, library

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
    """Its machine code. Raises as `compiled` does."""
    return (compiled(kernel, arch) / "kernel.cubin").read_bytes()


def compiled(kernel: Instance, arch: Arch) -> Path:
    """The folder with its machine code, kernel.cubin, and what the compiler says of it, log.txt.

    Raises ImportError without NVRTC, RuntimeError with its log if it fails.
    """
    from cuda.bindings import nvrtc

    def call(function: Callable[..., tuple], *given: Any) -> Any:
        status, *found = function(*given)
        if status:
            raise RuntimeError(f"NVRTC: {status.name}")
        return found[0] if found else None

    folder = Path(__file__).parent
    source, *headers = ((folder / name).read_bytes() for name in ("recurrence.cu", *HEADERS))
    options = [
        "--std=c++17",
        f"--gpu-architecture=sm_{arch[0]}{arch[1]}",
        "--ptxas-options=-v",
        f"-DINSTANCE={kernel.template}",
        f"-DTHREADS={kernel.threads}",
        f"-DSHARED={kernel.shared_bytes}",
    ]
    key = {
        "source": hashlib.sha256(b"".join((source, *headers))).hexdigest(),
        "options": options,
        "nvrtc": nvrtc.nvrtcVersion()[1:],
    }

    def build(into: Path) -> None:
        names = [name.encode() for name in HEADERS]
        program = call(
            nvrtc.nvrtcCreateProgram, source, b"recurrence.cu", len(names), headers, names
        )
        (status,) = nvrtc.nvrtcCompileProgram(
            program, len(options), [option.encode() for option in options]
        )
        log = bytes(call(nvrtc.nvrtcGetProgramLogSize, program))
        call(nvrtc.nvrtcGetProgramLog, program, log)
        text = log.rstrip(b"\0").decode()
        if status:
            raise RuntimeError(f"NVRTC: {text.strip().partition(chr(10))[0] or status.name}")
        image = bytes(call(nvrtc.nvrtcGetCUBINSize, program))
        call(nvrtc.nvrtcGetCUBIN, program, image)
        (into / "kernel.cubin").write_bytes(image)
        (into / "log.txt").write_text(text)

    return cached("cubin", key, build)
