"""Runs pytest on a kernel whose matrix unit is emulated in plain loops (emulated_tiles.h).

    python -m tools.emulation FOLDER ARGUMENTS OF PYTEST

FOLDER caches the kernel, which replaces the installed one in both frameworks. The exit status is
not 0 if a test fails, or if the emulation has recorded a fault or no product.
"""

import ctypes
import sys
from pathlib import Path

from common import kernels
from common.kernels import LIBRARY
from common.kernels.build import X86, build

POSSIBLE = X86 and sys.platform == "linux"
"""Whether the emulation compiles. Otherwise, the flags build the kernel without it."""
HEADER = Path(__file__).with_name("emulated_tiles.h")
FLAGS = ["-O0", *(["-include", str(HEADER)] if POSSIBLE else [])]
"""The flags of every source. Optimization would take five times as long to compile."""
AMX = ["-D__AMX_BF16__", "-O2"] if POSSIBLE else []
"""The additional flags of the instruction set "amx"; see common.kernels.build."""


def build_once(folder: Path) -> Path | None:
    """The kernel in this folder, which is built unless it exists. None if it cannot be built."""
    path = folder / LIBRARY
    return path if path.exists() else build(folder, FLAGS, AMX)


def fault(library: ctypes.CDLL | None) -> str | None:
    """The first fault that the emulation has recorded; None if the library has no emulation."""
    if not hasattr(library, "emulated_tiles_fault"):
        return None
    library.emulated_tiles_fault.restype = ctypes.c_char_p
    message = library.emulated_tiles_fault()
    return message and message.decode()


def main() -> None:
    import pytest

    folder, *arguments = sys.argv[1:]
    path = build_once(Path(folder))
    if path is None:
        sys.exit(2)
    kernels.PATH = path
    status = pytest.main(arguments)
    library = kernels.library()
    if not (status or library.emulated_tiles_products()):
        sys.exit("error: no test used the tiles")
    sys.exit(int(status) or fault(library))


if __name__ == "__main__":
    main()
