"""Conversions between the canonical parameters and other frameworks' layouts, in NumPy.

    FORMATS                                                 the layouts by name
    to_format(name, parameters, reset_after=...)            canonical -> that layout
    from_format(name, tensors, reset_after=...)             that layout -> canonical
    python -m common.convert FROM_FILE TO_FILE --from FORMAT --to FORMAT

docs/layouts.md describes the layouts, with their equations.
"""

from typing import Any

import numpy as np

from common.convert.formats import FORMATS
from common.convert.layout import Tensors
from common.errors import InputError

__all__ = ["FORMATS", "convert", "from_format", "to_format"]


def convert(
    tensors: Tensors,
    source: str,
    target: str,
    *,
    reset_after: bool,
    ngrams: int = 0,
    prefix: str | None = None,
    left_out: list[str] | None = None,
) -> dict[str, np.ndarray]:
    """Convert the tensors of a GRU to another layout. Dtypes are kept; the result is a copy.

    A single bias becomes the first of two biases, and the second is zero. Two biases are added to
    one if that preserves the function. The keys of the GRU may have any prefix; missing biases are
    zeros.

    tensors: a flat dict. source, target: names of layouts (keys of FORMATS).
    reset_after: whether this GRU applies the reset gate after the product with the recurrent
    weights. ngrams: --ngrams of a model with its word vectors. prefix: the prefix of the GRU's
    keys, if there are several GRUs. left_out: receives the keys of other layers, which are refused
    without it.

    Raises InputError for an unknown layout; for tensors that do not match their layout, with the
    key and, for a wrong shape, both shapes; for several GRUs without a prefix; and for a GRU that
    the target cannot represent.
    """
    for name in (source, target):
        if name not in FORMATS:
            raise InputError(f"unknown format {name!r}: expected one of {', '.join(FORMATS)}")
    parameters = FORMATS[source].read(
        tensors, reset_after=reset_after, ngrams=ngrams, prefix=prefix, left_out=left_out
    )
    return FORMATS[target].write(parameters, reset_after=reset_after)


def to_format(
    name: str, parameters: Tensors, *, reset_after: bool, ngrams: int = 0
) -> dict[str, np.ndarray]:
    """Canonical parameters in the named layout; raises InputError as `convert` does."""
    return convert(parameters, "canonical", name, reset_after=reset_after, ngrams=ngrams)


def from_format(
    name: str, tensors: Tensors, *, reset_after: bool, **options: Any
) -> dict[str, np.ndarray]:
    """Tensors of the named layout as canonical parameters; `options` and errors as in `convert`."""
    return convert(tensors, name, "canonical", reset_after=reset_after, **options)
