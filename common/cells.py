"""What recurs, and how a layer of it can be computed: the same for both frameworks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import InputError
from common.params import CellSpec

DEVICES = ("cuda", "cpu")


def dtype_name(dtype: Any) -> str:
    """NumPy's name of a dtype of any framework."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Recurrence:
    """A way to compute a layer, and where there is one.

    compute(x, tokens, weights, lengths, h0, resets, h_reset, *, reset_after, return_sequences, and
    where it is available for bfloat16 that, whether what products multiply is rounded to bfloat16)
    takes inputs x [T, B, D], or distinct inputs [K, D] and tokens [T, B] that point at them, the
    weights of each direction, lengths [B], first states h0 [R, B, H] and, or None, resets [T, B]
    and the states h_reset [R, B, H] that they go back to; it returns (outputs [T, B, R*H], zero at
    padding, h_last [R, B, H]). Without return_sequences, outputs have no time steps.
    """

    compute: Callable[..., tuple[Any, Any]]
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
