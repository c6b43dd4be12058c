"""Every GRU in PyTorch: torch_impl's and nn.GRU."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import torch_impl
import torch_impl.classifier
import torch_impl.gru
import torch_impl.layers
from common.cells import LayerCall
from comparison.contenders import Contenders, training_of
from comparison.implementations import (
    BFLOAT16,
    EVERY,
    Case,
    Implementation,
    Inference,
    Layer,
    Missing,
    Result,
    converted,
    objective,
    part,
    peer,
)
from torch_impl.learner import Learner

CELLS = torch_impl.classifier.CELLS
OURS = CELLS["gru"].implementations()
_devices = ["cpu"]  # the last one is where arrays are put


def place(device: str) -> None:
    """From here on, what is computed here is computed on this device."""
    _devices[:] = [device]


@contextmanager
def on(device: str) -> Iterator[None]:
    """Within, what is computed here is computed on this device."""
    _devices.append(device)
    try:
        yield
    finally:
        _devices.pop()


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
    own = {name.removeprefix("gru."): value for name, value in part(weights, "gru.").items()}
    module = _module(x.shape[-1], own["weight_hh_l0"].shape[1], tuple(own), x.dtype)
    x = x if tokens is None else x[tokens]
    if not packed:
        return torch.func.functional_call(module, own, (x, h0))
    steps = len(x)
    x = x if steps else x.new_zeros(1, *x.shape[1:])
    in_order = bool((lengths.diff() <= 0).all())
    sequence = pack_padded_sequence(x, lengths.clamp(min=1), enforce_sorted=in_order)
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


def set_up(device: str) -> None:
    """From here on, PyTorch computes on this device, and takes denormal numbers for 0, as XLA does.

    On Intel's processors nn.GRU is seven times as fast so.
    """
    place(device)
    torch.set_flush_denormal(True)


def contenders(variant: str, device: str) -> Contenders:
    """Everything in PyTorch; of the variant "default", nn.GRU with PyTorch's own settings."""
    builtin: dict[str, tuple[Layer, str]] = {
        "nn.GRU padded": (partial(nn_gru, packed=False), "torch"),
        "nn.GRU packed": (nn_gru, "torch"),
    }
    if variant == "default":
        layers = {f"{name}, denormals": layer for name, layer in builtin.items()}
        return Contenders(training_of(Learner, layers, timed), {})
    set_up(device)
    ours = {
        f"torch {name}": (partial(torch_impl.gru.gru, implementation=name), "canonical")
        for name in CELLS["gru"].implementations(device)
    }
    return Contenders(training_of(Learner, ours | builtin, timed), INFERENCE, torch.inference_mode)


def timed(
    layer: Layer, weights: Any, backward: bool, x: Any, rows: Any, lengths: Any, *others: Any
) -> Callable[[], object]:
    """One forward, or forward and backward, of a layer on x[rows].

    rows may be None, for x itself. others: h0 and tokens.
    """
    tensors = {name: to_torch(weight).requires_grad_() for name, weight in weights.items()}
    x, rows, lengths, h0, tokens = (
        None if array is None else to_torch(array) for array in (x, rows, lengths, *others)
    )

    def run() -> object:
        with torch.set_grad_enabled(backward):
            read = x if rows is None else x[rows]
            h_last = layer(tensors, read, lengths, h0, tokens=tokens, return_sequences=False)[1]
        wanted = list(tensors.values()) if backward else []
        result = torch.autograd.grad(h_last.sum(), wanted) if backward else h_last
        if h_last.is_cuda:
            torch.cuda.synchronize()
        return result

    return run


# Inference: called as they are, in torch.inference_mode.


def own_function(weights: Mapping[str, np.ndarray], x: np.ndarray) -> Callable[[], object]:
    """torch_impl.gru, jax_impl.gru's twin: outputs, which nobody wants, are not computed."""
    parameters = {name: torch.from_numpy(value) for name, value in weights.items()}
    read, lengths = torch.from_numpy(x), torch.full(x.shape[1:2], x.shape[0], dtype=torch.int32)
    how: dict[str, Any] = {"reset_after": True, "return_sequences": False}
    return lambda: torch_impl.gru.gru(parameters, read, lengths, **how)[1]


def nn_module(
    weights: Mapping[str, np.ndarray], x: np.ndarray, *, compiled: bool = False
) -> Callable[[], object]:
    """torch.nn.GRU. Raises Missing where torch.compile cannot compile it."""
    own = {n.removeprefix("gru."): torch.tensor(v) for n, v in converted("torch", weights).items()}
    module = nn.GRU(x.shape[-1], own["weight_hh_l0"].shape[1])
    module.load_state_dict(own)
    if not compiled:
        return called(module, x)
    run = called(torch.compile(module), x)
    try:
        run()
    except RuntimeError as error:  # torch.compile's exceptions are
        raise Missing(str(error).strip().partition("\n")[0]) from None
    return run


def called(module: Any, x: np.ndarray) -> Callable[[], object]:
    """A call of a module on x [T, B, D]: its last state."""
    module.eval()
    read = torch.from_numpy(x)
    return lambda: module(read)[1]


own = partial(torch_impl.GRU.from_canonical, reset_after=True)
INFERENCE: dict[str, Inference] = {
    "torch_impl.gru": own_function,
    "torch_impl.GRU": lambda weights, x: called(own(weights), x),
    "nn.GRU": nn_module,
    "nn.GRU compiled": partial(nn_module, compiled=True),
}


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
        return torch.tensor(array.astype(np.float32), device=_devices[-1]).bfloat16()
    return torch.tensor(array, device=_devices[-1])


def from_torch(tensor: Tensor) -> np.ndarray:
    """The way back."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.float().numpy().astype(BFLOAT16)
    return tensor.numpy()


def compute(case: Case, layer: Layer) -> Result:
    """Results and gradients of a layer and the classifier's head on top of it."""
    leaves = {name: to_torch(value).requires_grad_() for name, value in case.leaves.items()}
    others = [None if array is None else to_torch(array) for array in case.others]
    value, results = objective(leaves, others, layer, case.reset_after, torch_impl.classifier)
    # Without a single step, x and the weights have no part in the result.
    gradients = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    results |= {f"d {name}": each for name, each in zip(leaves, gradients, strict=True)}
    return {name: from_torch(value) for name, value in results.items()}


def torch_cell(implementation: str, cell: str = "gru") -> Implementation:
    """torch_impl's cell of this name, in one of its implementations."""

    def layer(parameters: Any, x: Any, lengths: Any, h0: Any, **others: Any) -> Any:
        call = LayerCall(x, lengths=lengths, h0=h0, **others)
        return torch_impl.layers.run(CELLS[cell], parameters, call, implementation=implementation)

    words = [each for each in (cell, implementation) if each not in ("gru", "auto")]
    name = f"torch {' '.join(words) or 'auto'}"
    return Implementation(name, partial(compute, layer=layer), dtypes=EVERY, cell=cell, resets=True)


def torch_autocast() -> Implementation:
    """torch_impl's GRU of float32 arguments, which torch.autocast rounds."""

    def layer(*arguments: Any, **how: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            outputs, h_last = torch_impl.gru.gru(*arguments, **how)
        return outputs.float(), h_last.float()

    def run(case: Case) -> Result:
        result = compute(case.astype(np.float32), layer)
        return {name: value.astype(BFLOAT16) for name, value in result.items()}

    return Implementation("torch autocast", run, dtypes=("bfloat16",))


NN_GRU = peer("torch nn.GRU", "torch", partial(compute, layer=nn_gru))  # on packed sequences


def implementations() -> list[Implementation]:
    """torch_impl's GRU in each of its implementations, its other cells, and nn.GRU."""
    cells = [
        torch_cell(implementation, name)
        for name, cell in CELLS.items()
        for implementation in dict.fromkeys(("auto", cell.traceable))
        if name != "gru" and (implementation, cell.resolve("auto")) != (cell.traceable,) * 2
    ]
    return [*map(torch_cell, OURS), *cells, torch_autocast(), NN_GRU]
