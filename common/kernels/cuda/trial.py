"""Whether the kernel computes what it should on this device: asked before it is trusted."""

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from common import oracle
from common.cells import LayerCall
from common.kernels.cuda import ROWS, Arch, instance
from common.params import DIRECTIONS, GRU_PARAMETERS

# How far a small case may be from the oracle, relative to the largest value: some ten times as far
# as rounding takes it, and far less than any fault.
BOUNDS = {"Bf16": 5e-2, "Tf32": 5e-3, "Float32": 1e-5}


class Twin(NamedTuple):
    """A framework: forward and backward as its fused.py has them, and what makes NumPy's arrays its
    own, on the device."""

    forward: Callable[..., Sequence[Any]]
    backward: Callable[..., Sequence[Any]]
    array: Callable[[np.ndarray], Any]


# What is wrong with a device's kernels, if anything is.
_tried: dict[tuple[int, str, Arch], str | None] = {}
_trying = threading.Lock()


def trusted(hidden: int, factors: str, arch: Arch, twin: Twin) -> bool:
    """Whether there are kernels for so many units that have computed a small case rightly here.

    The first time, this compiles; what fails is said in a warning.
    """
    kernel = instance(hidden, factors, False, False, arch)
    if kernel is None:
        return False
    key = (kernel.size, factors, arch)
    with _trying:
        if key not in _tried:
            found: list[str | None] = []
            given = (kernel.size, factors, twin)
            # In a thread of its own: whatever transforms, traces or fakes the arrays of the call
            # that asks, is the calling thread's.
            thread = threading.Thread(target=lambda: found.append(_try(*given)))
            thread.start()
            thread.join()
            _tried[key] = reason = found[0]
            if reason:
                warnings.warn(
                    f"the GRU kernel for GPUs ({factors}, {kernel.size} units) {reason}; scan "
                    "takes over, which is slow",
                    stacklevel=2,
                )
    return _tried[key] is None


def _try(size: int, factors: str, twin: Twin) -> str | None:
    """What is wrong, if anything is."""
    try:
        for reset_after in (False, True):
            off = error_of(size, factors, reset_after, twin)
            if not off <= BOUNDS[factors]:
                return f"is off by {off:.1e} on this device"
    except Exception as error:  # whatever it is, there is scan
        return f"is not to be had: {str(error).strip().partition(chr(10))[0]}"
    return None


def error_of(size: int, factors: str, reset_after: bool, twin: Twin) -> float:
    """How far results and gradients of a small case, in both directions, are from the oracle,
    relative to each array's largest value, or to 1 where that is less."""
    T, B, D, K = 4, ROWS + 1, 4, 9
    rng = np.random.default_rng(size)

    def draw(*shape: int) -> np.ndarray:
        return rng.uniform(-1, 1, shape).astype(np.float32)

    x, tokens, resets = draw(K, D), rng.integers(0, K, (T, B), np.int32), rng.random((T, B)) < 0.5
    lengths = np.array([T, 0, 1, *rng.integers(0, T + 1, B - 3)], np.int32)
    h0, h_reset, d_h_last = (draw(2, B, size) for _ in range(3))
    d_outputs = draw(T, B, 2 * size)
    shapes = {"weight_ih": (3 * size, D), "weight_hh": (3 * size, size)}
    weights = {
        name: [draw(*shapes.get(name, (3 * size,))) / np.float32(size**0.5) for _ in range(2)]
        for name in GRU_PARAMETERS
    }
    array = twin.array
    own = [[array(both[i]) for both in weights.values()] for i in range(2)]
    of_x, of_tokens, of_lengths, of_resets = map(array, (x, tokens, lengths, resets))
    states = (array(h0), of_resets, array(h_reset))
    how = (reset_after, True, factors == "Bf16")
    call = LayerCall(of_x, of_tokens, own, of_lengths, *states, *how)
    outputs, h_last, saved = twin.forward(call, True)
    found = twin.backward(call, array(d_outputs), array(d_h_last), saved, True)
    names = [f"gru.0.{side}.{name}" for side in DIRECTIONS for name in GRU_PARAMETERS]
    in_order = (both[i] for i in range(2) for both in weights.values())
    parameters = dict(zip(names, in_order, strict=True))
    run = oracle.forward(
        parameters, x[tokens], lengths, h0, resets, h_reset, reset_after=reset_after
    )
    gradients = oracle.backward(run, d_outputs, d_h_last)
    d_x = np.zeros((K, D))
    np.add.at(d_x, tokens, gradients["x"])
    exact = [run.outputs, run.h_last, d_x, *(gradients[name] for name in names)]
    exact += [gradients["h0"], gradients["h_reset"]]
    got = [np.asarray(to_numpy(each), np.float64) for each in (outputs, h_last, *found)]
    return max(
        float(np.nan_to_num(np.abs(ours - theirs), nan=np.inf).max() / max(np.abs(theirs).max(), 1))
        for ours, theirs in zip(got, exact, strict=True)
    )


def to_numpy(array: Any) -> np.ndarray:
    """A framework's array, from the device."""
    return np.asarray(array.cpu() if hasattr(array, "cpu") else array)
