"""The GRUs in PyTorch: torch_impl's and nn.GRU."""

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
from comparison.contenders import BFLOAT16_TOLERANCE, Contenders, in_bfloat16, training_of
from comparison.implementations import (
    BFLOAT16,
    Case,
    Implementation,
    Inference,
    Layer,
    Missing,
    Result,
    below,
    converted,
    objective,
    peer,
    twin_cell,
    twin_cells,
)
from torch_impl.learner import Learner

CELLS = torch_impl.classifier.CELLS
OURS = CELLS["gru"].implementations()
_devices = ["cpu"]  # arrays are placed on the last one


def place(device: str) -> None:
    """Set the device of all computations in this file."""
    _devices[:] = [device]


@contextmanager
def on(device: str) -> Iterator[None]:
    """Set the device within the block."""
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
    """torch.nn.GRU, with the reset after the product; unless packed, it also reads the padding.

    A packed sequence needs at least one time step and one word per row. Therefore empty rows are
    padded to one word, and their results are replaced by zeros and the first states.
    """
    gru_weights = below(weights, "gru.")
    module = _module(x.shape[-1], gru_weights["weight_hh_l0"].shape[1], tuple(gru_weights), x.dtype)
    x = x if tokens is None else x[tokens]
    if not packed:
        return torch.func.functional_call(module, gru_weights, (x, h0))
    steps = len(x)
    x = x if steps else x.new_zeros(1, *x.shape[1:])
    in_order = bool((lengths.diff() <= 0).all())
    sequence = pack_padded_sequence(x, lengths.clamp(min=1), enforce_sorted=in_order)
    outputs: PackedSequence
    outputs, h_last = torch.func.functional_call(module, gru_weights, (sequence, h0))
    has_words = lengths[:, None] > 0
    h_last = torch.where(has_words, h_last, h0)
    if not return_sequences:
        return None, h_last
    padded = pad_packed_sequence(outputs, total_length=len(x))[0]
    return torch.where(has_words, padded, 0)[:steps], h_last


@cache
def _module(D: int, H: int, names: tuple[str, ...], dtype: torch.dtype) -> nn.GRU:
    directions = 1 + any(name.endswith("_reverse") for name in names)
    return nn.GRU(D, H, len(names) // 4 // directions, bidirectional=directions == 2, dtype=dtype)


def set_up(device: str) -> None:
    """Set PyTorch's device, and flush denormal numbers to zero, as XLA does.

    Flushing makes nn.GRU seven times as fast on Intel processors.
    """
    place(device)
    torch.set_flush_denormal(True)


def contenders(variant: str, device: str) -> Contenders:
    """All contenders in PyTorch or, for the variant "default", nn.GRU with PyTorch's defaults."""
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
    tolerances = {"torch_impl.gru bfloat16": BFLOAT16_TOLERANCE}
    training = training_of(Learner, ours | builtin, timed)
    return Contenders(training, INFERENCE, torch.inference_mode, tolerances)


def timed(
    layer: Layer, weights: Any, backward: bool, x: Any, rows: Any, lengths: Any, *others: Any
) -> Callable[[], object]:
    """A forward pass, or forward and backward, of a layer on x[rows] or, if rows is None, on x.

    others: h0 and tokens.
    """
    tensors = {name: to_torch(weight).requires_grad_() for name, weight in weights.items()}
    x, rows, lengths, h0, tokens = (
        None if array is None else to_torch(array) for array in (x, rows, lengths, *others)
    )

    def run() -> object:
        with torch.set_grad_enabled(backward):
            inputs = x if rows is None else x[rows]
            h_last = layer(tensors, inputs, lengths, h0, tokens=tokens, return_sequences=False)[1]
        result: Any = h_last
        if backward:
            result = torch.autograd.grad(h_last.sum(), [*tensors.values()])
        if h_last.is_cuda:
            torch.cuda.synchronize()
        return result

    return run


# Inference, in torch.inference_mode.


def own_function(
    weights: Mapping[str, np.ndarray], x: np.ndarray, *, bfloat16: bool = False
) -> Callable[[], object]:
    """torch_impl.gru, without the outputs."""
    parameters = {name: torch.from_numpy(value) for name, value in weights.items()}
    arguments = torch.from_numpy(x), torch.full(x.shape[1:2], x.shape[0], dtype=torch.int32)
    options: dict[str, Any] = {"reset_after": True, "return_sequences": False}
    options |= {"bfloat16": bfloat16}
    return lambda: torch_impl.gru.gru(parameters, *arguments, **options)[1]


def nn_module(
    weights: Mapping[str, np.ndarray], x: np.ndarray, *, compiled: bool = False
) -> Callable[[], object]:
    """torch.nn.GRU. Raises Missing if torch.compile cannot compile it."""
    gru_weights = below(converted("torch", weights), "gru.")
    module = nn.GRU(x.shape[-1], gru_weights["weight_hh_l0"].shape[1])
    module.load_state_dict({n: torch.tensor(v) for n, v in gru_weights.items()})
    if not compiled:
        return called(module, x)
    run = called(torch.compile(module), x)
    try:
        run()
    except RuntimeError as error:  # the base class of torch.compile's exceptions
        raise Missing(str(error).strip().partition("\n")[0]) from None
    return run


def called(module: Any, x: np.ndarray) -> Callable[[], object]:
    """A call of a module on x [T, B, D], for its last state."""
    module.eval()
    inputs = torch.from_numpy(x)
    return lambda: module(inputs)[1]


own_module = partial(torch_impl.GRU.from_canonical, reset_after=True)
INFERENCE: dict[str, Inference] = {
    "torch_impl.gru": own_function,
    "torch_impl.gru bfloat16": in_bfloat16(partial(own_function, bfloat16=True)),
    "torch_impl.GRU": lambda weights, x: called(own_module(weights), x),
    "nn.GRU": nn_module,
    "nn.GRU compiled": partial(nn_module, compiled=True),
}


# The parity checks.


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit PyTorch to one thread; more threads slow down small arrays."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def to_torch(array: np.ndarray) -> Tensor:
    """Convert an array to a tensor; PyTorch itself cannot convert NumPy's bfloat16."""
    if array.dtype == BFLOAT16:
        return torch.tensor(array.astype(np.float32), device=_devices[-1]).bfloat16()
    return torch.tensor(array, device=_devices[-1])


def from_torch(tensor: Tensor) -> np.ndarray:
    """Convert a tensor to an array."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.float().numpy().astype(BFLOAT16)
    return tensor.numpy()


def compute(case: Case, layer: Layer) -> Result:
    """Results and gradients of a layer and the classifier's head on top of it."""
    leaves = {name: to_torch(value).requires_grad_() for name, value in case.leaves.items()}
    others = [None if array is None else to_torch(array) for array in case.others]
    value, results = objective(leaves, others, layer, case.reset_after, torch_impl.classifier)
    # Without a time step, the value does not depend on x and the weights.
    gradients = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    results |= {f"d {name}": each for name, each in zip(leaves, gradients, strict=True)}
    return {name: from_torch(value) for name, value in results.items()}


torch_cell = partial(twin_cell, torch_impl, compute)


def torch_autocast() -> Implementation:
    """torch_impl's GRU with float32 arguments, which torch.autocast rounds."""

    def layer(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            outputs, h_last = torch_impl.gru.gru(*arguments, **options)
        return outputs.float(), h_last.float()

    def run(case: Case) -> Result:
        result = compute(case.astype(np.float32), layer)
        return {name: value.astype(BFLOAT16) for name, value in result.items()}

    return Implementation("torch autocast", run, dtypes=("bfloat16",))


NN_GRU = peer("torch nn.GRU", "torch", partial(compute, layer=nn_gru))  # on packed sequences


def implementations() -> list[Implementation]:
    """torch_impl's GRU in each of its implementations, its other cells, and nn.GRU."""
    return [*twin_cells(CELLS, torch_cell), torch_autocast(), NN_GRU]
