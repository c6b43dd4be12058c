"""Everything that computes a GRU, behind one function: a case in, results and gradients out.

An `Implementation` takes a `Case` of NumPy arrays, computes in their dtype, and returns NumPy
arrays under the canonical names. Those in PyTorch are in comparison/torch_layers.py, those in JAX
in comparison/jax_layers.py; here is what knows neither.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import ml_dtypes  # which comes with JAX
import numpy as np
from jaxtyping import Float, Int
from numpy.typing import DTypeLike

from common import oracle
from common.convert import from_format, to_format
from common.params import cell_of, structure

T = TypeVar("T")
Result = dict[str, np.ndarray]
"""outputs, h_last, logits, loss, and "d NAME": the gradient with respect to each parameter, x and
(if the case has one) h0."""
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
EVERY = ("float64", "float32", "bfloat16")


@dataclass(frozen=True, eq=False)
class Case:
    """One problem: parameters, a batch, and what to differentiate.

    The gradients are those of loss + sum(outputs * d_outputs) + sum(h_last * d_h_last), where loss
    is the classifier's cross-entropy: so everything that is returned has a part in them.
    """

    name: str
    reset_after: bool
    parameters: dict[str, np.ndarray]
    x: Float[np.ndarray, "T B D"] | Float[np.ndarray, "K D"]
    lengths: Int[np.ndarray, " B"]
    h0: Float[np.ndarray, "L*R B H"] | None
    labels: Int[np.ndarray, " B"]
    d_outputs: Float[np.ndarray, "T B R*H"]
    d_h_last: Float[np.ndarray, "L*R B H"]
    tokens: Int[np.ndarray, "T B"] | None = None
    """If given, x holds the distinct inputs, and x[tokens] is what the GRU reads."""

    @property
    def directions(self) -> int:
        """R, one or two."""
        return len(structure(self.parameters)[1])

    @property
    def cell(self) -> str:
        """What it is a problem of."""
        return cell_of(self.parameters)

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """The parameters of the cell, without the head's."""
        return part(self.parameters, f"{self.cell}.")

    @property
    def head(self) -> dict[str, np.ndarray]:
        """The head's."""
        return part(self.parameters, "head.")

    def astype(self, dtype: DTypeLike) -> "Case":
        """The same case with all of its floating-point numbers rounded to dtype."""
        return replace(
            self,
            parameters={name: value.astype(dtype) for name, value in self.parameters.items()},
            x=self.x.astype(dtype),
            h0=None if self.h0 is None else self.h0.astype(dtype),
            d_outputs=self.d_outputs.astype(dtype),
            d_h_last=self.d_h_last.astype(dtype),
        )


@dataclass(frozen=True, eq=False)
class Implementation:
    """A name for the table, the computation, and what it can express."""

    name: str
    run: Callable[[Case], Result]
    supports: Callable[[Case], bool] = lambda case: True
    lacks: tuple[str, ...] = ()
    """Endings of the names of the parameters that it does not have."""
    dtypes: tuple[str, ...] = ("float64", "float32")
    """The dtypes that it is checked in."""
    cell: str = "gru"

    def can(self, case: Case, dtype: str) -> bool:
        """Whether it can express a case, in a dtype."""
        return self.cell == case.cell and dtype in self.dtypes and self.supports(case)


def part(named: Mapping[str, T], prefix: str) -> dict[str, T]:
    """The entries whose name starts with prefix."""
    return {name: value for name, value in named.items() if name.startswith(prefix)}


def converted(layout: str, parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights of a classifier's GRU in a layout that resets after."""
    tensors = to_format(layout, parameters, reset_after=True)
    return part(tensors, "gru")


def in_layout(
    layout: str, compute: Callable[[Case, dict[str, np.ndarray]], Result]
) -> Callable[[Case], Result]:
    """An Implementation's run: compute's, which takes its weights in a layout of common.convert.

    The case that it is given has h0. The conversion reorders and negates, so it takes gradients
    back as it takes parameters. But a bias that is the sum of two has the gradient of both.
    """

    def run(case: Case) -> Result:
        weights = converted(layout, case.parameters)
        h0 = np.zeros_like(case.d_h_last) if case.h0 is None else case.h0
        result = compute(replace(case, h0=h0), weights)
        if case.h0 is None:
            del result["d h0"]
        found = {name: result.pop(f"d {name}") for name in weights}
        gradients = from_format(layout, found, reset_after=True)
        for name, value in gradients.items():
            if layout != "torch" and name.endswith("bias_hh"):
                z_and_r = 2 * len(value) // 3
                value[:z_and_r] = gradients[name.replace("bias_hh", "bias_ih")][:z_and_r]
        return result | {f"d {name}": value for name, value in gradients.items()}

    return run


def equations(case: Case, dtype: DTypeLike) -> Result:
    """The oracle's answer, computed in dtype."""
    x = case.x if case.tokens is None else case.x[case.tokens]
    run = oracle.forward(
        case.parameters, x, case.lengths, case.h0, reset_after=case.reset_after, dtype=dtype
    )
    head = oracle.classify(run, case.labels)
    gradients = oracle.backward(run, case.d_outputs, case.d_h_last + head.d_h_last)
    if case.tokens is not None:
        d_distinct = np.zeros(case.x.shape, dtype)
        np.add.at(d_distinct, case.tokens, gradients["x"])
        gradients["x"] = d_distinct
    if case.h0 is None:
        del gradients["h0"]
    results = {"outputs": run.outputs, "h_last": run.h_last}
    results |= {"logits": head.logits, "loss": np.asarray(head.loss)}
    return results | {f"d {name}": g for name, g in (gradients | head.gradients).items()}
