"""How a layout is described, and how parameters are read and written by its description.

What a tensor holds is said in pieces of the equations, for gates g of z, r, n:

    Wg  [H, D]    bg  [H]    a gate's rows of the canonical weight_ih and bias_ih
    Ug  [H, H]    cg  [H]    those of weight_hh and bias_hh
    bg+cg                    their sum, where there is one bias; read back, all of it is bg

"Wr Wz Wn" is a tensor [3H, D] of three pieces end to end, "bz br bn, cz cr cn" one of [2, 3H].

In z and r, b and c are only ever added to each other; in n too, for reset_after=False. For
reset_after=True c of n is multiplied by r and has to stay apart.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count, product

import numpy as np

from common.errors import InputError
from common.params import DIRECTIONS, GRU_PARAMETERS, POOLING, ratio_columns, structure

FLOATS = ("float16", "float32", "float64")
GATES = "zrn"
KINDS = dict(zip("WUbc", GRU_PARAMETERS, strict=True))
OTHERS = {"head.weight": ["C", "F"], "head.bias": ["C"], "vectors.weight": ["V", "D"]}

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Layout:
    """One framework's names, shapes and conventions for the parameters of a GRU.

    The defaults are cuDNN's and nn.GRU's conventions, which most frameworks share.

    A GRU that stands alone (no head, no word vectors, a single scope) is written without the scope,
    under the library's own names; both can be read.
    """

    name: str
    scope: str
    """What stands before the names of the tensors."""
    cell: Mapping[str, str]
    """The tensors of a cell (one direction of one layer) by name, and the pieces in them."""
    reset_kinds: tuple[bool, ...] = (True,)
    """The values of reset_after that the framework can compute, its own default first."""
    cell_before: Mapping[str, str] | None = None
    """The tensors for reset_after=False, where they are others."""
    directions: tuple[str, str] = DIRECTIONS
    """What {direction} in a key stands for."""
    z_keeps: bool = True
    """Whether its z says how much of the old state is kept (ours: how much is replaced)."""
    transposes: bool = False
    """Whether weights are [in, out], those of the head too, and not [out, in]."""
    stacks_directions: bool = False
    """Whether the directions of a layer share each tensor, along a new first axis."""
    others: tuple[str, ...] = tuple(OTHERS)
    """Its keys of what is not the GRU: the head's weight and bias, the word vectors."""

    def is_transposed(self, held: str) -> bool:
        """Whether a tensor that holds these pieces, or this part of the head, is transposed."""
        return self.transposes and held.startswith(("W", "U", "head.weight"))

    def write(self, parameters: Tensors, *, reset_after: bool) -> dict[str, np.ndarray]:
        """Canonical parameters, as `read` returns them, as a flat dict of tensors in this layout.

        Raises InputError where the layout has no place for them: for their kind of reset, for a
        hidden bias of n, for their number of layers or directions.
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
            if pieces["cn"].any() and not any("cn" in held for held in cell.values()):
                raise InputError(
                    f"{prefix}bias_hh, gate n, is not zero (up to {abs(pieces['cn']).max():.3g}): "
                    f"{self.name} has no hidden bias for n, and with reset_after=True no other "
                    "bias can stand in for it"
                )
            for gate in GATES:
                pieces[f"b{gate}+c{gate}"] = pieces[f"b{gate}"] + pieces[f"c{gate}"]
            for name, held in cell.items():
                value = np.concatenate([pieces[piece] for piece in _pieces(held)])
                value = value.reshape(2, -1) if "," in held else value
                key = self._key(scope + name, layer, direction)
                stacks.setdefault(key, []).append(value.T if self.is_transposed(held) else value)
        if len(stacks) < len(cell) * len(places) and not self.stacks_directions:
            raise InputError(
                f"the {self.name} layout holds one layer in one direction, this model has "
                f"{layers} layer(s) in {len(directions)} direction(s)"
            )
        gru = {key: np.stack(v) if self.stacks_directions else v[0] for key, v in stacks.items()}
        return {key: np.array(value, order="C") for key, value in (gru | others).items()}

    def read(
        self, tensors: Tensors, *, reset_after: bool, ngrams: int = 0
    ) -> dict[str, np.ndarray]:
        """The canonical parameters in these tensors. ngrams: see ModelConfig in common/params.py.

        Raises InputError for the wrong kind of reset, and, naming the key, for a tensor that is
        missing, not expected, not of floating-point numbers or (naming both shapes) does not fit.
        """
        cell = self._cell(reset_after)
        scope, layers, directions = self._structure(tensors, cell)
        reader = _Reader(self, tensors)
        parameters = reader.others("vectors.weight")
        if ngrams and "D" in reader.sizes:  # beside them, the first layer reads ratios
            classes = np.size(tensors.get(self.others[1], ()))
            reader.sizes["D"] += ngrams * ratio_columns(classes)
        for layer in range(layers):
            for place, direction in enumerate(directions):
                pieces: dict[str, np.ndarray] = {}
                for name in sorted(cell, key=lambda name: cell[name][0] != "U"):  # U tells H
                    held = cell[name]
                    axes = [str(len(directions))] * self.stacks_directions + _axes(held)
                    value = reader.take(self._key(scope + name, layer, direction), held, axes)
                    value = value[place] if self.stacks_directions else value
                    value = value.ravel() if "," in held else value
                    found = [piece.partition("+")[0] for piece in _pieces(held)]
                    pieces |= zip(found, np.split(value, len(found)), strict=True)
                zero = np.zeros_like(pieces["bn"])
                for kind, name in KINDS.items():
                    values = [self._signed(g, pieces.get(kind + g, zero)) for g in GATES]
                    parameters[f"gru.{layer}.{direction}.{name}"] = np.concatenate(values)
            reader.sizes["D"] = reader.sizes["H"] * len(directions)
        reader.sizes["F"] = reader.sizes["D"] * reader.ways()
        parameters |= reader.others("head.weight", "head.bias")
        for key in tensors:
            if key not in reader.taken:
                raise InputError(f"unexpected key {key}: no place in this {self.name} layout")
        return parameters

    def _structure(
        self, tensors: Tensors, cell: Mapping[str, str]
    ) -> tuple[str, int, tuple[str, ...]]:
        """The scope under which the GRU in these tensors stands, its layers and directions."""

        def keys(scope: str, layer: int = 0, direction: str = "forward") -> set[str]:
            return {self._key(scope + name, layer, direction) for name in cell}

        alone = keys(self.scope).isdisjoint(tensors) and not keys("").isdisjoint(tensors)
        scope = "" if alone else self.scope
        first = keys(scope)

        def has(layer: int, direction: str) -> bool:
            return not (keys(scope, layer, direction) - first).isdisjoint(tensors)

        if self.stacks_directions:
            both = any(np.shape(tensors[key])[:1] == (2,) for key in first & tensors.keys())
        else:
            both = has(0, "backward")
        layers = next(layer for layer in count(1) if not has(layer, "forward"))
        return scope, layers, DIRECTIONS[: 1 + both]

    def _cell(self, reset_after: bool) -> Mapping[str, str]:
        if reset_after not in self.reset_kinds:
            raise InputError(
                f"{self.name} applies the reset gate {'before' if reset_after else 'after'} the "
                f"product only, it cannot compute a GRU with reset_after={reset_after} (if this "
                f"one has reset_after={not reset_after}, say so)"
            )
        return self.cell if reset_after or self.cell_before is None else self.cell_before

    def _key(self, template: str, layer: int, direction: str) -> str:
        its = self.directions[DIRECTIONS.index(direction)]
        return template.format(layer=layer, direction=its)

    def _signed(self, gate: str, value: np.ndarray) -> np.ndarray:
        """1 - sigmoid(a) = sigmoid(-a): negating all that z is computed from swaps its meaning."""
        return -value if gate == "z" and self.z_keeps else value


def _pieces(held: str) -> list[str]:
    return held.replace(",", "").split()


def _axes(held: str) -> list[str]:
    """The axes, not yet transposed, of a tensor that holds these pieces; 3H is 3 times H."""
    blocks = len(_pieces(held.partition(",")[0]))
    axes = ["H" if blocks == 1 else f"{blocks}H", *{"W": ["D"], "U": ["H"]}.get(held[0], [])]
    return ["2", *axes] if "," in held else axes


class _Reader:
    """Hands out the tensors of a file one by one, each of them checked.

    The size of an axis (C, D, F, H, V) is what the first tensor that has it says.
    """

    def __init__(self, layout: Layout, tensors: Tensors) -> None:
        self.layout = layout
        self.tensors = tensors
        self.taken: set[str] = set()
        self.sizes = {"": 1}

    def take(self, key: str, held: str, axes: list[str]) -> np.ndarray:
        """The tensor with this key, as [out, in]; raises InputError if it is not as it should."""
        if key not in self.tensors:
            some = ", ".join(sorted(self.tensors)[:6]) or "none"
            raise InputError(
                f"no key {key}, which the {self.layout.name} layout needs; there are "
                f"{len(self.tensors)} keys: {some}{', …' if len(self.tensors) > 6 else ''}"
            )
        self.taken.add(key)
        value = np.asarray(self.tensors[key])
        if value.dtype.name not in FLOATS:
            raise InputError(f"{key} holds {value.dtype}, expected one of {', '.join(FLOATS)}")
        transposed = self.layout.is_transposed(held)
        axes = axes[::-1] if transposed else axes
        if len(axes) == value.ndim:
            for axis, size in zip(axes, value.shape, strict=True):
                if axis.isalpha() and size > 0:
                    self.sizes.setdefault(axis, size)
        expected: list[int | str] = []
        for axis in axes:  # one whose size is not known yet stays a symbol
            factor, symbol = axis.rstrip("CDFHV") or "1", axis.lstrip("0123456789")
            expected.append(int(factor) * self.sizes[symbol] if symbol in self.sizes else axis)
        if list(value.shape) != expected:
            raise InputError(
                f"{key} has shape {_show(value.shape)}, expected {_show(expected)}, "
                f"in the {self.layout.name} layout {_show(axes)}"
            )
        return value.T if transposed else value

    def ways(self) -> int:
        """Of how many ways of pooling the head reads the outputs; 1 where its size is of none."""
        key, axis = self.layout.others[0], 0 if self.layout.is_transposed("head.weight") else -1
        shape = np.shape(self.tensors[key]) if key in self.tensors else ()
        columns = shape[axis] if shape else 0
        whole, rest = divmod(columns, max(self.sizes["D"], 1))
        return whole if not rest and 1 <= whole <= len(POOLING) else 1

    def others(self, *names: str) -> dict[str, np.ndarray]:
        """These parts of the model: all of them, or none where none of their keys is there."""
        keys = dict(zip(OTHERS, self.layout.others, strict=True))
        if not any(keys[name] in self.tensors for name in names):
            return {}
        return {name: self.take(keys[name], name, OTHERS[name]) for name in names}


def _show(shape: Iterable[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
