"""The kernel with the matrix unit emulated in plain loops (emulated_tiles.h)."""

import ctypes
from pathlib import Path

from common.kernels import LIBRARY
from common.kernels.build import compiler, kernel_sources, link

HEADER = Path(__file__).with_name("emulated_tiles.h")
FLAGS = ["-O0", "-include", str(HEADER)]
"""Flags of every source: optimised, they would take five times as long to compile."""
AMX = ["-D__AMX_BF16__", "-O2"]
"""Flags of the instruction set that uses the tiles, as common.kernels.build takes them."""


def build_kernel(folder: Path) -> Path | None:
    """The kernel without its bindings; None without a compiler."""
    cxx, path = compiler(), folder / LIBRARY
    if cxx is None:
        return None
    flags = ["-std=c++17", "-fPIC", "-pthread", "-Wno-psabi", *FLAGS]
    link(cxx, kernel_sources(AMX), flags, ["-shared", "-ldl", "-o", str(path)])
    return path


def fault(library: ctypes.CDLL) -> str | None:
    """The first fault that the emulation has recorded; None if the library has no emulation."""
    if not hasattr(library, "emulated_tiles_fault"):
        return None
    library.emulated_tiles_fault.restype = ctypes.c_char_p
    found = library.emulated_tiles_fault()
    return found and found.decode()
