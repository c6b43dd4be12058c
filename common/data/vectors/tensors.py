"""Reads a .safetensors file whose words are in vocabulary.txt in the same folder, one per line.

A run directory has this layout: vectors.safetensors, or model.safetensors if the vectors were
trained. If a file has several tensors, `vectors` or `vectors.weight` is read.
"""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from common.data.vectors.lookup import Entries, ToVector, read_table
from common.errors import InputError


def looks_like(head: bytes) -> bool:
    """Whether `head` begins a .safetensors file: the length of a JSON object, and the object."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32


def read(path: Path, unpacked: Path) -> tuple[Entries, ToVector]:
    """The entries of a file; `unpacked` is `path` or, if that is compressed, its unpacked copy.

    Raises InputError for a damaged file, and if vocabulary.txt is missing or does not match.
    """
    vocabulary = path.with_name("vocabulary.txt")
    try:
        words = vocabulary.read_text(encoding="utf-8").split("\n")[:-1]
    except OSError as error:
        raise InputError(
            f"{vocabulary}: {error.strerror}; expected the words of {path.name} in it, one per line"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{vocabulary}: byte {error.start:,}: not UTF-8") from None

    def rows(block: slice) -> np.ndarray:
        with safe_open(unpacked, "numpy") as file:
            return file.get_slice(name)[block]

    try:
        with safe_open(unpacked, "numpy") as file:
            names = sorted(file.keys())
            known = [name for name in ("vectors", "vectors.weight") if name in names]
            if not known and len(names) != 1:
                raise InputError(f"{path}: has {len(names)} tensors, none named vectors")
            name = (known or names)[0]
            table = file.get_slice(name)
            shape, dtype = table.get_shape(), table.get_dtype()
    except InputError:
        raise
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from None
    dtype = {"F16": "f2", "F32": "f4", "F64": "f8"}.get(dtype, dtype)
    return read_table(f"{path}: {name}", shape, dtype, rows, words)
