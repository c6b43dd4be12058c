"""Descriptions of layouts, and how parameters are read and written by them.

A spec describes a tensor as pieces, for gates g of z, r, n:

    Wg  [H, D]    bg  [H]    a gate's rows of the canonical weight_ih and bias_ih
    Ug  [H, H]    cg  [H]    a gate's rows of weight_hh and bias_hh
    bg+cg                    the sum of both biases in a single bias, which is read as bg

"Wr Wz Wn" is a tensor [3H, D], three concatenated pieces; "bz br bn, cz cr cn" is [2, 3H].

The equations only use the sum b + c in z and r, and in n if reset_after=False. With
reset_after=True, c of n is multiplied by r and needs a bias of its own.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count, product
from typing import NamedTuple

import numpy as np

from common.errors import InputError
from common.params import DIRECTIONS, GRU_PARAMETERS, POOLING, ratio_columns, structure

FLOATS = ("float16", "float32", "float64")
GATES = "zrn"
KINDS = dict(zip("WUbc", GRU_PARAMETERS, strict=True))
OTHERS = {"head.weight": ["C", "F"], "head.bias": ["C"], "vectors.weight": ["V", "D"]}

Tensors = Mapping[str, np.ndarray]


class _Place(NamedTuple):
    """The location of a GRU in a file: key prefix, template before tensor names, and the names."""

    prefix: str
    scope: str
    cell: Mapping[str, str]


@dataclass(frozen=True)
class Layout:
    """One framework's names, shapes and conventions for the parameters of a GRU.

    The defaults are cuDNN's and nn.GRU's conventions, which most frameworks share.

    A GRU alone (no head, no word vectors, a single scope) is written without the scope, under the
    library's own names. `read` accepts both, after any prefix ("encoder.").
    """

    name: str
    scope: str
    """The template of the keys before the names of the tensors."""
    cell: Mapping[str, str]
    """The tensors of a cell (one direction of one layer): name to spec."""
    reset_kinds: tuple[bool, ...] = (True,)
    """The values of reset_after that the framework supports, its default first."""
    cell_before: Mapping[str, str] | None = None
    """`cell` for reset_after=False, if it differs."""
    directions: tuple[str, str] = DIRECTIONS
    """The values of {direction} in keys."""
    z_keeps: bool = True
    """Whether z is the kept fraction of the old state (canonical z: the replaced fraction)."""
    transposes: bool = False
    """Whether weights, including the head's, are [in, out] instead of [out, in]."""
    stacks_directions: bool = False
    """Whether the directions of a layer share each tensor, along a new first axis."""
    ending: str = ""
    """The end of names that the names of a single cell, such as nn.GRUCell, lack."""
    others: tuple[str, ...] = tuple(OTHERS)
    """The keys of the head's weight and bias and of the word vectors."""

    def is_transposed(self, spec: str) -> bool:
        """Whether the tensor with this spec, or this part of the head, is transposed."""
        return self.transposes and spec.startswith(("W", "U", "head.weight"))

    def write(self, parameters: Tensors, *, reset_after: bool) -> dict[str, np.ndarray]:
        """Canonical parameters, as `read` returns them, as a flat dict of tensors in this layout.

        Raises InputError if the layout does not support the kind of reset, a hidden bias of n, or
        the number of layers or directions.
        """
        cell = self._cell(reset_after)
        layers, directions = structure(parameters)
        places = list(product(range(layers), directions))
        others = {
            key: parameters[name].T if self.is_transposed(name) else parameters[name]
            for name, key in zip(OTHERS, self.others, strict=True)
            if name in parameters
        }
        alone = not others and len({self._key(self.scope, *place) for place in places}) == 1
        scope = "" if alone else self.scope
        stacks: dict[str, list[np.ndarray]] = {}
        for layer, direction in places:
            prefix = f"gru.{layer}.{direction}."
            pieces = {
                kind + gate: self._signed(gate, value)
                for kind, name in KINDS.items()
                for gate, value in zip(GATES, np.split(parameters[prefix + name], 3), strict=True)
            }
            if pieces["cn"].any() and not any("cn" in spec for spec in cell.values()):
                raise InputError(
                    f"{prefix}bias_hh, gate n, is not zero (up to {abs(pieces['cn']).max():.3g}): "
                    f"{self.name} has no hidden bias for n, and with reset_after=True no other "
                    "bias can stand in for it; jax_impl.GRU, a flax.nnx module, holds it (--to "
                    "canonical), and so does flax.linen.GRUCell (--to linen)"
                )
            for gate in GATES:
                pieces[f"b{gate}+c{gate}"] = pieces[f"b{gate}"] + pieces[f"c{gate}"]
            for name, spec in cell.items():
                value = np.concatenate([pieces[piece] for piece in _pieces(spec)])
                value = value.reshape(2, -1) if "," in spec else value
                key = self._key(scope + name, layer, direction)
                stacks.setdefault(key, []).append(value.T if self.is_transposed(spec) else value)
        if len(stacks) < len(cell) * len(places) and not self.stacks_directions:
            raise InputError(
                f"the {self.name} layout holds one layer in one direction, this model has "
                f"{layers} layer(s) in {len(directions)} direction(s)"
            )
        gru = {key: np.stack(v) if self.stacks_directions else v[0] for key, v in stacks.items()}
        return {key: np.array(value, order="C") for key, value in (gru | others).items()}

    def read(
        self,
        tensors: Tensors,
        *,
        reset_after: bool,
        ngrams: int = 0,
        prefix: str | None = None,
        left_out: list[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """The canonical parameters in these tensors; missing biases are zeros.

        ngrams: see ModelConfig in common/params.py. prefix: selects one of several GRUs.
        left_out: receives the keys of other layers, which are refused without it.

        Raises InputError for the wrong kind of reset, for several GRUs without a prefix, and, with
        the key, for a tensor that is missing, unexpected, not floating-point or (with both shapes)
        of a wrong shape.
        """
        gru = self._place(tensors, self._cell(reset_after), prefix)
        layers, directions = self._structure(tensors, gru)
        reader = _Reader(self, tensors, gru.prefix)
        gru_keys = {
            self._key(gru.scope + name, *place): spec[0] in "bc"
            for place in product(layers, directions)
            for name, spec in gru.cell.items()
        }
        names = sorted(gru.cell, key=lambda name: gru.cell[name][0] != "U")  # U determines H
        if not any(is_bias for key, is_bias in gru_keys.items() if key in tensors):
            names = [name for name in names if gru.cell[name][0] not in "bc"]
        parameters = reader.others("vectors.weight")
        if ngrams and "D" in reader.sizes:  # the first layer reads word vectors and ratios
            classes = np.size(tensors.get(reader.key("head.bias"), ()))
            reader.sizes["D"] += ngrams * ratio_columns(classes)
        for layer in layers:
            for number, direction in enumerate(directions):
                pieces: dict[str, np.ndarray] = {}
                for name in names:
                    spec = gru.cell[name]
                    axes = [str(len(directions))] * self.stacks_directions + _axes(spec)
                    value = reader.take(self._key(gru.scope + name, layer, direction), spec, axes)
                    value = value[number] if self.stacks_directions else value
                    value = value.ravel() if "," in spec else value
                    kinds = [piece.partition("+")[0] for piece in _pieces(spec)]
                    pieces |= zip(kinds, np.split(value, len(kinds)), strict=True)
                zero = np.zeros_like(pieces["Un"][:, 0])
                for kind, name in KINDS.items():
                    values = [self._signed(g, pieces.get(kind + g, zero)) for g in GATES]
                    parameters[f"gru.{layer}.{direction}.{name}"] = np.concatenate(values)
            reader.sizes["D"] = reader.sizes["H"] * len(directions)
        reader.sizes["F"] = reader.sizes["D"] * reader.pooling_count()
        parameters |= reader.others("head.weight", "head.bias")
        gru_scopes = {_outer(key) for key in gru_keys}
        for key in tensors:
            if key in reader.taken:
                continue
            # An extra tensor in the scope of the GRU means another layout, or no GRU.
            if left_out is None or _outer(key) in gru_scopes:
                raise InputError(f"unexpected key {key}: no place in this {self.name} layout")
            left_out.append(key)
        return parameters

    def _place(self, tensors: Tensors, cell: Mapping[str, str], prefix: str | None) -> _Place:
        """The location of the GRU in these tensors; the expected location if there is none."""
        single = {name.removesuffix(self.ending): spec for name, spec in cell.items()}
        candidates: dict[str, _Place] = {}
        fitting, taken = {}, set[str]()
        for names, inner in ((cell, self.scope), (cell, ""), (single, "")):
            name, spec = next(item for item in names.items() if item[1][0] == "U")
            end = self._key(inner + name, 0, "forward")
            for key in tensors:
                outer = key.removesuffix(end)
                if key in taken or not key.endswith(end) or outer[-1:] not in ("", ".", "/"):
                    continue
                if names is single and outer.endswith(tuple(f"{each}." for each in DIRECTIONS)):
                    continue  # canonical or equinox, which share the names of nn.GRUCell
                place = _Place(
                    outer + inner.partition("{")[0],
                    outer.replace("{", "{{").replace("}", "}}") + inner,
                    names,
                )
                places = product(*self._structure(tensors, place))
                taken |= {self._key(place.scope + name, *each) for each in places}
                candidates[place.prefix.rstrip("./")] = place
                *_, rows, columns = 0, 0, *np.shape(tensors[key])
                rows, columns = (columns, rows) if self.is_transposed(spec) else (rows, columns)
                if rows == len(_pieces(spec)) * columns:  # otherwise an LSTM
                    fitting[place.prefix.rstrip("./")] = place
        candidates = fitting or candidates
        if prefix is None and len(candidates) < 2:
            return next(iter(candidates.values()), _Place("", self.scope, cell))
        if prefix is not None and prefix.rstrip("./") in candidates:
            return candidates[prefix.rstrip("./")]
        prefixes = ", ".join(map(repr, candidates)) or "nowhere"
        raise InputError(
            f"there are {len(candidates)} GRUs in the {self.name} layout, at {prefixes}: "
            "choose by --prefix"
        )

    def _structure(self, tensors: Tensors, place: _Place) -> tuple[range, tuple[str, ...]]:
        """The layers and directions of the GRU at this location."""

        def keys(layer: int = 0, direction: str = "forward") -> set[str]:
            return {self._key(place.scope + name, layer, direction) for name in place.cell}

        first = keys()

        def has(layer: int, direction: str) -> bool:
            return not (keys(layer, direction) - first).isdisjoint(tensors)

        if self.stacks_directions:
            both = any(np.shape(tensors[key])[:1] == (2,) for key in first & tensors.keys())
        else:
            both = has(0, "backward")
        layers = next(layer for layer in count(1) if not has(layer, "forward"))
        return range(layers), DIRECTIONS[: 1 + both]

    def _cell(self, reset_after: bool) -> Mapping[str, str]:
        if reset_after not in self.reset_kinds:
            raise InputError(
                f"{self.name} applies the reset gate {'before' if reset_after else 'after'} the "
                f"product only, it cannot compute a GRU with reset_after={reset_after} (if this "
                f"GRU has reset_after={not reset_after}, set that option)"
            )
        return self.cell if reset_after or self.cell_before is None else self.cell_before

    def _key(self, template: str, layer: int, direction: str) -> str:
        name = self.directions[DIRECTIONS.index(direction)]
        return template.format(layer=layer, direction=name)

    def _signed(self, gate: str, value: np.ndarray) -> np.ndarray:
        """Negates the parameters of z where conventions differ: 1 - sigmoid(a) = sigmoid(-a)."""
        return -value if gate == "z" and self.z_keeps else value


def _outer(key: str) -> str:
    """A key without its last part."""
    return re.sub("[^./]*$", "", key)


def _pieces(spec: str) -> list[str]:
    return spec.replace(",", "").split()


def _axes(spec: str) -> list[str]:
    """The axes of a tensor with this spec, before transposition; "3H" is 3 times H."""
    blocks = len(_pieces(spec.partition(",")[0]))
    axes = ["H" if blocks == 1 else f"{blocks}H", *{"W": ["D"], "U": ["H"]}.get(spec[0], [])]
    return ["2", *axes] if "," in spec else axes


class _Reader:
    """Validates and returns the tensors of a file.

    The first tensor with an axis (C, D, F, H, V) determines its size.
    """

    def __init__(self, layout: Layout, tensors: Tensors, prefix: str) -> None:
        self.layout = layout
        self.tensors = tensors
        # The head and the vectors have the prefix of the GRU, or a part of it.
        parts = re.split(r"(?<=[./])", prefix)
        self.prefixes = ["".join(parts[:end]) for end in range(len(parts), -1, -1)]
        self.taken: set[str] = set()
        self.sizes = {"": 1}

    def take(self, key: str, spec: str, axes: list[str]) -> np.ndarray:
        """The tensor with this key, as [out, in]; raises InputError if it is missing or invalid."""
        if key not in self.tensors:
            examples = ", ".join(sorted(self.tensors)[:6]) or "none"
            raise InputError(
                f"no key {key}, which the {self.layout.name} layout requires; there are "
                f"{len(self.tensors)} keys: {examples}{', …' if len(self.tensors) > 6 else ''}"
            )
        self.taken.add(key)
        value = np.asarray(self.tensors[key])
        if value.dtype.name == "bfloat16":  # not a type of NumPy itself
            value = value.astype(np.float32)
        if value.dtype.name not in FLOATS:
            raise InputError(f"{key} holds {value.dtype}, expected one of {', '.join(FLOATS)}")
        transposed = self.layout.is_transposed(spec)
        axes = axes[::-1] if transposed else axes
        if len(axes) == value.ndim:
            for axis, size in zip(axes, value.shape, strict=True):
                if axis.isalpha() and size > 0:
                    self.sizes.setdefault(axis, size)
        expected: list[int | str] = []
        for axis in axes:  # an axis of unknown size stays a symbol
            factor, symbol = axis.rstrip("CDFHV") or "1", axis.lstrip("0123456789")
            expected.append(int(factor) * self.sizes[symbol] if symbol in self.sizes else axis)
        if list(value.shape) != expected:
            raise InputError(
                f"{key} has shape {_show(value.shape)}, expected {_show(expected)}, "
                f"in the {self.layout.name} layout {_show(axes)}"
            )
        return value.T if transposed else value

    def key(self, name: str) -> str:
        """The key in this file of a parameter in OTHERS."""
        suffix = dict(zip(OTHERS, self.layout.others, strict=True))[name]
        keys = (prefix + suffix for prefix in self.prefixes)
        return next((key for key in keys if key in self.tensors), suffix)

    def pooling_count(self) -> int:
        """The number of poolings that the head reads; 1 if its size matches none."""
        key, axis = self.key("head.weight"), 0 if self.layout.is_transposed("head.weight") else -1
        shape = np.shape(self.tensors[key]) if key in self.tensors else ()
        columns = shape[axis] if shape else 0
        whole, rest = divmod(columns, max(self.sizes["D"], 1))
        return whole if not rest and 1 <= whole <= len(POOLING) else 1

    def others(self, *names: str) -> dict[str, np.ndarray]:
        """The parameters with these names; empty if the file has none of them."""
        if not any(self.key(name) in self.tensors for name in names):
            return {}
        return {name: self.take(self.key(name), name, OTHERS[name]) for name in names}


def _show(shape: Iterable[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
