"""What all layouts share: gate order and sign, the walk over layers, shapes, errors.

A `Layout` reads its own tensors into a `Model` and writes a `Model` as its own tensors, so a
conversion is `target.write(source.read(tensors))`; the canonical parameters are one more layout.
A framework's own file says only what is particular to it: its names and signs and, where it does
not keep the four tensors of a `Cell`, a table of shapes and the functions `write_cell` and
`read_cell`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float

from common.errors import InputError

CANONICAL_ORDER = "zrn"
DIRECTIONS = ("forward", "backward")
FLOATS = ("float16", "float32", "float64")

Tensors = Mapping[str, np.ndarray]


class Cell(NamedTuple):
    """One direction of one layer; the three gates are stacked along the first axis."""

    weight_ih: Float[np.ndarray, "3*H D"]
    weight_hh: Float[np.ndarray, "3*H H"]
    bias_ih: Float[np.ndarray, "3*H"]
    bias_hh: Float[np.ndarray, "3*H"]


@dataclass(frozen=True)
class Model:
    """A GRU and what belongs to it, gates and signs as in the canonical parameters."""

    layers: list[list[Cell]]
    """A list for each layer, of a cell for each direction."""
    others: dict[str, np.ndarray]
    """Any of head.weight [C, H*directions], head.bias [C], vectors.weight [V, D]."""


class Layout:
    """One framework's names, shapes and conventions for the parameters of a GRU.

    A key is `scope` followed by `tensor`. A GRU that stands alone (no head, no word vectors, a
    single scope) is written without the scope, under the library's own names; both can be read.
    """

    name: ClassVar[str]
    reset_kinds: ClassVar[tuple[bool, ...]]
    """The values of reset_after that the framework can compute, its own default first."""
    order: ClassVar[str]
    """The order of its gates; n is the last in all of them."""
    z_keeps: ClassVar[bool]
    """Whether its z says how much of the old state is kept (ours: how much is replaced)."""
    scope: ClassVar[str]
    tensor: ClassVar[str] = "{tensor}"
    stacks_directions: ClassVar[bool] = False
    """Whether the directions of a layer share each tensor, along a new first axis."""
    holds_bias_hh_n: ClassVar[bool] = True
    """Whether n can have the hidden bias of its own that reset_after=True needs."""
    others: ClassVar[Mapping[str, tuple[str, str]]] = {
        "head.weight": ("head.weight", "C D"),
        "head.bias": ("head.bias", "C"),
        "vectors.weight": ("vectors.weight", "V D"),
    }
    """Where it keeps what is not the GRU: canonical name -> its key and its axes."""

    def shapes(self, reset_after: bool) -> dict[str, str]:
        """The tensors of a cell and their axes, "3H D" for [3H, D]; recurrent weights first."""
        return {"weight_hh": "3H H", "weight_ih": "3H D", "bias_ih": "3H", "bias_hh": "3H"}

    def write_cell(self, cell: Cell, reset_after: bool) -> dict[str, np.ndarray]:
        """The tensors of a cell, which comes with this layout's order of gates and sign of z."""
        return cell._asdict()

    def read_cell(self, tensors: Tensors, reset_after: bool) -> Cell:
        """The inverse of `write_cell`, for tensors of the shapes that `shapes` says."""
        return Cell(**tensors)

    def write(self, model: Model, *, reset_after: bool) -> dict[str, np.ndarray]:
        """The model as a flat dict of tensors in this layout.

        Raises InputError where the layout has no place for the model: for its kind of reset, for
        a hidden bias of n, for its number of layers or directions.
        """
        self._check_reset(reset_after)
        scopes = set()
        parts: dict[tuple[int, str, str], np.ndarray] = {}
        for layer, cells in enumerate(model.layers):
            for direction, cell in zip(DIRECTIONS, cells, strict=False):
                if reset_after and not self.holds_bias_hh_n:
                    self._check_bias_hh_n(f"gru.{layer}.{direction}.bias_hh", cell)
                scopes.add(self.scope.format(layer=layer, direction=direction))
                own = self._rearrange(cell, CANONICAL_ORDER, self.order)
                for tensor, value in self.write_cell(own, reset_after).items():
                    parts[layer, direction, tensor] = value

        alone = len(scopes) == 1 and not model.others
        stacks: dict[str, list[np.ndarray]] = {}
        for place, value in parts.items():
            stacks.setdefault(self._key(*place, alone), []).append(value)
        if self.stacks_directions:
            tensors = {key: np.stack(values) for key, values in stacks.items()}
        elif len(stacks) == len(parts):
            tensors = {key: values[0] for key, values in stacks.items()}
        else:
            raise InputError(
                f"the {self.name} layout holds one layer in one direction, this model has "
                f"{len(model.layers)} layer(s) in {len(model.layers[0])} direction(s)"
            )
        for name, value in model.others.items():
            key, axes = self.others[name]
            tensors[key] = value.T if axes == "D C" else value
        return {key: np.array(value, order="C") for key, value in tensors.items()}

    def read(self, tensors: Tensors, *, reset_after: bool) -> Model:
        """The model in these tensors.

        Raises InputError for the wrong kind of reset, and, naming the key, for a tensor that is
        missing, not expected, not of floating-point numbers or (naming both shapes) does not fit.
        """
        self._check_reset(reset_after)
        shapes = self.shapes(reset_after)

        def keys(layer: int, direction: str, alone: bool) -> set[str]:
            return {self._key(layer, direction, tensor, alone) for tensor in shapes}

        own, scoped = keys(0, "forward", True), keys(0, "forward", False)
        alone = scoped.isdisjoint(tensors) and not own.isdisjoint(tensors)
        first = own if alone else scoped

        def has_another(layer: int, direction: str) -> bool:
            candidates = keys(layer, direction, alone)
            return candidates.isdisjoint(first) and not candidates.isdisjoint(tensors)

        if self.stacks_directions:
            both = any(np.shape(tensors[key])[:1] == (2,) for key in first & tensors.keys())
        else:
            both = has_another(0, "backward")
        directions = 2 if both else 1

        reader = _Reader(self.name, tensors)
        others = self._read_others(reader, "vectors.weight")
        layers: list[list[Cell]] = []
        while not layers or has_another(len(layers), "forward"):
            cells = []
            for place, direction in enumerate(DIRECTIONS[:directions]):
                cell = {}
                for tensor, axes in shapes.items():
                    key = self._key(len(layers), direction, tensor, alone)
                    if self.stacks_directions:
                        cell[tensor] = reader.take(key, f"{directions} {axes}")[place]
                    else:
                        cell[tensor] = reader.take(key, axes)
                cells.append(
                    self._rearrange(self.read_cell(cell, reset_after), self.order, CANONICAL_ORDER)
                )
            layers.append(cells)
            reader.sizes["D"] = reader.sizes["H"] * directions
        others |= self._read_others(reader, "head.weight", "head.bias")
        reader.finish()
        return Model(layers, others)

    def _key(self, layer: int, direction: str, tensor: str, alone: bool) -> str:
        template = self.tensor if alone else self.scope + self.tensor
        reverse = "_reverse" if direction == "backward" else ""
        return template.format(layer=layer, direction=direction, tensor=tensor, reverse=reverse)

    def _read_others(self, reader: "_Reader", *names: str) -> dict[str, np.ndarray]:
        """These parts of the model: all of them, or none where none of their keys is there."""
        places = {name: self.others[name] for name in names}
        if not any(key in reader.tensors for key, _ in places.values()):
            return {}
        taken = {name: (reader.take(key, axes), axes) for name, (key, axes) in places.items()}
        return {name: value.T if axes == "D C" else value for name, (value, axes) in taken.items()}

    def _rearrange(self, cell: Cell, order: str, new_order: str) -> Cell:
        """Bring the gates into another order, and z to the other sign where the two differ.

        1 - sigmoid(a) = sigmoid(-a): negating all that z is computed from swaps what it means.
        """

        def rearrange(stacked: np.ndarray) -> np.ndarray:
            gates = dict(zip(order, np.split(stacked, 3), strict=True))
            if self.z_keeps:
                gates["z"] = -gates["z"]
            return np.concatenate([gates[gate] for gate in new_order])

        return Cell(*map(rearrange, cell))

    def _check_reset(self, reset_after: bool) -> None:
        if reset_after not in self.reset_kinds:
            raise InputError(
                f"{self.name} applies the reset gate {'before' if reset_after else 'after'} the "
                f"product only, it cannot compute a GRU with reset_after={reset_after} (if this "
                f"one has reset_after={not reset_after}, say so)"
            )

    def _check_bias_hh_n(self, key: str, cell: Cell) -> None:
        bias = np.split(cell.bias_hh, 3)[CANONICAL_ORDER.index("n")]
        if bias.any():
            raise InputError(
                f"{key}, gate n, is not zero (up to {np.abs(bias).max():.3g}): {self.name} has no "
                "hidden bias for n, and with reset_after=True no other bias can stand in for it"
            )


def merge_biases(cell: Cell, reset_after: bool) -> tuple[np.ndarray, np.ndarray]:
    """Add up the two biases of each gate as far as the function stays the same.

    In z and r they are only ever added to each other; in n too, for reset_after=False. For
    reset_after=True n's hidden bias is multiplied by r and has to stay apart.

    Returns the merged bias [3H] and the hidden bias of n [H] (zero for reset_after=False).
    """
    merged = cell.bias_ih + cell.bias_hh
    n = slice(len(merged) // 3 * 2, None)
    if not reset_after:
        return merged, np.zeros_like(merged[n])
    merged[n] = cell.bias_ih[n]
    return merged, cell.bias_hh[n]


def unmerge_biases(merged: np.ndarray, bias_n: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """bias_ih and bias_hh from a merged bias [3H] and a hidden bias of n [H] (zero if None)."""
    bias_hh = np.zeros_like(merged)
    if bias_n is not None:
        bias_hh[-len(bias_n) :] = bias_n
    return {"bias_ih": merged, "bias_hh": bias_hh}


class _Reader:
    """Hands out the tensors of a file one by one, each of them checked.

    The size of an axis (C, D, H, V) is what the first tensor that has it says.
    """

    def __init__(self, layout: str, tensors: Tensors) -> None:
        self.layout = layout
        self.tensors = tensors
        self.taken: set[str] = set()
        self.sizes: dict[str, int] = {}

    def take(self, key: str, axes: str) -> np.ndarray:
        """The tensor with this key and these axes; raises InputError if it is not as it should."""
        if key not in self.tensors:
            some = ", ".join(sorted(self.tensors)[:6]) or "none"
            raise InputError(
                f"no key {key}, which the {self.layout} layout needs; there are "
                f"{len(self.tensors)} keys: {some}{', …' if len(self.tensors) > 6 else ''}"
            )
        self.taken.add(key)
        value = np.asarray(self.tensors[key])
        if value.dtype.name not in FLOATS:
            raise InputError(f"{key} holds {value.dtype}, expected one of {', '.join(FLOATS)}")
        expected = self._expected(axes.split(), value.shape)
        if value.shape != expected:
            raise InputError(
                f"{key} has shape {_show(value.shape)}, expected {_show(expected)}, "
                f"in the {self.layout} layout {_show(axes.split())}"
            )
        return value

    def finish(self) -> None:
        """Raise InputError if there is a tensor that nobody took."""
        for key in self.tensors:
            if key not in self.taken:
                raise InputError(f"unexpected key {key}: no place in this {self.layout} layout")

    def _expected(self, axes: list[str], shape: tuple[int, ...]) -> tuple[int | str, ...]:
        """The shape that these axes stand for; one whose size is not known yet stays a symbol."""
        if len(axes) == len(shape):
            for axis, size in zip(axes, shape, strict=True):
                if axis.isalpha() and size > 0:
                    self.sizes.setdefault(axis, size)
        expected: list[int | str] = []
        for axis in axes:
            factor, name = axis.rstrip("CDHV") or "1", axis.lstrip("0123456789")
            if name in self.sizes or not name:
                expected.append(int(factor) * self.sizes.get(name, 1))
            else:
                expected.append(axis)
        return tuple(expected)


def _show(shape: Iterable[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
