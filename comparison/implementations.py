"""Everything that computes a GRU, behind one function: a case in, results and gradients out.

An `Implementation` takes a `Case` of NumPy arrays, computes in their dtype, and returns NumPy
arrays under the canonical names: see comparison/peers/. Here is what knows neither.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import ml_dtypes  # which comes with JAX
import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import DTypeLike

from common import oracle
from common.convert import from_format, to_format
from common.params import cell_of

T = TypeVar("T")
Result = dict[str, np.ndarray]
"""outputs, h_last, logits, loss, and "d NAME": the gradient with respect to each parameter, x and
(if the case has them) h0 and h_reset."""
Layer = Callable[..., tuple[Any, Any]]
"""A GRU of a framework, called like our `gru`: (weights, x, lengths, h0, tokens=, reset_after=,
return_sequences=) -> (outputs, h_last). The weights have the names of its layout."""
Inference = Callable[[Mapping[str, np.ndarray], np.ndarray], Callable[[], object]]
"""A GRU that resets after, as the users of a framework call it: (canonical weights, x [T, B, D]) ->
a call that returns the last state when it is done."""
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
EVERY = ("float64", "float32", "bfloat16")


class Missing(Exception):
    """What cannot be computed on this machine; says why."""


@dataclass(frozen=True, eq=False)
class Case:
    """One problem: parameters, a batch, and what to differentiate (see `objective`)."""

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
    resets: Bool[np.ndarray, "T B"] | None = None
    h_reset: Float[np.ndarray, "L*R B H"] | None = None

    @property
    def cell(self) -> str:
        """What it is a problem of."""
        return cell_of(self.parameters)

    @property
    def leaves(self) -> dict[str, np.ndarray]:
        """What to differentiate by."""
        states = {"h0": self.h0, "h_reset": self.h_reset}
        given = {name: state for name, state in states.items() if state is not None}
        return {**self.parameters, "x": self.x, **given}

    @property
    def others(self) -> tuple[np.ndarray | None, ...]:
        """The other arrays."""
        return (
            *(self.lengths, self.tokens, self.resets),
            *(self.labels, self.d_outputs, self.d_h_last),
        )

    def with_h0(self) -> "Case":
        """The same case for an implementation that has to be given h0."""
        return replace(self, h0=np.zeros_like(self.d_h_last)) if self.h0 is None else self

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> "Case":
        """The case with the function's result in place of each floating-point array."""
        parameters = {name: function(value) for name, value in self.parameters.items()}
        names = ("x", "h0", "h_reset", "d_outputs", "d_h_last")
        arrays: dict[str, Any] = {name: getattr(self, name) for name in names}
        arrays = {name: function(each) for name, each in arrays.items() if each is not None}
        return replace(self, parameters=parameters, **arrays)

    def astype(self, dtype: DTypeLike) -> "Case":
        """The same case with all of its floating-point numbers rounded to dtype."""
        return self.map(lambda array: array.astype(dtype))


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
    resets: bool = False
    """Whether it can begin a sequence within a row."""
    peer: bool = False
    """Whether it belongs to another library, and not to this project (see Check.peer)."""

    def can(self, case: Case, dtype: str) -> bool:
        """Whether it can express a case, in a dtype."""
        can = self.cell == case.cell and dtype in self.dtypes and self.supports(case)
        return can and (self.resets or case.resets is None)


def part(named: Mapping[str, T], prefix: str) -> dict[str, T]:
    """The entries whose name starts with prefix."""
    return {name: value for name, value in named.items() if name.startswith(prefix)}


def converted(layout: str, parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights of a classifier's GRU in a layout that resets after."""
    return part(to_format(layout, parameters, reset_after=True), "gru")


def objective(
    leaves: Mapping[str, Any],
    others: Sequence[Any],
    layer: Layer,
    reset_after: bool,
    classifier: Any,
) -> tuple[Any, dict[str, Any]]:
    """What is differentiated, and the results, of a layer and the classifier's head on top of it.

    It is loss + sum(outputs * d_outputs) + sum(h_last * d_h_last), where loss is the classifier's
    cross-entropy: so everything that is returned has a part in it.

    Arguments: a case's leaves and others, as arrays of a framework; classifier is that framework's
    module of this name.
    """
    lengths, tokens, resets, labels, d_outputs, d_h_last = others
    how = {"tokens": tokens, "reset_after": reset_after}
    if resets is not None:
        how |= {"resets": resets, "h_reset": leaves.get("h_reset")}
    outputs, h_last = layer(leaves, leaves["x"], lengths, leaves.get("h0"), **how)
    last = h_last[-(d_outputs.shape[-1] // h_last.shape[-1]) :]
    logits = classifier.head(leaves, classifier.pool(outputs, last, lengths, "last"), relu=True)
    loss = classifier.cross_entropy(logits, labels)
    value = loss + (outputs * d_outputs).sum() + (h_last * d_h_last).sum()
    return value, {"outputs": outputs, "h_last": h_last, "logits": logits, "loss": loss}


def peer(
    name: str,
    layout: str,
    compute: Callable[[Case], Result],
    supports: Callable[[Case], bool] = lambda case: case.reset_after,
    lacks: tuple[str, ...] = (),
) -> Implementation:
    """Another library's GRU, whose weights `compute` reads in a layout of common.convert.

    The conversion reorders and negates, so it takes gradients back as it takes parameters. But a
    bias that is the sum of two has the gradient of both.
    """

    def run(case: Case) -> Result:
        weights = converted(layout, case.parameters)
        parameters = weights | part(case.parameters, "head.")
        result = compute(replace(case.with_h0(), parameters=parameters))
        found = {name: result.pop(f"d {name}") for name in weights}
        gradients = from_format(layout, found, reset_after=True)
        for name, value in gradients.items():
            if layout != "torch" and name.endswith("bias_hh"):
                z_and_r = 2 * len(value) // 3
                value[:z_and_r] = gradients[name.replace("bias_hh", "bias_ih")][:z_and_r]
        return result | {f"d {name}": value for name, value in gradients.items()}

    return Implementation(name, run, supports, lacks, peer=True)


def equations(case: Case, dtype: DTypeLike) -> Result:
    """The oracle's answer, computed in dtype."""
    x = case.x if case.tokens is None else case.x[case.tokens]
    arrays = (x, case.lengths, case.h0, case.resets, case.h_reset)
    run = oracle.forward(case.parameters, *arrays, reset_after=case.reset_after, dtype=dtype)
    head = oracle.classify(run, case.labels)
    gradients = oracle.backward(run, case.d_outputs, case.d_h_last + head.d_h_last)
    if case.tokens is not None:
        d_x, gradients["x"] = gradients["x"], np.zeros(case.x.shape, dtype)
        np.add.at(gradients["x"], case.tokens, d_x)
    if case.h_reset is None:  # h0 is both
        gradients["h0"] = gradients["h0"] + gradients["h_reset"]
    gradients |= head.gradients
    results = {"outputs": run.outputs, "h_last": run.h_last, "logits": head.logits}
    results["loss"] = np.asarray(head.loss)
    return results | {f"d {name}": gradients[name] for name in case.leaves}
