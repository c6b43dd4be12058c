"""What all layouts share: gate order and sign, the walk over layers, shapes, errors.

A `Layout` reads its own tensors into a `Model` and writes a `Model` as its own tensors, so a
conversion is `target.write(source.read(tensors))`; the canonical parameters are one more layout.
A framework's own file says only what is particular to it: its names, its signs, and what each of
its tensors holds.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float

from common.errors import InputError

CANONICAL_ORDER = "zrn"
DIRECTIONS = ("forward", "backward")
FLOATS = ("float16", "float32", "float64")

# The parts of a cell that a tensor can hold, and their axes; H is known from the first.
CELL = {
    "weight_hh": "3H H",
    "weight_ih": "3H D",
    "bias_ih": "3H",
    "bias_hh": "3H",
    "bias": "3H",  # the sum of the two, where that leaves the function the same
    "bias_n": "H",  # what of bias_hh cannot be added: that of n, for reset_after=True
    "biases": "2 3H",  # bias_ih and bias_hh, one above the other
    "biases end to end": "6H",
}
OTHERS = {"head.weight": "C D", "head.bias": "C", "vectors.weight": "V D"}
WEIGHTS = ("weight_hh", "weight_ih", "head.weight")

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
    transposes: ClassVar[bool] = False
    """Whether weights are [in, out], those of the head too, and not [out, in]."""
    others: ClassVar[Mapping[str, str]] = {name: name for name in OTHERS}
    """Where it keeps what is not the GRU: canonical name -> its key."""

    def cell(self, reset_after: bool) -> dict[str, tuple[str, ...]]:
        """Which tensors of a cell hold which part (see CELL): one, or one for each gate."""
        return {name: (name,) for name in Cell._fields}

    def write(self, model: Model, *, reset_after: bool) -> dict[str, np.ndarray]:
        """The model as a flat dict of tensors in this layout.

        Raises InputError where the layout has no place for the model: for its kind of reset, for
        a hidden bias of n, for its number of layers or directions.
        """
        self._check_reset(reset_after)
        scopes = set()
        held = self.cell(reset_after)
        parts: dict[tuple[int, str, str], np.ndarray] = {}
        for layer, cells in enumerate(model.layers):
            for direction, cell in zip(DIRECTIONS, cells, strict=False):
                if reset_after and "bias" in held and "bias_n" not in held:
                    self._check_bias_hh_n(f"gru.{layer}.{direction}.bias_hh", cell)
                scopes.add(self.scope.format(layer=layer, direction=direction))
                own = _parts(self._rearrange(cell, CANONICAL_ORDER, self.order), reset_after)
                for part, names in held.items():
                    for tensor, value in zip(names, np.split(own[part], len(names)), strict=True):
                        parts[layer, direction, tensor] = self._transposed(part, value)

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
            tensors[self.others[name]] = self._transposed(name, value)
        return {key: np.array(value, order="C") for key, value in tensors.items()}

    def read(self, tensors: Tensors, *, reset_after: bool) -> Model:
        """The model in these tensors.

        Raises InputError for the wrong kind of reset, and, naming the key, for a tensor that is
        missing, not expected, not of floating-point numbers or (naming both shapes) does not fit.
        """
        self._check_reset(reset_after)
        held = self.cell(reset_after)

        def keys(layer: int, direction: str, alone: bool) -> set[str]:
            tensors = chain.from_iterable(held.values())
            return {self._key(layer, direction, tensor, alone) for tensor in tensors}

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
                parts = {}
                for part in (part for part in CELL if part in held):
                    axes = CELL[part].replace("3H", "H" if len(held[part]) == 3 else "3H")
                    if self.stacks_directions:
                        axes = f"{directions} {axes}"
                    values = [
                        self._take(
                            reader, part, self._key(len(layers), direction, tensor, alone), axes
                        )
                        for tensor in held[part]
                    ]
                    if self.stacks_directions:
                        values = [value[place] for value in values]
                    parts[part] = np.concatenate(values)
                cells.append(self._rearrange(_cell(parts), self.order, CANONICAL_ORDER))
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
        if not any(self.others[name] in reader.tensors for name in names):
            return {}
        return {name: self._take(reader, name, self.others[name], OTHERS[name]) for name in names}

    def _take(self, reader: "_Reader", part: str, key: str, axes: str) -> np.ndarray:
        if self.transposes and part in WEIGHTS:
            axes = " ".join(reversed(axes.split()))
        return self._transposed(part, reader.take(key, axes))

    def _transposed(self, part: str, value: np.ndarray) -> np.ndarray:
        return value.T if self.transposes and part in WEIGHTS else value

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


def _parts(cell: Cell, reset_after: bool) -> dict[str, np.ndarray]:
    """All that CELL names.

    In z and r the two biases are only ever added to each other; in n too, for reset_after=False.
    For reset_after=True n's hidden bias is multiplied by r and has to stay apart.
    """
    bias, bias_n = cell.bias_ih + cell.bias_hh, np.split(cell.bias_hh, 3)[2].copy()
    if reset_after:
        bias[-len(bias_n) :] = np.split(cell.bias_ih, 3)[2]
    else:
        bias_n[:] = 0
    biases = np.stack([cell.bias_ih, cell.bias_hh])
    merged = {"bias": bias, "bias_n": bias_n, "biases": biases, "biases end to end": biases.ravel()}
    return cell._asdict() | merged


def _cell(parts: Mapping[str, np.ndarray]) -> Cell:
    """A cell of enough of its parts; a merged bias is all in bias_ih."""
    if "bias_ih" in parts:
        bias_ih, bias_hh = parts["bias_ih"], parts["bias_hh"]
    elif "bias" in parts:
        bias_ih, bias_hh = parts["bias"], np.zeros_like(parts["bias"])
        if "bias_n" in parts:
            bias_hh[-len(parts["bias_n"]) :] = parts["bias_n"]
    else:
        (biases,) = (value for part, value in parts.items() if part.startswith("biases"))
        bias_ih, bias_hh = biases.reshape(2, -1)
    return Cell(parts["weight_ih"], parts["weight_hh"], bias_ih, bias_hh)


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
