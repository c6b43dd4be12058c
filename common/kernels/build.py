"""Builds the CPU kernel, and what launches the GPU's, beside this file.

`python -m common.kernels.build` does so; setup.py calls build().

Needs a C++ compiler (the one CXX names, or c++, g++ or clang++) and nothing else: neither PyTorch's
headers nor Python's. Where jaxlib is installed, its FFI headers add the handlers that JAX calls.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from common.kernels import LIBRARY

NAMES = ("gru.cpp", "tensors.cpp", "xla.cpp", "cuda/driver.cpp")
SOURCES = [Path(__file__).parent / name for name in NAMES]
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-Wno-psabi"]


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


def build(out_dir: str | Path, flags: Sequence[str] = ()) -> Path | None:
    """Compiles the kernel into `out_dir`, with `flags` after FLAGS; returns the library's path.

    Returns None, and says why on standard error, if there is no compiler or it fails.
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
    command = [cxx, *FLAGS, *flags, *ffi_flags(), *map(str, SOURCES), "-ldl", "-o", str(fresh)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        fresh.unlink(missing_ok=True)
        print(f"kernels: {' '.join(command)} failed:\n{result.stderr}", file=sys.stderr)
        return None
    fresh.replace(target)
    return target


if __name__ == "__main__":
    path = build(SOURCES[0].parent)
    print(path or "kernels: not built")
    sys.exit(path is None)
