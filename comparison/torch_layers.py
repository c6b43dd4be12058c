"""Every GRU in PyTorch, ours and nn.GRU, for the parity checks and for speed alike.

A layer is a function like our `gru`: (weights, x, lengths, h0, tokens=, reset_after=,
return_sequences=) -> (outputs, h_last). The weights have the names of its layout.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import torch_impl.classifier
import torch_impl.gru
import torch_impl.layers
from comparison.implementations import BFLOAT16, EVERY, Case, Implementation, Result, in_layout

Layer = Callable[..., tuple[Any, Tensor]]
CELLS = torch_impl.classifier.CELLS
OURS = CELLS["gru"].implementations()


def nn_gru(
    weights: Mapping[str, Tensor],
    x: Tensor,
    lengths: Tensor,
    h0: Tensor,
    *,
    tokens: Tensor | None,
    return_sequences: bool = True,
    packed: bool = True,
    **_: Any,
) -> tuple[Any, Tensor]:
    """torch.nn.GRU, which resets after; without packed, it reads the padding, too.

    Packing wants a step and a word in each row. A row without words is given one, and its results
    are replaced by what they have to be.
    """
    own = {
        name.removeprefix("gru."): value for name, value in weights.items() if name[:4] == "gru."
    }
    module = _module(x.shape[-1], own["weight_hh_l0"].shape[1], tuple(own), x.dtype)
    x = x if tokens is None else x[tokens]
    if not packed:
        return torch.func.functional_call(module, own, (x, h0))
    steps = len(x)
    x = x if steps else x.new_zeros(1, *x.shape[1:])
    sequence = pack_padded_sequence(
        x, lengths.clamp(min=1), enforce_sorted=bool((lengths.diff() <= 0).all())
    )
    found: tuple[PackedSequence, Tensor] = torch.func.functional_call(module, own, (sequence, h0))
    words = lengths[:, None] > 0
    h_last = torch.where(words, found[1], h0)
    if not return_sequences:
        return None, h_last
    outputs = pad_packed_sequence(found[0], total_length=len(x))[0]
    return torch.where(words, outputs, 0)[:steps], h_last


@cache
def _module(D: int, H: int, names: tuple[str, ...], dtype: torch.dtype) -> nn.GRU:
    directions = 1 + any(name.endswith("_reverse") for name in names)
    return nn.GRU(D, H, len(names) // 4 // directions, bidirectional=directions == 2, dtype=dtype)


# The parity checks.


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: a second one makes small arrays slower, on a busy machine much so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def compute(case: Case, weights: dict[str, np.ndarray], layer: Layer) -> Result:
    """Results and gradients of a layer and the classifier's head on top of it."""
    leaves = {"x": case.x, **weights, **case.head, **({} if case.h0 is None else {"h0": case.h0})}
    tensors = {name: to_torch(value).requires_grad_() for name, value in leaves.items()}
    outputs, h_last = layer(
        tensors,
        tensors["x"],
        torch.tensor(case.lengths),
        tensors.get("h0"),
        tokens=None if case.tokens is None else torch.tensor(case.tokens),
        reset_after=case.reset_after,
    )
    logits = torch_impl.classifier.head(tensors, h_last[-case.directions :])
    loss = torch_impl.classifier.cross_entropy(logits, torch.tensor(case.labels, dtype=torch.int64))
    objective = loss + (outputs * to_torch(case.d_outputs)).sum()
    objective = objective + (h_last * to_torch(case.d_h_last)).sum()
    # Without a single step, x and the weights have no part in the result.
    gradients = torch.autograd.grad(objective, list(tensors.values()), materialize_grads=True)

    results = {"outputs": outputs, "h_last": h_last, "logits": logits, "loss": loss}
    results |= {f"d {name}": g for name, g in zip(tensors, gradients, strict=True)}
    return {name: from_torch(value) for name, value in results.items()}


def torch_cell(cell: str, implementation: str) -> Implementation:
    """torch_impl's cell of this name, in one of its implementations."""
    layer = partial(torch_impl.layers.run, CELLS[cell], implementation=implementation)
    name = f"torch {implementation if cell == 'gru' else cell}"
    return Implementation(
        name, lambda case: compute(case, case.weights, layer), dtypes=EVERY, cell=cell
    )


def torch_gru(implementation: str) -> Implementation:
    """torch_impl's GRU."""
    return torch_cell("gru", implementation)


def torch_autocast() -> Implementation:
    """torch_impl's GRU of float32 arguments, which torch.autocast rounds."""

    def layer(*arguments: Any, **how: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            outputs, h_last = torch_impl.gru.gru(*arguments, **how)
        return outputs.float(), h_last.float()

    def run(case: Case) -> Result:
        case = case.astype(np.float32)
        result = compute(case, case.weights, layer)
        return {name: value.astype(BFLOAT16) for name, value in result.items()}

    return Implementation("torch autocast", run, dtypes=("bfloat16",))


def torch_nn_gru() -> Implementation:
    """torch.nn.GRU on packed sequences."""
    run = in_layout("torch", partial(compute, layer=nn_gru))
    return Implementation("torch nn.GRU", run, supports=lambda case: case.reset_after)


# Speed.


def timed(
    layer: Layer, weights: Any, backward: bool, x: Any, rows: Any, lengths: Any, *others: Any
) -> Callable[[], object]:
    """One forward, or forward and backward, of a layer on x[rows].

    rows may be None, for x itself. others: h0 and tokens.
    """
    tensors = {name: torch.tensor(weight).requires_grad_() for name, weight in weights.items()}
    x, rows, lengths, h0, tokens = (
        None if array is None else torch.from_numpy(array) for array in (x, rows, lengths, *others)
    )

    def run() -> None:
        with torch.set_grad_enabled(backward):
            read = x if rows is None else x[rows]
            h_last = layer(tensors, read, lengths, h0, tokens=tokens, return_sequences=False)[1]
        if backward:
            torch.autograd.grad(h_last.sum(), list(tensors.values()))

    return run
