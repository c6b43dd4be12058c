"""What recurs, and how a layer of it can be computed: the same for both frameworks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from common.errors import InputError
from common.params import CellSpec

DEVICES = ("cuda", "cpu")


def dtype_name(dtype: Any) -> str:
    """NumPy's name of a dtype of any framework."""
    return str(dtype).removeprefix("torch.")


class LayerCall(NamedTuple):
    """What one layer computes from, all directions of it.

    T time steps, B rows of the batch, K distinct inputs, D input size, H hidden size, R directions.
    The arrays are those of the framework.
    """

    x: Any
    """The inputs [T, B, D], or, with tokens, the distinct inputs [K, D]."""
    tokens: Any
    """None, or the row of x that each time step reads [T, B], integers."""
    weights: Sequence[Sequence[Any]]
    """The parameters of each direction, in the order of CellSpec.names."""
    lengths: Any
    """The number of time steps of each row [B], integers."""
    h0: Any
    """The first states [R, B, S*H]."""
    resets: Any = None
    """None, or where a new sequence begins within a row [T, B], bool."""
    h_reset: Any = None
    """The states [R, B, S*H] in which these sequences begin; None without resets."""
    reset_after: bool = False
    """Whether the reset gate acts after the product with U_n."""
    return_sequences: bool = True
    """Whether the outputs are wanted; without them, they have no time steps."""
    bfloat16: bool = False
    """Whether the matrices that products multiply are rounded to bfloat16."""
    cell: str = "gru"
    """The cell, a key of CELLS in common/params.py."""

    @property
    def steps(self) -> int:
        """T."""
        return (self.x if self.tokens is None else self.tokens).shape[0]


@dataclass(frozen=True)
class Recurrence:
    """A way to compute a layer, and where it is available.

    compute(call), a LayerCall, returns (outputs [T, B, R*H], zero at padding, h_last [R, B, S*H]).
    """

    compute: Callable[[LayerCall], tuple[Any, Any]]
    available: Callable[[str, Any, int | None], bool] = lambda device, dtype, size: (
        dtype != "bfloat16"
    )
    """Whether it computes on a kind of device ("cpu", "cuda"), in a dtype of the framework, or with
    products in "bfloat16", so many hidden units (or some number of them)."""
    checks: bool = False
    """Whether it looks itself for int32 lengths and tokens that are out of range."""
    at_once: Callable[..., tuple[Any, Any] | None] | None = None
    """What `run` asks first: all layers, if only their results are wanted and it can, or None."""


@dataclass(frozen=True)
class Cell:
    """A cell (the GRU, the tanh RNN) in one framework.

    step(a, h, weight_hh, bias_hh, *own, reset_after=...), with the inputs' share of the
    pre-activations a [B, G*H], the state h [B, S*H] and the parameters that the cell declares
    beyond GRU_PARAMETERS, returns the next state and, by name, what is between the two. The first H
    of a state are the output.
    """

    spec: CellSpec
    """What the cell is in both frameworks."""
    step: Callable[..., tuple[Any, dict[str, Any]]]
    recurrences: Mapping[str, Recurrence]
    """By name; the first is the simplest; of those that are available, the last is the default."""

    @property
    def name(self) -> str:
        """The cell's name."""
        return self.spec.name

    @property
    def traceable(self) -> str:
        """The name of the fastest recurrence that consists of the framework's own operations."""
        return "scan" if "scan" in self.recurrences else next(iter(self.recurrences))

    def weights(self, parameters: Mapping[str, Any], layer: int, direction: str) -> list[Any]:
        """Of the canonical parameters, those of one direction of a layer."""
        return [parameters[f"{self.name}.{layer}.{direction}.{name}"] for name in self.spec.names]

    def implementations(
        self, device: str | None = "cpu", dtype: Any = "float32", size: int | None = None
    ) -> tuple[str, ...]:
        """The names of the recurrences that are available, without a device those on any."""
        return tuple(n for n in self.recurrences if self._available(n, device, dtype, size))

    def resolve(
        self,
        implementation: str,
        device: str | None = "cpu",
        dtype: Any = "float32",
        size: int | None = None,
    ) -> str:
        """The recurrence that a name or "auto" stands for. Raises InputError for no such name."""
        # No other is asked: to be asked may mean to be compiled and tried out.
        for name in reversed([*self.recurrences]) if implementation == "auto" else [implementation]:
            if name in self.recurrences and self._available(name, device, dtype, size):
                return name
        here = self.implementations(device, dtype)
        place = device or "this machine"
        place += "" if dtype_name(dtype) == "float32" else f" in {dtype_name(dtype)}"
        if implementation in here:
            place += f" with {size} hidden units"
            here = tuple(name for name in here if name != implementation)
        raise InputError(
            f"implementation {implementation}: on {place}, the {self.name} has "
            f"{', '.join(('auto', *here) if here else ['none'])}"
        )

    def _available(self, name: str, device: str | None, dtype: Any, size: int | None) -> bool:
        available = self.recurrences[name].available
        return any(available(each, dtype, size) for each in ((device,) if device else DEVICES))
