"""A .safetensors file, with the words in vocabulary.txt beside it, a word a line.

That is what a run directory has: vectors.safetensors, or model.safetensors where the vectors were
trained. Of several tensors in a file, `vectors` or `vectors.weight` is taken.
"""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from common.data.vectors.lookup import Entries, ToVector, of_table
from common.errors import InputError


def looks_like(head: bytes) -> bool:
    """Whether a file that begins like this is one: the length of a JSON object, and that object."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32


def read(path: Path, unpacked: Path) -> tuple[Entries, ToVector]:
    """The entries of a file; `unpacked` is the file itself where `path` is compressed.

    Raises InputError for a damaged file, no vocabulary.txt beside `path`, or one that does not fit.
    """
    vocabulary = path.with_name("vocabulary.txt")
    try:
        words = vocabulary.read_text(encoding="utf-8").split("\n")[:-1]
    except OSError as error:
        raise InputError(
            f"{vocabulary}: {error.strerror}; the words of {path.name} have to be there, one a line"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{vocabulary}: byte {error.start:,}: not UTF-8") from None

    def rows(these: slice) -> np.ndarray:
        with safe_open(unpacked, "numpy") as file:
            return file.get_slice(name)[these]

    try:
        with safe_open(unpacked, "numpy") as file:
            names = sorted(file.keys())
            known = [name for name in ("vectors", "vectors.weight") if name in names]
            if not known and len(names) != 1:
                raise InputError(f"{path}: has {len(names)} tensors, and none called vectors")
            name = (known or names)[0]
            table = file.get_slice(name)
            shape, dtype = table.get_shape(), table.get_dtype()
    except InputError:
        raise
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from None
    dtype = {"F16": "f2", "F32": "f4", "F64": "f8"}.get(dtype, dtype)
    return of_table(f"{path}: {name}", shape, dtype, rows, words)
