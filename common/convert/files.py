"""Flat dicts of arrays in .safetensors, .npz and .pt files."""

import io
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from common import files
from common.errors import InputError

Arrays = dict[str, np.ndarray]


def read_tensors(path: Path) -> Arrays:
    """The tensors in a file, whose format its suffix says; nothing in it is ever executed.

    A file without any suffix is taken for one of torch.save, which does not ask for one.

    Raises InputError, naming the file, if it is missing, damaged or has another suffix, or if a .pt
    file holds anything but tensors and NumPy arrays under names.
    """
    decode, _ = _codec(path) if path.suffix else CODECS[".pt"]
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    # Damaged bytes make the three libraries raise exceptions of a dozen kinds.
    except Exception as error:
        raise InputError(f"{path}: not a readable {path.suffix or '.pt'} file ({error})") from error


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a file whose format its suffix says: all of it or, after an error, nothing.

    Raises InputError, naming the file, if it has another suffix or cannot be written.
    """
    _, encode = _codec(path)
    # safetensors and torch take it for granted that arrays are contiguous and in native byte order.
    native = {
        key: np.ascontiguousarray(value, value.dtype.newbyteorder("="))
        for key, value in tensors.items()
    }
    try:
        files.replace(path, encode(native))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def _decode_npz(data: bytes) -> Arrays:
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        return dict(archive)


def _encode_npz(tensors: Arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **tensors)  # type: ignore[arg-type]
    return buffer.getvalue()


def _decode_pt(data: bytes) -> Arrays:
    import torch

    # Old state_dicts hold NumPy arrays, and NumPy 1 knew their constructor by another name.
    reconstruct: Any = np.zeros(0).__reduce__()[0]
    constructors: list[Callable | tuple[Callable, str]] = [
        (reconstruct, "numpy.core.multiarray._reconstruct"),
        (reconstruct, "numpy._core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        np.dtypes.Float16DType,
        np.dtypes.Float32DType,
        np.dtypes.Float64DType,
    ]
    try:
        with torch.serialization.safe_globals(constructors):
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise
        raise InputError(
            f"refused: it wants to load {refused[1]}, and only plain tensors are loaded"
        ) from error
    if not isinstance(state, Mapping):
        raise InputError(f"holds a {type(state).__name__}, expected a dict of tensors")
    tensors = {}
    for key, value in state.items():
        if not isinstance(value, torch.Tensor | np.ndarray):
            raise InputError(f"{key} is a {type(value).__name__}, expected a tensor")
        tensors[str(key)] = value.detach().numpy() if isinstance(value, torch.Tensor) else value
    return tensors


def _encode_pt(tensors: Arrays) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, buffer)
    return buffer.getvalue()


CODECS: dict[str, tuple[Callable[[bytes], Arrays], Callable[[Arrays], bytes]]] = {
    ".safetensors": (safetensors.numpy.load, safetensors.numpy.save),
    ".npz": (_decode_npz, _encode_npz),
    ".pt": (_decode_pt, _encode_pt),
}


def _codec(path: Path) -> tuple[Callable[[bytes], Arrays], Callable[[Arrays], bytes]]:
    if path.suffix not in CODECS:
        raise InputError(f"{path}: unknown kind of file, expected one of {', '.join(CODECS)}")
    return CODECS[path.suffix]
