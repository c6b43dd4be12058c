"""How a layout is described, and how parameters are read and written by its description.

What a tensor holds is said in pieces of the equations, for gates g of z, r, n:

    Wg  [H, D]    bg  [H]    a gate's rows of the canonical weight_ih and bias_ih
    Ug  [H, H]    cg  [H]    those of weight_hh and bias_hh
    bg+cg                    their sum, where there is one bias; read back, all of it is bg

"Wr Wz Wn" is a tensor [3H, D] of three pieces end to end, "bz br bn, cz cr cn" one of [2, 3H].

In z and r, b and c are only ever added to each other; in n too, for reset_after=False. For
reset_after=True c of n is multiplied by r and has to stay apart.
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
    """Where a GRU stands: what is before it, before each tensor's name, and those names."""

    before: str
    scope: str
    cell: Mapping[str, str]


@dataclass(frozen=True)
class Layout:
    """One framework's names, shapes and conventions for the parameters of a GRU.

    The defaults are cuDNN's and nn.GRU's conventions, which most frameworks share.

    A GRU that stands alone (no head, no word vectors, a single scope) is written without the scope,
    under the library's own names. Both can be read, with anything before them ("encoder.").
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
    ending: str = ""
    """How names end that those of a single cell, as nn.GRUCell, do not."""
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
                    "bias can stand in for it; jax_impl.GRU, a flax.nnx module, holds it (--to "
                    "canonical), and so does flax.linen.GRUCell (--to linen)"
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
        self,
        tensors: Tensors,
        *,
        reset_after: bool,
        ngrams: int = 0,
        prefix: str | None = None,
        left_out: list[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """The canonical parameters in these tensors: zeros for biases if there are none.

        ngrams: see ModelConfig in common/params.py. prefix: which GRU, where there are several.
        left_out: a list that the keys of other layers are added to; without it, they are refused.

        Raises InputError for the wrong kind of reset, where there are several GRUs and none is
        chosen, and, naming the key, for a tensor that is missing, not expected, not of
        floating-point numbers or (naming both shapes) does not fit.
        """
        gru = self._place(tensors, self._cell(reset_after), prefix)
        layers, directions = self._structure(tensors, gru)
        reader = _Reader(self, tensors, gru.before)
        own = {
            self._key(gru.scope + name, *place): held[0] in "bc"
            for place in product(layers, directions)
            for name, held in gru.cell.items()
        }
        names = sorted(gru.cell, key=lambda name: gru.cell[name][0] != "U")  # U tells H
        if not any(is_bias for key, is_bias in own.items() if key in tensors):
            names = [name for name in names if gru.cell[name][0] not in "bc"]
        parameters = reader.others("vectors.weight")
        if ngrams and "D" in reader.sizes:  # beside them, the first layer reads ratios
            classes = np.size(tensors.get(reader.key("head.bias"), ()))
            reader.sizes["D"] += ngrams * ratio_columns(classes)
        for layer in layers:
            for number, direction in enumerate(directions):
                pieces: dict[str, np.ndarray] = {}
                for name in names:
                    held = gru.cell[name]
                    axes = [str(len(directions))] * self.stacks_directions + _axes(held)
                    value = reader.take(self._key(gru.scope + name, layer, direction), held, axes)
                    value = value[number] if self.stacks_directions else value
                    value = value.ravel() if "," in held else value
                    found = [piece.partition("+")[0] for piece in _pieces(held)]
                    pieces |= zip(found, np.split(value, len(found)), strict=True)
                zero = np.zeros_like(pieces["Un"][:, 0])
                for kind, name in KINDS.items():
                    values = [self._signed(g, pieces.get(kind + g, zero)) for g in GATES]
                    parameters[f"gru.{layer}.{direction}.{name}"] = np.concatenate(values)
            reader.sizes["D"] = reader.sizes["H"] * len(directions)
        reader.sizes["F"] = reader.sizes["D"] * reader.ways()
        parameters |= reader.others("head.weight", "head.bias")
        beside = {_outer(key) for key in own}
        for key in tensors:
            if key in reader.taken:
                continue
            # One more tensor among the GRU's own: it is of another layout, or no GRU.
            if left_out is None or _outer(key) in beside:
                raise InputError(f"unexpected key {key}: no place in this {self.name} layout")
            left_out.append(key)
        return parameters

    def _place(self, tensors: Tensors, cell: Mapping[str, str], prefix: str | None) -> _Place:
        """Where the GRU stands in these tensors; where it would, if there is none."""
        single = {name.removesuffix(self.ending): held for name, held in cell.items()}
        found: dict[str, _Place] = {}
        fitting, taken = {}, set[str]()
        for names, inner in ((cell, self.scope), (cell, ""), (single, "")):
            name, held = next(item for item in names.items() if item[1][0] == "U")
            end = self._key(inner + name, 0, "forward")
            for key in tensors:
                outer = key.removesuffix(end)
                if key in taken or not key.endswith(end) or outer[-1:] not in ("", ".", "/"):
                    continue
                if names is single and outer.endswith(tuple(f"{each}." for each in DIRECTIONS)):
                    continue  # not nn.GRUCell: canonical or equinox, which have the same names
                place = _Place(
                    outer + inner.partition("{")[0],
                    outer.replace("{", "{{").replace("}", "}}") + inner,
                    names,
                )
                places = product(*self._structure(tensors, place))
                taken |= {self._key(place.scope + name, *each) for each in places}
                found[place.before.rstrip("./")] = place
                *_, rows, columns = 0, 0, *np.shape(tensors[key])
                rows, columns = (columns, rows) if self.is_transposed(held) else (rows, columns)
                if rows == len(_pieces(held)) * columns:  # or else an LSTM
                    fitting[place.before.rstrip("./")] = place
        found = fitting or found
        if prefix is None and len(found) < 2:
            return next(iter(found.values()), _Place("", self.scope, cell))
        if prefix is not None and prefix.rstrip("./") in found:
            return found[prefix.rstrip("./")]
        there = ", ".join(map(repr, found)) or "nowhere"
        raise InputError(
            f"there are {len(found)} GRUs in the {self.name} layout, at {there}: choose by --prefix"
        )

    def _structure(self, tensors: Tensors, place: _Place) -> tuple[range, tuple[str, ...]]:
        """The layers and directions of the GRU that stands there."""

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
                f"one has reset_after={not reset_after}, say so)"
            )
        return self.cell if reset_after or self.cell_before is None else self.cell_before

    def _key(self, template: str, layer: int, direction: str) -> str:
        its = self.directions[DIRECTIONS.index(direction)]
        return template.format(layer=layer, direction=its)

    def _signed(self, gate: str, value: np.ndarray) -> np.ndarray:
        """1 - sigmoid(a) = sigmoid(-a): negating all that z is computed from swaps its meaning."""
        return -value if gate == "z" and self.z_keeps else value


def _outer(key: str) -> str:
    """What stands before the last part of a key."""
    return re.sub("[^./]*$", "", key)


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

    def __init__(self, layout: Layout, tensors: Tensors, before: str) -> None:
        self.layout = layout
        self.tensors = tensors
        # What is not the GRU may stand beside it, or further out.
        steps = re.split(r"(?<=[./])", before)
        self.outer = ["".join(steps[:end]) for end in range(len(steps), -1, -1)]
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
        if value.dtype.name == "bfloat16":  # NumPy has none of its own
            value = value.astype(np.float32)
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

    def key(self, name: str) -> str:
        """What a part of the model that is not the GRU is called in this file."""
        own = dict(zip(OTHERS, self.layout.others, strict=True))[name]
        return next((outer + own for outer in self.outer if outer + own in self.tensors), own)

    def ways(self) -> int:
        """Of how many ways of pooling the head reads the outputs; 1 where its size is of none."""
        key, axis = self.key("head.weight"), 0 if self.layout.is_transposed("head.weight") else -1
        shape = np.shape(self.tensors[key]) if key in self.tensors else ()
        columns = shape[axis] if shape else 0
        whole, rest = divmod(columns, max(self.sizes["D"], 1))
        return whole if not rest and 1 <= whole <= len(POOLING) else 1

    def others(self, *names: str) -> dict[str, np.ndarray]:
        """These parts of the model: all of them, or none where none of their keys is there."""
        if not any(self.key(name) in self.tensors for name in names):
            return {}
        return {name: self.take(self.key(name), name, OTHERS[name]) for name in names}


def _show(shape: Iterable[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
