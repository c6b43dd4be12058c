"""Cells and their recurrences, the interface that both frameworks share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from common.errors import InputError
from common.params import CELLS, CellSpec, ProductDtype

DEVICES = ("cuda", "cpu")


def dtype_name(dtype: Any) -> str:
    """NumPy's name of a dtype of any framework."""
    return str(dtype).removeprefix("torch.")


class LayerCall(NamedTuple):
    """The arguments of one layer, with all its directions.

    `run` takes one for all layers, without weights and with all states [L*R, B, S*H].
    T time steps, B rows of the batch, K distinct inputs, D input size, H hidden size, R directions.
    The arrays are those of the framework.
    """

    x: Any
    """The inputs [T, B, D], or, with tokens, the distinct inputs [K, D]."""
    tokens: Any = None
    """None, or the row of x that each time step reads [T, B], integers."""
    weights: Sequence[Sequence[Any]] = ()
    """The parameters of each direction, in the order of CellSpec.names."""
    lengths: Any = None
    """The number of time steps of each row [B], integers."""
    h0: Any = None
    """The first states [R, B, S*H]."""
    resets: Any = None
    """None, or whether a new sequence begins at a step of a row [T, B], bool."""
    h_reset: Any = None
    """The initial states [R, B, S*H] of these sequences; None without resets."""
    reset_after: bool = False
    """Whether the reset gate acts after the product with U_n."""
    return_sequences: bool = True
    """Whether to return the outputs; otherwise the outputs have no time steps."""
    product_dtype: ProductDtype = "float32"
    """The dtype to which the factors of matrix products are rounded."""
    cell: str = "gru"
    """The cell, a key of CELLS in common/params.py."""

    @property
    def steps(self) -> int:
        """T."""
        return (self.x if self.tokens is None else self.tokens).shape[0]

    @property
    def arrays(self) -> dict[str, Any]:
        """The arrays by name, in the order of the arguments of `gru`."""
        x, tokens, _, lengths, h0, resets, h_reset, *_ = self
        arrays = {"x": x, "lengths": lengths, "h0": h0, "tokens": tokens}
        return {**arrays, "resets": resets, "h_reset": h_reset}


@dataclass(frozen=True)
class Recurrence:
    """An implementation of a layer, and its availability.

    compute(call), a LayerCall, returns (outputs [T, B, R*H], zero at padding, h_last [R, B, S*H]).
    """

    compute: Callable[[LayerCall], tuple[Any, Any]]
    available: Callable[[str, Any, int | None], bool] = lambda device, dtype, size: (
        dtype != "bfloat16"
    )
    """Whether a device ("cpu", "cuda"), a dtype of the framework or "bfloat16" products, and a
    number of hidden units (None: any) are supported."""
    checks: bool = False
    """Whether `compute` validates the range of int32 lengths and tokens."""
    try_inference_kernel: Callable[..., tuple[Any, Any] | None] | None = None
    """try_inference_kernel(parameters, call) computes all layers for inference, or returns None if
    an argument requires the general path. `run` calls it first."""
    proven: Callable[[Any, int | None], bool] = lambda dtype, size: True
    """Whether "auto" may select this recurrence for a dtype and a number of hidden units, as above;
    the GPU kernel must have passed its trial."""


@dataclass(frozen=True)
class Cell:
    """A cell (the GRU, the tanh RNN) in one framework.

    step(a, h, weight_hh, bias_hh, *own, reset_after=...), with the input part of the
    pre-activations a [B, G*H], the state h [B, S*H] and the parameters that the cell declares
    beyond GRU_PARAMETERS, returns the next state and a dict of intermediate values. The output is
    the first H elements of a state.
    """

    spec: CellSpec
    step: Callable[..., tuple[Any, dict[str, Any]]]
    recurrences: Mapping[str, Recurrence]
    """By name, the simplest first; the default is the last that is available."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def traceable(self) -> str:
        """The name of the fastest recurrence that consists of operations of the framework."""
        return "scan" if "scan" in self.recurrences else next(iter(self.recurrences))

    def weights(self, parameters: Mapping[str, Any], layer: int, direction: str) -> list[Any]:
        """The canonical parameters of one direction of a layer."""
        return [parameters[f"{self.name}.{layer}.{direction}.{name}"] for name in self.spec.names]

    def implementations(
        self, device: str | None = "cpu", dtype: Any = "float32", size: int | None = None
    ) -> tuple[str, ...]:
        """The names of the available recurrences; device=None: available on any device."""
        return tuple(n for n in self.recurrences if self._available(n, device, dtype, size))

    def resolve(
        self,
        implementation: str,
        device: str | None = "cpu",
        dtype: Any = "float32",
        size: int | None = None,
    ) -> str:
        """The recurrence that a name or "auto" selects. Raises InputError if it is unavailable."""
        # `proven` may compile and run a kernel, so the loop ends at the first suitable
        # recurrence.
        is_auto = implementation == "auto"
        for name in reversed([*self.recurrences]) if is_auto else [implementation]:
            is_available = name in self.recurrences and self._available(name, device, dtype, size)
            if is_available and (not is_auto or self.recurrences[name].proven(dtype, size)):
                return name
        names = self.implementations(device, dtype)
        place = device or "this machine"
        place += "" if dtype_name(dtype) == "float32" else f" in {dtype_name(dtype)}"
        if implementation in names:
            place += f" with {size} hidden units"
            names = tuple(name for name in names if name != implementation)
        raise InputError(
            f"implementation {implementation}: on {place}, the {self.name} has "
            f"{', '.join(('auto', *names) if names else ['none'])}"
        )

    def _available(self, name: str, device: str | None, dtype: Any, size: int | None) -> bool:
        available = self.recurrences[name].available
        return any(available(each, dtype, size) for each in ((device,) if device else DEVICES))


class Cells(dict[str, Cell]):
    """The registered cells that a twin has, by name. InputError, in place of KeyError, names the
    file that the twin does not have."""

    def __init__(self, twin: str) -> None:
        """twin: torch_impl or jax_impl."""
        names = (name for name in CELLS if find_spec(f"{twin}.{name}"))
        super().__init__((name, import_module(f"{twin}.{name}").CELL) for name in names)
        self.twin = twin

    def __missing__(self, name: str) -> Cell:
        raise InputError(f"cell {name}: {self.twin} has no file {self.twin}/{name}.py for it")
