"""Implementations of a GRU behind one function, from a case to results and gradients.

An `Implementation` takes a `Case` of NumPy arrays, computes in their dtype, and returns NumPy
arrays under the canonical names. comparison/peers/ has the implementations; this file depends on
neither framework.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import ml_dtypes  # a dependency of JAX
import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import DTypeLike

from common import oracle
from common.cells import LayerCall
from common.convert import from_format, to_format
from common.params import ProductDtype, cell_of

T = TypeVar("T")
Result = dict[str, np.ndarray]
"""outputs, h_last, logits, loss, and "d NAME": the gradient with respect to each parameter, x and
(if the case has them) h0 and h_reset."""
Layer = Callable[..., tuple[Any, Any]]
"""A GRU of a framework with the arguments of the twins' `gru`: (weights, x, lengths, h0, tokens=,
reset_after=, return_sequences=) -> (outputs, h_last). The names of the weights are those of its
layout."""
Inference = Callable[[Mapping[str, np.ndarray], np.ndarray], Callable[[], object]]
"""A GRU with the reset after the product, called as users of its framework do: (canonical weights,
x [T, B, D]) -> a function that computes the last state and waits for it."""
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
EVERY = ("float64", "float32", "bfloat16")


class Missing(Exception):
    """An implementation cannot run on this machine; the message says why."""


@dataclass(frozen=True, eq=False)
class Case:
    """A problem: parameters, a batch, and the factors of the objective (see `objective`)."""

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
    """If given, x holds the distinct inputs, and the GRU reads x[tokens]."""
    resets: Bool[np.ndarray, "T B"] | None = None
    h_reset: Float[np.ndarray, "L*R B H"] | None = None

    @property
    def cell(self) -> str:
        """The name of the cell."""
        return cell_of(self.parameters)

    @property
    def leaves(self) -> dict[str, np.ndarray]:
        """The arrays with respect to which the objective is differentiated."""
        arrays = {**self.parameters, "x": self.x, "h0": self.h0, "h_reset": self.h_reset}
        return {name: array for name, array in arrays.items() if array is not None}

    @property
    def others(self) -> tuple[np.ndarray | None, ...]:
        """The other arrays."""
        arrays = (self.lengths, self.tokens, self.resets)
        return *arrays, self.labels, self.d_outputs, self.d_h_last

    def with_h0(self) -> "Case":
        """The same case with h0, for an implementation that requires it."""
        return replace(self, h0=np.zeros_like(self.d_h_last)) if self.h0 is None else self

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> "Case":
        """The case with the function applied to each floating-point array."""
        parameters = {name: function(value) for name, value in self.parameters.items()}
        names = ("x", "h0", "h_reset", "d_outputs", "d_h_last")
        arrays: dict[str, Any] = {name: getattr(self, name) for name in names}
        arrays = {name: function(each) for name, each in arrays.items() if each is not None}
        return replace(self, parameters=parameters, **arrays)

    def astype(self, dtype: DTypeLike) -> "Case":
        """The same case with all floating-point numbers rounded to dtype."""
        return self.map(lambda array: array.astype(dtype))


@dataclass(frozen=True, eq=False)
class Implementation:
    """The name in tables, the computation, and the cases that it supports."""

    name: str
    run: Callable[[Case], Result]
    supports: Callable[[Case], bool] = lambda case: True
    lacks: tuple[str, ...] = ()
    """Suffixes of the names of parameters that it does not have."""
    dtypes: tuple[str, ...] = ("float64", "float32")
    """The dtypes that are checked."""
    cell: str = "gru"
    resets: bool = False
    """Whether a sequence can begin within a row."""
    peer: bool = False
    """Whether it belongs to another library (see Check.peer)."""

    def can(self, case: Case, dtype: str) -> bool:
        """Whether it supports a case in a dtype."""
        can = self.cell == case.cell and dtype in self.dtypes and self.supports(case)
        return can and (self.resets or case.resets is None)


def part(named: Mapping[str, T], prefix: str) -> dict[str, T]:
    """The entries whose name starts with prefix."""
    return {name: value for name, value in named.items() if name.startswith(prefix)}


def below(named: Mapping[str, T], prefix: str) -> dict[str, T]:
    """The same entries under the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in part(named, prefix).items()}


def converted(layout: str, parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights of a classifier's GRU in a layout, with the reset after the product."""
    return part(to_format(layout, parameters, reset_after=True), "gru")


def objective(
    leaves: Mapping[str, Any],
    others: Sequence[Any],
    layer: Layer,
    reset_after: bool,
    classifier: Any,
) -> tuple[Any, dict[str, Any]]:
    """The differentiated value, and the results, of a layer and the classifier's head on top of it.

    The value is loss + sum(outputs * d_outputs) + sum(h_last * d_h_last), where loss is the
    classifier's cross-entropy. Therefore every result contributes to every gradient.

    leaves and others: those of a case, as arrays of a framework; classifier: the module of this
    name in the framework's twin.
    """
    lengths, tokens, resets, labels, d_outputs, d_h_last = others
    options = {"tokens": tokens, "reset_after": reset_after}
    if resets is not None:
        options |= {"resets": resets, "h_reset": leaves.get("h_reset")}
    outputs, h_last = layer(leaves, leaves["x"], lengths, leaves.get("h0"), **options)
    last = h_last[-(d_outputs.shape[-1] // h_last.shape[-1]) :]
    logits = classifier.head(leaves, classifier.pool(outputs, last, lengths, "last"), relu=True)
    loss = classifier.cross_entropy(logits, labels)
    value = loss + (outputs * d_outputs).sum() + (h_last * d_h_last).sum()
    return value, {"outputs": outputs, "h_last": h_last, "logits": logits, "loss": loss}


def twin_cell(
    twin: Any,
    compute: Callable[..., Result],
    implementation: str,
    cell: str = "gru",
    product_dtype: ProductDtype = "float32",
) -> Implementation:
    """An implementation of a cell of a twin, which is a package such as torch_impl."""

    def layer(parameters: Any, x: Any, lengths: Any, h0: Any, **others: Any) -> Any:
        call = LayerCall(x, lengths=lengths, h0=h0, product_dtype=product_dtype, **others)
        cells = twin.classifier.CELLS
        return twin.layers.run(cells[cell], parameters, call, implementation=implementation)

    words = [each for each in (cell, implementation) if each not in ("gru", "auto")] or ["auto"]
    name = " ".join([twin.__name__.removesuffix("_impl"), *words])
    return Implementation(name, partial(compute, layer=layer), dtypes=EVERY, cell=cell, resets=True)


def twin_cells(
    cells: Mapping[str, Any], implementation_of: Callable[..., Implementation]
) -> Iterable[Implementation]:
    """The GRU of a twin in each of its implementations, and the other cells."""
    for name, cell in cells.items():
        implementations = cell.implementations() if name == "gru" else ["auto"]
        if name != "gru" and cell.resolve("auto") != cell.traceable:
            implementations.append(cell.traceable)
        for implementation in implementations:
            yield implementation_of(implementation, name)


def peer(
    name: str,
    layout: str,
    compute: Callable[[Case], Result],
    supports: Callable[[Case], bool] = lambda case: case.reset_after,
    lacks: tuple[str, ...] = (),
) -> Implementation:
    """The GRU of another library; `compute` reads its weights in a layout of common.convert.

    The conversion reorders and negates, so it also converts the gradients back. A bias that is the
    sum of two canonical ones has the gradient of both.
    """

    def run(case: Case) -> Result:
        weights = converted(layout, case.parameters)
        parameters = weights | part(case.parameters, "head.")
        result = compute(replace(case.with_h0(), parameters=parameters))
        layout_gradients = {name: result.pop(f"d {name}") for name in weights}
        gradients = from_format(layout, layout_gradients, reset_after=True)
        for name, value in gradients.items():
            if layout != "torch" and name.endswith("bias_hh"):
                z_and_r = 2 * len(value) // 3
                value[:z_and_r] = gradients[name.replace("bias_hh", "bias_ih")][:z_and_r]
        return result | {f"d {name}": value for name, value in gradients.items()}

    return Implementation(name, run, supports, lacks, peer=True)


def equations(case: Case, dtype: DTypeLike) -> Result:
    """The result of the oracle, computed in dtype."""
    x = case.x if case.tokens is None else case.x[case.tokens]
    arrays = (x, case.lengths, case.h0, case.resets, case.h_reset)
    run = oracle.forward(case.parameters, *arrays, reset_after=case.reset_after, dtype=dtype)
    head = oracle.classify(run, case.labels)
    gradients = oracle.backward(run, case.d_outputs, case.d_h_last + head.d_h_last)
    if case.tokens is not None:
        d_x, gradients["x"] = gradients["x"], np.zeros(case.x.shape, dtype)
        np.add.at(gradients["x"], case.tokens, d_x)
    if case.h_reset is None:  # then a reset restores h0
        gradients["h0"] = gradients["h0"] + gradients["h_reset"]
    gradients |= head.gradients
    results = {"outputs": run.outputs, "h_last": run.h_last, "logits": head.logits}
    results["loss"] = np.asarray(head.loss)
    return results | {f"d {name}": gradients[name] for name in case.leaves}
