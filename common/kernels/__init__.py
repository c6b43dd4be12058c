"""The CPU kernel of the GRU layer (gru.h, gru.cpp), loaded through ctypes.

`pip install` and `python -m common.kernels.build` build the library beside this file. The package
can be imported without the library; available() tells whether it was loaded.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from common.errors import InputError

DTYPES = ("float32", "float64")
CELLS = {"gru": (4, 5), "rnn": (2, 2)}
"""The cells, in gru.h's order: the numbers saved per unit and step, by reset_after."""
ALWAYS, WHILE_SPINNING = 1, 2  # openmp of gru.h
LIBRARY = "libgru.dylib" if sys.platform == "darwin" else "libgru.so"
PATH = Path(__file__).parent / LIBRARY


class Problem(ctypes.Structure):
    """gru_problem of gru.h."""

    _fields_ = [
        ("steps", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("distinct", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("resets", ctypes.c_void_p),
        ("is_double", ctypes.c_int32),
        ("reset_after", ctypes.c_int32),
        ("nn_order", ctypes.c_int32),
        ("directions", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("openmp", ctypes.c_int32),
        ("bfloat16", ctypes.c_int32),
        ("cell", ctypes.c_int32),
        ("d_x", ctypes.c_void_p),
    ]


class Direction(ctypes.Structure):
    """gru_direction of gru.h."""

    _fields_ = [
        ("reverse", ctypes.c_int32),
        ("ld_outputs", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "weight_ih",
                "weight_hh",
                "bias_ih",
                "bias_hh",
                "h0",
                "h_reset",
                "outputs",
                "h_last",
                "saved",
                "d_outputs",
                "d_h_last",
                "d_weight_ih",
                "d_weight_hh",
                "d_bias_ih",
                "d_bias_hh",
                "d_h0",
                "d_h_reset",
            )
        ),
    ]


ERRORS = {
    1: ValueError("lengths: expected values in 0..T, T being the number of time steps"),
    2: ValueError("tokens: expected values in 0..K - 1, there being K distinct inputs"),
    3: MemoryError("the GRU kernel could not allocate its working memory"),
}


@cache
def library() -> ctypes.CDLL | None:
    """The loaded kernel, or None if it has not been built or does not load here."""
    try:
        lib = ctypes.CDLL(str(PATH))
    except OSError:
        return None
    for function in (lib.gru_forward, lib.gru_backward):
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    lib.gru_saved_size.argtypes = [*[ctypes.c_int64] * 3, ctypes.c_int32, ctypes.c_int32]
    lib.gru_saved_size.restype = ctypes.c_int64
    lib.gru_instruction_set.argtypes = [ctypes.c_char_p]
    lib.gru_instruction_set.restype = ctypes.c_char_p
    return lib


def available() -> bool:
    """Whether the kernel can be used in this process."""
    return library() is not None


def bfloat16() -> bool:
    """gru_bfloat16 of gru.h; false without the kernel."""
    lib = library()
    return lib is not None and bool(lib.gru_bfloat16())


def threads() -> int:
    """GRU_NUM_THREADS, by default the number of cores. Raises InputError for an invalid value."""
    number = os.environ.get("GRU_NUM_THREADS") or str(os.cpu_count() or 1)
    if not (number.isdecimal() and 0 < int(number) < 2**16):
        raise InputError(f"GRU_NUM_THREADS: expected a number of threads, found {number}")
    return int(number)


def forward(problem: Problem, directions: ctypes.Array[Direction]) -> None:
    """gru_forward of gru.h. Raises the exception of its status."""
    run("gru_forward", problem, directions)


def backward(problem: Problem, directions: ctypes.Array[Direction]) -> None:
    """gru_backward of gru.h. Raises the exception of its status."""
    run("gru_backward", problem, directions)


def run(function: str, problem: Problem, directions: ctypes.Array[Direction]) -> None:
    """Call gru_forward or gru_backward."""
    lib = library()
    if lib is None:
        raise RuntimeError("the GRU kernel has not been built: python -m common.kernels.build")
    status = getattr(lib, function)(ctypes.byref(problem), directions)
    if status:
        raise ERRORS[status]


@cache
def of_tensors(kind: type) -> Callable[..., int] | None:
    """gru_tensors_forward of tensors.cpp for a type of tensors, without its first argument.

    None if the kernel has not been built or the type lacks DLPack's exchange API.
    """
    capsule = getattr(kind, "__dlpack_c_exchange_api__", None)
    known = hasattr(library(), "gru_tensors_forward")  # an older library
    if not known or capsule is None:
        return None
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.argtypes, pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    # PyDLL keeps Python's lock.
    function = ctypes.PyDLL(str(PATH)).gru_tensors_forward
    function.argtypes = [ctypes.c_void_p, ctypes.py_object, *[ctypes.c_int] * 8]
    return partial(function, pointer(capsule, b"dlpack_exchange_api"))


def cell_index(cell: str) -> int:
    """The number that stands for a cell in gru.h."""
    return [*CELLS].index(cell)


def saved_size(steps: int, batch: int, hidden: int, reset_after: bool, cell: str = "gru") -> int:
    """gru_saved_size of gru.h, for sizes that may be symbolic."""
    return steps * batch * hidden * CELLS[cell][reset_after]
