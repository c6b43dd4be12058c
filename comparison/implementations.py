"""Everything that computes a GRU, behind one function: a case in, results and gradients out.

Here are the handwritten GRUs of both twins, PyTorch's nn.GRU and Flax's two GRUCells; the last
three through common.convert. An `Implementation` takes a `Case` of NumPy arrays, computes in their
dtype, and returns NumPy arrays under the canonical names.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx, traverse_util
from jax import Array
from jaxtyping import Float, Int
from numpy.typing import DTypeLike
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import jax_impl
import jax_impl.classifier
import torch_impl
import torch_impl.classifier
from common import oracle
from common.convert import from_format, to_format
from common.params import structure

T = TypeVar("T")
Result = dict[str, np.ndarray]
"""outputs, h_last, logits, loss, and "d NAME": the gradient with respect to each parameter, x and
(if the case has one) h0."""


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


def part(named: Mapping[str, T], prefix: str) -> dict[str, T]:
    """The entries whose name starts with prefix."""
    return {name: value for name, value in named.items() if name.startswith(prefix)}


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


def numpy_equations() -> Implementation:
    """The oracle's equations in the case's own dtype: what rounding alone does to them."""
    return Implementation("NumPy", lambda case: equations(case, case.x.dtype))


# PyTorch. A layer is a function of (its weights, x, lengths, h0, the case) that returns
# (outputs, h_last); the weights may have another layout's names.


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: a second one makes small arrays slower, on a busy machine much so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


EVERY = ("float64", "float32", "bfloat16")
BFLOAT16 = np.dtype(jnp.bfloat16)


def to_torch(array: np.ndarray) -> Tensor:
    """An array as a tensor, in bfloat16, too, which PyTorch does not take from NumPy."""
    if array.dtype == BFLOAT16:
        return torch.tensor(array.astype(np.float32)).bfloat16()
    return torch.tensor(array)


def from_torch(tensor: Tensor) -> np.ndarray:
    """The way back."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.float().numpy().astype(BFLOAT16)
    return tensor.numpy()


def torch_result(
    case: Case,
    weights: dict[str, Tensor],
    layer: Callable[[dict[str, Tensor], Tensor, Tensor, Tensor | None, Case], tuple],
) -> Result:
    """Results and gradients of a layer and the classifier's head on top of it."""
    leaves = {"x": to_torch(case.x), **weights}
    leaves |= {name: to_torch(p) for name, p in part(case.parameters, "head.").items()}
    if case.h0 is not None:
        leaves["h0"] = to_torch(case.h0)
    for leaf in leaves.values():
        leaf.requires_grad_()

    outputs, h_last = layer(leaves, leaves["x"], torch.tensor(case.lengths), leaves.get("h0"), case)
    _, directions = structure(case.parameters)
    logits = torch_impl.classifier.head(leaves, h_last[-len(directions) :])
    loss = torch_impl.classifier.cross_entropy(logits, torch.tensor(case.labels, dtype=torch.int64))
    objective = loss + (outputs * to_torch(case.d_outputs)).sum()
    objective = objective + (h_last * to_torch(case.d_h_last)).sum()
    # Without a single step, x and the weights have no part in the result.
    gradients = torch.autograd.grad(objective, list(leaves.values()), materialize_grads=True)

    results = {"outputs": outputs, "h_last": h_last, "logits": logits, "loss": loss}
    results |= {f"d {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {name: from_torch(value) for name, value in results.items()}


def torch_gru(implementation: str, *, autocast: bool = False) -> Implementation:
    """torch_impl's GRU; with autocast, of float32 arguments, which torch.autocast rounds."""

    def layer(
        leaves: dict[str, Tensor], x: Tensor, lengths: Tensor, h0: Tensor | None, case: Case
    ) -> tuple[Tensor, Tensor]:
        tokens = None if case.tokens is None else torch.tensor(case.tokens)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs, h_last = torch_impl.gru.gru(
                leaves,
                x,
                lengths,
                h0,
                tokens=tokens,
                reset_after=case.reset_after,
                implementation=implementation,
            )
        return outputs.to(x.dtype), h_last.to(x.dtype)

    def run(case: Case) -> Result:
        dtype = case.x.dtype
        case = case.astype(np.float32) if autocast else case
        weights = {name: to_torch(p) for name, p in part(case.parameters, "gru.").items()}
        result = torch_result(case, weights, layer)
        return {name: value.astype(dtype) for name, value in result.items()}

    if autocast:
        return Implementation("torch autocast", run, dtypes=("bfloat16",))
    return Implementation(f"torch {implementation}", run, dtypes=EVERY)


def torch_nn_gru() -> Implementation:
    """torch.nn.GRU on packed sequences.

    Packing wants a step and a word in each row. A row without words is given one, and its results
    are replaced by what they have to be.
    """

    def run(case: Case) -> Result:
        layers, directions = structure(case.parameters)
        H = case.d_h_last.shape[-1]
        module = torch.nn.GRU(case.x.shape[-1], H, layers, bidirectional=len(directions) == 2)
        module = module.to(torch.tensor(case.x).dtype)
        converted = to_format("torch", part(case.parameters, "gru."), reset_after=True)
        module.load_state_dict({name: torch.tensor(value) for name, value in converted.items()})

        def layer(
            leaves: dict[str, Tensor], x: Tensor, lengths: Tensor, h0: Tensor | None, case: Case
        ) -> tuple[Tensor, Tensor]:
            x = x if case.tokens is None else x[torch.tensor(case.tokens)]
            h0 = x.new_zeros(case.d_h_last.shape) if h0 is None else h0
            steps = len(x)
            x = x if steps else x.new_zeros(1, *x.shape[1:])
            packed = pack_padded_sequence(x, lengths.clamp(min=1), enforce_sorted=False)
            outputs, h_last = module(packed, h0)
            outputs, _ = pad_packed_sequence(outputs, total_length=len(x))
            words = lengths[:, None] > 0
            return torch.where(words, outputs, 0)[:steps], torch.where(words, h_last, h0)

        result = torch_result(case, dict(module.named_parameters()), layer)
        gradients = {name: result.pop(f"d {name}") for name in converted}
        # The conversion reorders and negates, so it takes gradients where it takes parameters.
        gradients = from_format("torch", gradients, reset_after=True)
        return result | {f"d {name}": value for name, value in gradients.items()}

    return Implementation("torch nn.GRU", run, supports=lambda case: case.reset_after)


# JAX. A layer is a function of (leaves, x, lengths, h0, tokens, reset_after), as above.

JaxLayer = Callable[..., tuple[Array, Array]]


def jax_result(case: Case, weights: dict[str, np.ndarray], layer: JaxLayer) -> Result:
    """Results and gradients of a layer and the classifier's head on top of it, under jax.jit."""
    with jax.enable_x64(case.x.dtype == np.float64):
        leaves = {"x": case.x, **weights, **part(case.parameters, "head.")}
        if case.h0 is not None:
            leaves["h0"] = case.h0
        batch = (case.lengths, case.tokens, case.labels, case.d_outputs, case.d_h_last)
        directions = len(structure(case.parameters)[1])
        results, gradients = _jax_run(leaves, *batch, layer, directions, case.reset_after)
        results |= {f"d {name}": gradient for name, gradient in gradients.items()}
        return {name: np.asarray(value) for name, value in results.items()}


# Compiled once for cases of the same shapes.
@partial(jax.jit, static_argnames=("layer", "directions", "reset_after"))
def _jax_run(
    leaves: dict[str, Array],
    lengths: Array,
    tokens: Array | None,
    labels: Array,
    d_outputs: Array,
    d_h_last: Array,
    layer: JaxLayer,
    directions: int,
    reset_after: bool,
) -> tuple[dict[str, Array], dict[str, Array]]:
    def objective(leaves: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        outputs, h_last = layer(leaves, leaves["x"], lengths, leaves.get("h0"), tokens, reset_after)
        logits = jax_impl.classifier.head(leaves, h_last[-directions:])
        loss = jax_impl.classifier.cross_entropy(logits, labels)
        value = loss + (outputs * d_outputs).sum() + (h_last * d_h_last).sum()
        return value, {"outputs": outputs, "h_last": h_last, "logits": logits, "loss": loss}

    gradients, results = jax.grad(objective, has_aux=True)(leaves)
    return results, gradients


def jax_gru(implementation: str) -> Implementation:
    """jax_impl's GRU."""

    def layer(
        leaves: dict[str, Array],
        x: Array,
        lengths: Array,
        h0: Array | None,
        tokens: Array | None,
        reset_after: bool,
    ) -> tuple[Array, Array]:
        return jax_impl.gru.gru(
            leaves,
            x,
            lengths,
            h0,
            tokens=tokens,
            reset_after=reset_after,
            implementation=implementation,
        )

    def run(case: Case) -> Result:
        return jax_result(case, part(case.parameters, "gru."), layer)

    return Implementation(f"jax {implementation}", run, dtypes=EVERY)


def linen_gru_cell() -> Implementation:
    """flax.linen.GRUCell, one flax.linen.RNN for each layer and direction."""

    def rnn(cell: dict[str, Array], reverse: bool, x: Array, h0: Array, lengths: Array) -> tuple:
        module = linen.RNN(
            linen.GRUCell(h0.shape[-1]),
            time_major=True,
            return_carry=True,
            reverse=reverse,
            keep_order=True,
        )
        params = {"params": {"cell": traverse_util.unflatten_dict(cell, sep="/")}}
        return module.apply(params, x, initial_carry=h0, seq_lengths=lengths)

    return Implementation(
        "flax.linen.GRUCell", _flax("linen", rnn), supports=lambda case: case.reset_after
    )


def nnx_gru_cell() -> Implementation:
    """flax.nnx.GRUCell, one flax.nnx.RNN for each layer and direction.

    It has no hidden bias for n, so that has to be zero.
    """

    def rnn(cell: dict[str, Array], reverse: bool, x: Array, h0: Array, lengths: Array) -> tuple:
        module = nnx.GRUCell(x.shape[-1], h0.shape[-1], rngs=nnx.Rngs(0))
        nnx.update(module, traverse_util.unflatten_dict(cell, sep="/"))
        scan = nnx.RNN(module, time_major=True, return_carry=True, reverse=reverse, keep_order=True)
        return scan(x, initial_carry=h0, seq_lengths=lengths)

    def supports(case: Case) -> bool:
        hidden = [np.split(p, 3)[2] for n, p in case.parameters.items() if n.endswith("bias_hh")]
        return case.reset_after and not np.any(hidden)

    return Implementation("flax.nnx.GRUCell", _flax("nnx", rnn), supports, lacks=("bias_hh",))


def _flax(format: str, rnn: Callable[..., tuple[Array, Array]]) -> Callable[[Case], Result]:
    """A GRU of rnn(one cell's weights, reverse, x, h0, lengths) -> (last state, outputs).

    Flax's RNN wants a step and a word in each row: see `torch_nn_gru`.
    """

    def layer(
        leaves: dict[str, Array],
        x: Array,
        lengths: Array,
        h0: Array,
        tokens: Array | None,
        reset_after: bool,
    ) -> tuple[Array, Array]:
        layers, directions = structure(name.replace("/", ".") for name in leaves)
        x = x if tokens is None else x[tokens]
        steps = len(x)
        x = x if steps else jnp.zeros((1, *x.shape[1:]), x.dtype)
        words = jnp.arange(len(x))[:, None, None] < lengths[:, None]
        h_last: list[Array] = []
        for number in range(layers):
            outputs = []
            for direction in directions:
                cell = part(leaves, f"gru/{number}/{direction}/")
                cell = {name.split("/", 3)[3]: value for name, value in cell.items()}
                first, reverse = h0[len(h_last)], direction == "backward"
                last, after = rnn(cell, reverse, x, first, jnp.maximum(lengths, 1))
                h_last.append(jnp.where(lengths[:, None] > 0, last, first))
                outputs.append(jnp.where(words, after, 0))
            x = jnp.concatenate(outputs, axis=-1)
        return x[:steps], jnp.stack(h_last)

    def run(case: Case) -> Result:
        converted = to_format(format, case.parameters, reset_after=True)
        weights = part(converted, "gru/")
        h0 = np.zeros_like(case.d_h_last) if case.h0 is None else case.h0
        result = jax_result(replace(case, h0=h0), weights, layer)
        if case.h0 is None:
            del result["d h0"]
        gradients = {name: result.pop(f"d {name}") for name in weights}
        gradients = from_format(format, gradients, reset_after=True)
        for name, value in gradients.items():
            if name.endswith("bias_hh"):  # a bias that is the sum of two has the gradient of both
                z_and_r = 2 * len(value) // 3
                value[:z_and_r] = gradients[name.replace("bias_hh", "bias_ih")][:z_and_r]
        return result | {f"d {name}": value for name, value in gradients.items()}

    return run
