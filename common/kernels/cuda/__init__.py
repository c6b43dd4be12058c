"""The GRU's recurrence on NVIDIA GPUs (recurrence.cu).

This module selects the kernel for a layer; nvrtc.py compiles it at its first use, trial.py tries it
and driver.cpp launches it. The factors of products are rounded to TF32 ("Tf32") or bfloat16
("Bf16"), or split into two TF32 numbers ("Float32"), which preserves float32 but for the last bits.
Sums and everything else are float32.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

from common import kernels
from common.cells import dtype_name
from common.errors import InputError
from common.extras import MissingPackage, require

Arch = tuple[int, int]
"""The compute capability of a device, (9, 0) for an H100."""
rehearsed: Arch | None = None
"""In a rehearsal, the device that the mock driver emulates; its arrays are those of the CPU."""

# The blocks of a cluster, the groups of 16 units in a block, and the warps that share the products
# of a group: the smallest numbers with which the recurrent weights fit into the registers.
CONFIGURATIONS = {
    ("Bf16", 64): (1, 4, 1),
    ("Bf16", 128): (1, 8, 1),
    ("Bf16", 256): (4, 4, 2),
    ("Bf16", 512): (16, 2, 4),
    ("Tf32", 64): (1, 4, 1),
    ("Tf32", 128): (2, 4, 2),
    ("Tf32", 256): (8, 2, 4),
    ("Tf32", 512): (16, 2, 4),
    ("Float32", 64): (1, 4, 2),
    ("Float32", 128): (2, 4, 2),
    ("Float32", 256): (8, 2, 4),
}
ROWS = 8  # of the batch, for each cluster


class Call(ctypes.Structure):
    """The struct Call of call.h."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("projections", "weight_hh", "bias_hh", "h0", "h_reset"),
                *("tokens", "lengths", "resets", "outputs", "h_last", "saved"),
                *("d_outputs", "d_h_last", "d_a", "d_q", "d_h0", "d_h_reset"),
            )
        ),
        *((name, ctypes.c_int) for name in ("steps", "batch", "hidden", "distinct", "directions")),
        ("reverse", ctypes.c_int * 2),
    ]


@dataclass(frozen=True)
class Instance:
    """A kernel: an instance of the template of recurrence.cu."""

    factors: str
    size: int
    """The units of the kernel, at least those of the layer; weights of additional units are 0."""
    reset_after: bool
    backward: bool

    @property
    def configuration(self) -> tuple[int, int, int]:
        """The value of CONFIGURATIONS."""
        return CONFIGURATIONS[self.factors, self.size]

    @property
    def threads(self) -> int:
        """The threads of a block."""
        _, groups, parts = self.configuration
        return 32 * groups * parts

    @property
    def shared_bytes(self) -> int:
        """The shared memory of a block; recurrence.cu asserts the same value."""
        _, groups, parts = self.configuration
        vector = self.size // (2 if self.factors == "Bf16" else 1)
        words = vector * ((3 if self.reset_after else 2) if self.backward else 1)
        partials = groups * parts * (1 if self.backward else 3) * 128 if parts > 1 else 0
        biases = 0 if self.backward or vector // parts < 128 else 3 * 16 * groups
        return 4 * (2 * ROWS * (words + (0 if words % 32 else 16)) + partials + biases) + 32

    @property
    def template(self) -> str:
        """The arguments of the template."""
        flags = (str(flag).lower() for flag in (self.reset_after, self.backward))
        return ",".join((self.factors, str(self.size), *map(str, self.configuration), *flags))


def instance(
    hidden: int, factors: str, reset_after: bool, backward: bool, arch: Arch
) -> Instance | None:
    """The kernel for this number of hidden units on a device, or None."""
    for (kind, size), (cluster, *_) in CONFIGURATIONS.items():
        if kind == factors and hidden <= size and (cluster == 1 or arch >= (9, 0)):
            return Instance(factors, size, reset_after, backward) if arch >= (8, 0) else None
    return None


def units(hidden: int | None) -> int | None:
    """The units of the smallest kernel for a hidden size; one more than the largest if none fits.

    torch.compile may make the hidden size symbolic; the results are constants.
    """
    if hidden is None:
        return None
    sizes = sorted({size for _, size in CONFIGURATIONS})
    return next((size for size in sizes if hidden <= size), sizes[-1] + 1)


@cache
def library() -> Any:
    """The loaded library, with the declarations of driver.cpp's functions."""
    lib = kernels.library()
    if lib is None:
        raise RuntimeError(
            "the kernels' library has not been built: python -m common.kernels.build"
        )
    lib.gru_cuda_add.argtypes = [
        *(ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64),
        *(ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ]
    lib.gru_cuda_add.restype = None
    lib.gru_cuda_launch.argtypes = [ctypes.c_char_p, ctypes.POINTER(Call), ctypes.c_void_p]
    lib.gru_cuda_error.restype = ctypes.c_char_p
    return lib


def launch(key: str, call: Call, stream: int | None) -> None:
    """Run a kernel on a stream of the current device. Raises RuntimeError for an error of CUDA."""
    status = library().gru_cuda_launch(key.encode(), call, stream)
    if status:
        raise RuntimeError(f"the GRU on the GPU: {library().gru_cuda_error(status).decode()}")


def driver() -> int:
    """The newest version of CUDA that the driver supports, such as 13000.

    Returns 0 without a driver, and if the environment variable GRU_TWINS_CUDA is "off". Raises
    InputError for any other value of this variable.
    """
    switch = os.environ.get("GRU_TWINS_CUDA", "")
    if switch not in ("", "off"):
        raise InputError(f'GRU_TWINS_CUDA: expected "off" or nothing, found "{switch}"')
    # An older build of the library lacks the function.
    is_available = not switch and hasattr(kernels.library(), "gru_cuda_driver")
    return library().gru_cuda_driver() if is_available else 0


def check_size(steps: int, batch: int, hidden: int, distinct: int, directions: int) -> None:
    """Raise ValueError if an array has more numbers than the 32-bit indices of the kernel reach."""
    if max(steps * batch * max(5, directions), 3 * distinct) * hidden >= 2**32:
        raise ValueError(
            "the GRU on the GPU keeps at most 2^32 numbers in an array: a smaller batch, shorter "
            'sequences or implementation="scan"'
        )


def installed() -> bool:
    """Whether the packages of the extra cuda are installed. If not, a warning names the extra."""
    try:
        require("cuda", what="the GRU kernel for GPUs is not used: ")
    except MissingPackage as error:
        warnings.warn(str(error), stacklevel=2)
        return False
    return True


def served(device: str, dtype: Any) -> bool:
    """Whether the kernel supports arrays of a device type ("gpu" in JAX) and dtype."""
    is_supported = ("cuda" if device == "gpu" else device) == ("cpu" if rehearsed else "cuda")
    return is_supported and dtype_name(dtype) in ("float32", "bfloat16")
