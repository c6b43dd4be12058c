"""Validation of the arguments of a GRU, shared by both twins.

Arrays may be of any framework; only their shapes and dtypes are read, never their values.
"""

from collections.abc import Mapping
from typing import Any

from common.cells import Cell, LayerCall, dtype_name
from common.params import (
    POOLING,
    PRODUCT_DTYPES,
    ProductDtype,
    cell_of,
    cell_shapes,
    gru_shapes,
    structure,
)

FLOATS = ("bfloat16", "float16", "float32", "float64")
OPTIONAL = ("h0", "tokens", "resets", "h_reset")
"""The optional arguments of `run`."""
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def check_mapping(parameters: Any) -> None:
    """Raise TypeError unless parameters are a mapping."""
    if not isinstance(parameters, Mapping):
        raise TypeError(
            f"parameters: expected a dict of arrays by name, found {type(parameters).__name__}"
        )


def check_cell(
    cell: Cell, parameters: Mapping[str, Any], call: LayerCall
) -> tuple[int, tuple[str, ...], int]:
    """Validate the arguments of `run`; returns (layers, directions, H) of the parameters.

    Raises ValueError for a missing parameter or a wrong shape and TypeError for a wrong dtype, with
    the argument, the expected and the actual value.
    """
    names = tuple(parameters)
    name, blocks = f"{cell.name}.0.forward.weight_hh", cell.spec.blocks
    if name not in parameters:
        raise ValueError(f"parameters: expected {name}, found {names or 'none'}")
    if call.product_dtype not in PRODUCT_DTYPES:
        known = " or ".join(PRODUCT_DTYPES)
        raise ValueError(f"product_dtype: expected {known}, found {call.product_dtype!r}")
    layers, directions = structure(names, cell.name)
    first, x, tokens = parameters[name], call.x, call.tokens
    check_shape(name, first, f"{blocks}H", "H")
    H = max(first.shape[1], 1)
    check_shape(name, first, blocks * H, H)
    if tokens is None:
        check_shape("x", x, "T", "B", "D")
        T, B, D = x.shape
    else:
        check_shape("x", x, "K", "D")
        check_shape("tokens", tokens, "T", "B")
        check_dtype("tokens", tokens, INTEGERS)
        (T, B), D = tokens.shape, x.shape[1]
        if not x.shape[0] and T * B:
            raise ValueError("x: expected at least one row for the tokens, found none")
    check_dtype("x", x, FLOATS)
    check_shape("lengths", call.lengths, B)
    check_dtype("lengths", call.lengths, INTEGERS)
    dtype = x.dtype
    for name, shape in cell_shapes(cell.spec, D, H, layers, len(directions) == 2).items():
        array = parameters.get(name)
        if array is None:
            raise ValueError(f"parameters: expected {name}, found none")
        if array.shape != shape:
            check_shape(name, array, *shape)
        if array.dtype != dtype:
            check_same_dtype(name, array, "x", x)
    for name, state in (("h0", call.h0), ("h_reset", call.h_reset)):
        if state is not None:
            check_shape(name, state, layers * len(directions), B, cell.spec.states * H)
            check_same_dtype(name, state, "x", x)
    if call.resets is not None:
        check_shape("resets", call.resets, T, B)
        check_dtype("resets", call.resets, ("bool",))
    elif call.h_reset is not None:
        raise ValueError("h_reset: requires resets, found none")
    return layers, directions, H


def check_classify(
    parameters: Mapping[str, Any],
    vectors: Any,
    distinct: Any,
    tokens: Any,
    ratios: Any | None = None,
    pooling: str = "last",
) -> tuple[str, int, int]:
    """Validate the arguments of `classify`; returns (cell, directions, H) of the parameters.

    Raises as check_cell, except for what `gru` validates itself, and ValueError for an unknown
    pooling.
    """
    poolings = str(pooling).split("+")
    if not {*poolings} <= {*POOLING}:
        raise ValueError(f"pooling: expected some of {'+'.join(POOLING)}, found {pooling}")
    names = tuple(parameters)
    cell, directions = cell_of(names), len(structure(names)[1])
    layer = f"{cell}.0.forward"
    for name in (f"{layer}.weight_ih", f"{layer}.weight_hh", "head.weight", "head.bias"):
        if name not in parameters:
            raise ValueError(f"parameters: expected {name}, found none")
    weight, bias = parameters["head.weight"], parameters["head.bias"]
    D, H = (parameters[f"{layer}.{name}"].shape[-1] for name in ("weight_ih", "weight_hh"))
    check_shape("distinct", distinct, "K")
    check_dtype("distinct", distinct, INTEGERS)
    check_shape("tokens", tokens, "T", "B")
    if ratios is not None:
        check_shape("ratios", ratios, *tokens.shape, "E")
        check_same_dtype("ratios", ratios, "head.weight", weight)
        D -= ratios.shape[2]
    check_shape("vectors", vectors, "V", D)
    check_shape("head.weight", weight, "C", directions * H * len(poolings))
    if bias.shape != weight.shape[:1]:
        check_shape("head.bias", bias, weight.shape[0])
    for name, array in (("vectors", vectors), ("head.bias", bias)):
        if array.dtype != weight.dtype:
            check_same_dtype(name, array, "head.weight", weight)
    return cell, directions, H


def check_canonical(parameters: Mapping[str, Any]) -> tuple[int, int, int, bool]:
    """Validate the canonical parameters of a GRU; returns (D, H, layers, bidirectional).

    Raises ValueError for a parameter that is missing, unknown or of a wrong shape, and TypeError if
    the dtypes differ.
    """
    check_mapping(parameters)
    layers, directions = structure(parameters)
    name = "gru.0.forward.weight_ih"
    if name not in parameters:
        raise ValueError(f"parameters: expected {name}, found {', '.join(parameters)}")
    first = parameters[name]
    check_shape(name, first, "3H", "D")
    check_dtype(name, first, FLOATS)
    D, H, bidirectional = first.shape[1], first.shape[0] // 3, len(directions) == 2
    expected = gru_shapes(D, H, layers, bidirectional)
    for name, shape in expected.items():
        if name not in parameters:
            raise ValueError(f"parameters: expected {name}, found none")
        check_shape(name, parameters[name], *shape)
        check_same_dtype(name, parameters[name], "gru.0.forward.weight_ih", first)
    for name in parameters:
        if name.startswith("gru.") and name not in expected:
            raise ValueError(f"parameters: expected {', '.join(expected)}, found {name}")
    return D, H, layers, bidirectional


def check_bool(**values: Any) -> None:
    """Raise TypeError for values that are not bools."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, found {value!r}")


def product_dtype(bfloat16: bool) -> ProductDtype:
    """The product dtype for the argument bfloat16 of `gru`. Raises TypeError for other types."""
    if bfloat16 is not False:
        check_bool(bfloat16=bfloat16)
    return "bfloat16" if bfloat16 else "float32"


def check_sizes(**sizes: int) -> None:
    """Raise TypeError or ValueError for sizes that are not positive integers."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name}: expected an int, found {type(size).__name__}")
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, found {size}")


def check_shape(name: str, array: Any, *expected: int | str) -> None:
    """Raise ValueError unless an array has this shape, in which a string matches any size."""
    shape = array.shape
    if len(shape) == len(expected):
        for size, required in zip(shape, expected, strict=True):
            if size != required and not isinstance(required, str):
                break
        else:
            return
    raise ValueError(
        f"{name}: expected shape [{', '.join(map(str, expected))}], found {list(shape)}"
    )


def check_dtype(name: str, array: Any, allowed: tuple[str, ...]) -> None:
    """Raise TypeError unless the dtype of an array is allowed."""
    if dtype_name(array.dtype) not in allowed:
        raise TypeError(
            f"{name}: expected one of {', '.join(allowed)}, found {dtype_name(array.dtype)}"
        )


def check_same_dtype(name: str, array: Any, other_name: str, other: Any) -> None:
    """Raise TypeError unless two arrays have the same dtype; nothing is converted implicitly."""
    if array.dtype != other.dtype:
        raise TypeError(
            f"{name}: expected {dtype_name(other.dtype)}, as {other_name} is, "
            f"found {dtype_name(array.dtype)}"
        )


def check_range(name: str, lowest: int, highest: int, limit: int, what: str) -> None:
    """Raise ValueError unless the values of an array, lowest to highest, are in 0..limit."""
    if lowest < 0 or highest > limit:
        value = lowest if lowest < 0 else highest
        raise ValueError(f"{name}: expected values in 0..{limit} ({what}), found {value}")
