"""Reads and writes flat dicts of arrays as .safetensors, .npz and .pt files."""

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from common import files
from common.convert.layout import FLOATS
from common.errors import InputError

Arrays = dict[str, np.ndarray]
SUFFIXES = (".safetensors", ".npz", ".pt")


def read_tensors(path: Path) -> Arrays:
    """The tensors in a file, whose suffix determines its format; no code in it is executed.

    A file without a suffix is read as a .pt file, as are .pth, .ckpt and .bin.

    Nested dicts in a .pt file are flattened: {"state_dict": {"a": …}} becomes "state_dict.a".
    Values that are neither tensors nor NumPy arrays are skipped. bfloat16, which NumPy lacks,
    becomes float32.

    Raises InputError, with the file, if it is missing, damaged or has another suffix, or if a .pt
    file contains no dict or loads anything but plain data.
    """
    suffix = ".pt" if path.suffix in ("", ".pth", ".ckpt", ".bin") else path.suffix
    _check(path, suffix)
    try:
        content = path.read_bytes()
        if suffix == ".pt":
            return _parse_pt(content)
        if suffix == ".safetensors":
            return _parse_safetensors(content)
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            # NumPy saves an array of bfloat16 as "V2".
            return {
                name: (v.view("<u2").astype("<u4") << 16).view("<f4") if v.dtype == "V2" else v
                for name, v in archive.items()
            }
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # the libraries raise a dozen types for damaged files
        raise InputError(f"{path}: not a readable {suffix} file ({error})") from error


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a file atomically; its suffix determines the format.

    Raises InputError, with the file, if it has another suffix or cannot be written.
    """
    _check(path, path.suffix)
    # safetensors and torch require contiguous arrays in native byte order.
    native: dict[str, Any] = {
        key: np.ascontiguousarray(value, value.dtype.newbyteorder("="))
        for key, value in tensors.items()
    }
    buffer = io.BytesIO()
    if path.suffix == ".safetensors":
        buffer.write(safetensors.numpy.save(native))
    elif path.suffix == ".npz":
        np.savez(buffer, **native)
    else:
        import torch

        torch.save({key: torch.from_numpy(value) for key, value in native.items()}, buffer)
    with files.writing(path):
        files.replace(path, buffer.getvalue())


def _check(path: Path, suffix: str) -> None:
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: unknown suffix, expected one of {', '.join(SUFFIXES)}")


def _parse_pt(content: bytes) -> Arrays:
    import torch

    # Old state_dicts contain NumPy arrays, whose constructor has another name in NumPy 1.
    reconstruct: Any = np.zeros(0).__reduce__()[0]
    dtypes = np.dtypes.Float16DType, np.dtypes.Float32DType, np.dtypes.Float64DType
    constructors: list[Any] = [(reconstruct, "numpy.core.multiarray._reconstruct")]
    constructors += [reconstruct, np.ndarray, np.dtype, *dtypes]
    try:
        with torch.serialization.safe_globals(constructors):
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise
        raise InputError(
            f"refused: the file loads {refused[1]}, only plain tensors are allowed"
        ) from error
    if not isinstance(state, Mapping):
        raise InputError(f"contains a {type(state).__name__}, expected a dict of tensors")
    tensors: Arrays = {}
    visited = {id(state)}

    def unpack(content: Mapping[Any, Any], prefix: str) -> None:
        for key, value in content.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{prefix}{key}"] = _to_numpy(value)
            elif isinstance(value, np.ndarray):
                tensors[f"{prefix}{key}"] = value
            elif isinstance(value, Mapping) and id(value) not in visited:  # dicts may be cyclic
                visited.add(id(value))
                unpack(value, f"{prefix}{key}.")

    unpack(state, "")
    return tensors


def _parse_safetensors(content: bytes) -> Arrays:
    try:
        return safetensors.numpy.load(content)
    except KeyError:  # a dtype that NumPy lacks
        from safetensors.torch import load

        return {name: _to_numpy(value) for name, value in load(content).items()}


def _to_numpy(tensor: Any) -> np.ndarray:
    known = not tensor.is_floating_point() or str(tensor.dtype).removeprefix("torch.") in FLOATS
    return (tensor if known else tensor.float()).detach().numpy()
