"""Builds the CPU kernel, and what launches the GPU's, beside this file.

`python -m common.kernels.build` does so; setup.py calls build().

Needs a C++ compiler (the one CXX names, or c++, g++ or clang++) and nothing else: neither PyTorch's
headers nor Python's. Where jaxlib is installed, its FFI headers add the handlers that JAX calls.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.kernels import LIBRARY
from common.program import start

FOLDER = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
AVX512 = ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mavx2", "-mfma"]
INSTRUCTION_SETS: dict[str, list[str]] = {"baseline": []} | (
    {"avx2": ["-mavx2", "-mfma"], "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}
    if X86
    else {}
)
"""The flags that turn an instruction set on."""
AMX = ["-mamx-tile", "-mamx-bf16", "-mavx512bf16"]
"""The flags of a further instruction set, which not every compiler knows."""
BINDINGS = ("tensors.cpp", "xla.cpp", "cuda/driver.cpp")
SOURCES = [(FOLDER / name, list[str]()) for name in BINDINGS]
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wno-psabi"]


def compiler() -> str | None:
    """Path of the C++ compiler, or None."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    return None


def ffi_flags() -> list[str]:
    """Flags that bring in JAX's FFI headers, found without importing JAX; none without jaxlib."""
    spec = importlib.util.find_spec("jaxlib")
    if spec is None or spec.origin is None:
        return []
    include = Path(spec.origin).with_name("include")
    return ["-isystem", str(include)] if (include / "xla/ffi/api/ffi.h").exists() else []


def amx_flags(cxx: str) -> list[str]:
    """AMX, or none where the compiler, its assembler or the system has no matrix unit."""
    with tempfile.TemporaryDirectory() as folder:
        command = [cxx, *AMX, "-c", "-xc++", "-", "-o", str(Path(folder) / "probe.o")]
        probe = 'asm("tilerelease");'
        known = subprocess.run(command, input=probe, capture_output=True, text=True, check=False)
    return AMX if sys.platform == "linux" and known.returncode == 0 else []


def kernel_sources(amx: Sequence[str]) -> list[tuple[Path, list[str]]]:
    """The sources of gru.h, each with its own flags; `amx` are those of the matrix unit, if any."""
    sets = INSTRUCTION_SETS | ({"amx": [*AVX512, *amx]} if amx else {})
    return [(FOLDER / "gru.cpp", ["-DGRU_AMX"] if amx else [])] + [
        (FOLDER / "instruction_set.cpp", [*flags, f"-DINSTRUCTION_SET={name}"])
        for name, flags in sets.items()
    ]


def build(
    out_dir: str | Path, flags: Sequence[str] = (), amx: Sequence[str] | None = None
) -> Path | None:
    """Compiles the kernel into `out_dir`, with `flags` after FLAGS; returns the library's path.

    `amx` replaces the flags that amx_flags returns. Returns None, and says why on standard error,
    if there is no compiler or it fails.
    """
    cxx = compiler()
    if cxx is None:
        print(
            "kernels: no C++ compiler (set CXX); the scan implementation will run", file=sys.stderr
        )
        return None
    target = Path(out_dir) / LIBRARY
    target.parent.mkdir(parents=True, exist_ok=True)
    # A running process may have the old library mapped: replace the file, do not write into it.
    fresh = target.with_suffix(f".{os.getpid()}")
    try:
        sources = [*kernel_sources(amx_flags(cxx) if amx is None else amx), *SOURCES]
        link(cxx, sources, [*FLAGS, *flags, *ffi_flags()], ["-shared", "-ldl", "-o", str(fresh)])
    except subprocess.CalledProcessError as error:
        fresh.unlink(missing_ok=True)
        print(f"kernels: {' '.join(error.cmd)} failed:\n{error.stderr}", file=sys.stderr)
        return None
    fresh.replace(target)
    return target


def link(
    cxx: str,
    sources: Sequence[tuple[Path, Sequence[str]]],
    flags: Sequence[str],
    last: Sequence[str],
) -> None:
    """Compiles each source with `flags` and its own, in parallel, and links them with `last`.

    Raises subprocess.CalledProcessError if the compiler fails.
    """

    def run(*arguments: str) -> None:
        command = [cxx, *flags, *arguments]
        subprocess.run(command, capture_output=True, text=True, check=True)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(Path(folder) / f"{i}.o") for i in range(len(sources))]
        compiled = [
            pool.submit(run, *own, "-c", str(source), "-o", to)
            for (source, own), to in zip(sources, objects, strict=True)
        ]
        for each in compiled:
            each.result()
        run(*objects, *last)


if __name__ == "__main__":
    start()
    path = build(FOLDER)
    print(path or "kernels: not built")
    sys.exit(path is None)
