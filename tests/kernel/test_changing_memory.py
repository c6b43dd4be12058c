"""Arrays that change during a call or right after it, by another thread or by a data loader that
reuses a buffer. tools/fuzz_gru.py does the same under AddressSanitizer."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from common.params import init_gru
from jax_impl.classifier import classify
from jax_impl.gru import gru as jax_gru
from jax_impl.modules import GRU as JaxGRU
from torch_impl.gru import gru as torch_gru

T, B, D, H, K = 20, 8, 16, 32, 50


def arguments() -> dict[str, np.ndarray]:
    """The arguments of `gru`, as NumPy arrays."""
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((K, D)).astype(np.float32),
        "lengths": rng.integers(1, T + 1, B).astype(np.int32),
        "h0": rng.standard_normal((1, B, H)).astype(np.float32),
        "tokens": rng.integers(0, K, (T, B)).astype(np.int32),
        "resets": rng.random((T, B)) < 0.1,
        "h_reset": rng.standard_normal((1, B, H)).astype(np.float32),
    }


@pytest.mark.parametrize("implementation", ["fused", "scan"])
def test_jax_has_read_numpy_arrays_when_an_eager_call_returns(implementation: str) -> None:
    parameters = {name: p.astype(np.float32) for name, p in init_gru(D, H, 1, False, 0).items()}

    def function(lengths, **others):
        x, h0 = others.pop("x"), others.pop("h0")
        return jax_gru(parameters, x, lengths, h0, implementation=implementation, **others)

    hold_to_first_numbers(function, arguments())


def test_the_jax_module_has_read_numpy_arrays_when_an_eager_call_returns() -> None:
    module = JaxGRU(D, H, rngs=nnx.Rngs(0))
    inputs = arguments()
    x = np.ascontiguousarray(inputs["x"][inputs.pop("tokens")].swapaxes(0, 1))
    inputs |= {"x": x, "resets": np.ascontiguousarray(inputs["resets"].T)}

    def function(x, lengths, h0, **others):
        return module(x, lengths, h0, **others)

    hold_to_first_numbers(function, inputs)


def test_the_jax_classifier_has_read_numpy_arrays_when_an_eager_call_returns() -> None:
    rng = np.random.default_rng(0)
    head = {"head.weight": rng.standard_normal((2, H)), "head.bias": rng.standard_normal(2)}
    drawn = init_gru(D, H, 1, False, 0) | head
    parameters = {name: value.astype(np.float32) for name, value in drawn.items()}
    inputs = arguments()
    inputs = {
        "h0": rng.standard_normal((K, D)).astype(np.float32),  # the vectors
        "distinct": np.arange(K, dtype=np.int32),
        "tokens": inputs["tokens"],
        "lengths": inputs["lengths"],
        "mask": rng.integers(0, 2, (K, D)).astype(np.float32),
    }

    def function(h0, distinct, tokens, lengths, mask):
        masks = {"elements": mask}
        return (classify(parameters, h0, distinct, tokens, lengths, masks),)

    hold_to_first_numbers(function, inputs)


def hold_to_first_numbers(function, given: dict[str, np.ndarray]) -> None:
    """Assert that the results of a call do not depend on changes of its arrays after the call.

    Another argument is still being computed when the arrays change, so the computation itself
    cannot have read them before.
    """
    wanted = [np.array(each) for each in function(**given)]
    for name, array in given.items():
        passed = given | {name: aligned(array)}
        late = "h0" if name != "h0" else "x"
        if late not in given:
            continue
        passed[late] = slowly(given[late], jnp.ones((1500, 1500)))
        results = function(**passed)
        passed[name][...] = ~array if array.dtype == bool else 1
        for result, expected in zip(results, wanted, strict=True):
            np.testing.assert_array_equal(result, expected, err_msg=name)


@jax.jit
def slowly(array: jax.Array, factor: jax.Array) -> jax.Array:
    """The array; its computation takes some tenths of a second."""
    return array + 0 * (factor @ factor @ factor @ factor)[0, 0]


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy whose alignment lets JAX read it in place."""
    whole = np.empty(array.nbytes + 64, np.uint8)
    start = -whole.ctypes.data % 64
    copy = whole[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


CHANGING = {
    "torch": """
import threading, sys
import torch
from torch_impl.gru import gru
sys.setswitchinterval(1e-5)
tokens = torch.randint(K, (T, B), dtype=torch.int32)
own, ended = tokens.clone(), threading.Event()
def change():
    while not ended.is_set():
        tokens.fill_(2**30)
        tokens.copy_(own)
thread = threading.Thread(target=change)
thread.start()
P = {name: torch.tensor(value) for name, value in parameters.items()}
x, lengths = torch.tensor(x), torch.full((B,), T, dtype=torch.int32)
for i in range(300):
    try:
        with torch.set_grad_enabled(i % 3 == 0):
            outputs, _ = gru(P, x.requires_grad_(i % 3 == 0), lengths, tokens=tokens)
        if i % 3 == 0:
            outputs.sum().backward()
        assert outputs.isfinite().all()
    except (ValueError, RuntimeError):  # RuntimeError: what a gradient needs has been changed
        pass
ended.set()
thread.join()
""",
    "jax": """
import jax
from jax_impl.gru import gru
def loss(x, lengths, tokens):
    return gru(parameters, x, lengths, tokens=tokens, implementation="fused")[0].sum()
own = np.random.default_rng(0).integers(0, K, (T, B)).astype(np.int32)
lengths = np.full(B, T, np.int32)
for function in (jax.jit(loss), jax.jit(jax.value_and_grad(loss))):
    jax.block_until_ready(function(x, lengths, own))
    for _ in range(100):
        whole = np.empty(own.nbytes + 64, np.uint8)
        tokens = whole[-whole.ctypes.data % 64 :][: own.nbytes].view(np.int32).reshape(own.shape)
        tokens[...] = own
        result = function(x, lengths, tokens)
        tokens[...] = 2**30
        tokens[...] = own
        tokens[...] = 2**30
        jax.block_until_ready(result)
""",
}


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.long)])
def test_changing_tokens_do_not_crash_the_process(framework: str) -> None:
    """The result may be that of any rows, NaN or an error, but no memory outside x is read."""
    start = (
        f"T, B, D, H, K = {(200, 64, D, 64, K)}\n"
        "import numpy as np\nfrom common.params import init_gru\n"
        "drawn = init_gru(D, H, 1, False, 0)\n"
        "parameters = {name: value.astype(np.float32) for name, value in drawn.items()}\n"
        "x = np.ones((K, D), np.float32)\n"
    )
    subprocess.run([sys.executable, "-c", start + CHANGING[framework]], check=True)


@pytest.mark.parametrize("implementation", ["fused", "scan"])
def test_backward_in_torch_has_the_lengths_of_forward(implementation: str) -> None:
    """The forward pass has saved no values of the steps beyond the lengths."""
    parameters = {name: torch.tensor(p).float() for name, p in init_gru(D, H, 1, False, 0).items()}
    x = torch.randn(T, B, D, requires_grad=True)

    def gradient(lengths: np.ndarray, later: int) -> torch.Tensor:
        passed = torch.from_numpy(lengths)
        outputs, _ = torch_gru(parameters, x, passed, implementation=implementation)
        lengths[:] = later
        return torch.autograd.grad(outputs.sum(), x)[0]

    expected = gradient(np.full(B, 2, np.int32), 2)
    for later in (3, T, 2**30):
        assert torch.equal(gradient(np.full(B, 2, np.int32), later), expected)
