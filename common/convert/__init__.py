"""Conversions between the canonical parameters and other frameworks' layouts, in NumPy alone.

    FORMATS                                                 the layouts by name
    to_format(name, parameters, reset_after=...)            canonical -> that layout
    from_format(name, tensors, reset_after=...)             that layout -> canonical
    python -m common.convert FROM_FILE TO_FILE --from FORMAT --to FORMAT

How the layouts differ, with the equations: docs/layouts.md.
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
    """The tensors of a GRU in one layout as those of another; dtypes are kept, nothing is shared.

    A layout with one bias where the target has two fills the first and leaves the second zero; the
    other way round the two are added, where that leaves the function the same. The GRU is found
    whatever stands before its keys; zeros stand in for biases where it has none.

    Arguments: the tensors as a flat dict; the names of their layout and of the one wanted (keys of
    FORMATS); whether this GRU applies the reset gate after the product with the recurrent weights;
    --ngrams of a model that was trained with it, and with its word vectors; what stands before the
    keys of the GRU that is meant, where there are several; and a list, to which the keys of other
    layers are added (without it, they are refused).

    Raises InputError for a name that is no layout; for tensors that do not fit their layout,
    naming the key and, where it is the shape, both shapes; for several GRUs of which none is
    chosen; for a GRU that the target cannot compute or hold.
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
    name: str, tensors: Tensors, *, reset_after: bool, **how: Any
) -> dict[str, np.ndarray]:
    """Tensors of the named layout as canonical parameters; `how` and InputError as in `convert`."""
    return convert(tensors, name, "canonical", reset_after=reset_after, **how)
