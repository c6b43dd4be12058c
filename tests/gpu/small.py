"""The kernel on an emulated GPU, in small cases: against the oracle, and in use.

What test_gpu.py and planted_faults.py run, not collected with the other tests: `start` has to come
before torch_impl and jax_impl. Tests of files named after this one run on the emulated GPU, too.
With SANITIZER in the environment, GCC's sanitizers look at the kernel meanwhile.
"""

import os
import re
import subprocess
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import jax
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import jax_impl.cuda
import jax_impl.learner
import torch_impl.cuda
import torch_impl.learner
from common.cells import Cell
from common.data.batches import Batch
from common.kernels import cuda
from common.kernels.cuda import trial
from common.params import init_gru
from common.training.options import TrainConfig
from comparison import parity
from comparison.parity import Size
from jax_impl.gru import CELL as JAX_CELL
from jax_impl.gru import gru as jax_gru
from tools.gpu import rehearsal
from torch_impl.gru import CELL
from torch_impl.gru import gru as torch_gru

cuda.CONFIGURATIONS = {  # such as are built and run sooner than the real ones
    ("Bf16", 32): (1, 2, 1),
    ("Bf16", 128): (4, 2, 4),
    ("Tf32", 32): (1, 2, 2),
    ("Tf32", 64): (4, 1, 4),
    ("Float32", 16): (1, 1, 1),
    ("Float32", 32): (2, 1, 2),
}
SANITIZER = os.environ.get("SANITIZER", "")
if not SANITIZER:  # under which it takes long
    cuda.CONFIGURATIONS["Bf16", 256] = (16, 1, 1)
driver = rehearsal.start(SANITIZER)
for function in (torch_impl.cuda.exists, torch_impl.cuda.passes):  # as in PyTorch built for CUDA
    torch.compiler.assume_constant_result(function)
torch.backends.cudnn.allow_tf32 = False
jax.config.update("jax_default_matmul_precision", "highest")
torch.set_deterministic_debug_mode("error")  # fills with NaN what is not written yet
of_kinds = partial(pytest.mark.parametrize, ("factors", "size", "reset_after"))
KINDS = [
    (factors, size - 1, after) for factors, size in cuda.CONFIGURATIONS for after in (False, True)
]
SMALLEST = [("Bf16", 31), ("Float32", 15)]


@of_kinds(KINDS)
def test_torch(factors: str, size: int, reset_after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results are right and have the same bits under every schedule of threads."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", factors == "Tf32")

    def kept(function: Callable[..., Sequence[torch.Tensor]]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Sequence[torch.Tensor]:
            results = function(*arguments)
            result[-1].extend(each.view(torch.int32) for each in results)
            return results

        return run

    result: list[list[torch.Tensor]] = []
    own = torch_impl.cuda
    twin = SimpleNamespace(forward=kept(own.forward), backward=kept(own.backward), array=own.array)
    for seed in range(3 if size < 200 else 1):
        driver.mock_seed(seed)
        result.append([])
        assert trial.error_of(size, factors, reset_after, twin) <= trial.BOUNDS[factors]
        assert all(map(torch.equal, result[0], result[-1]))


@of_kinds([kind for kind in KINDS if kind[:2] in SMALLEST])
def test_torch_without_optional_arguments(
    factors: str, size: int, reset_after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls without tokens, resets, outputs, a backward pass, or steps of a row block."""
    drawn = init_gru(5, size, 1, True, 0)
    weights = {name: torch.tensor(p).float().requires_grad_() for name, p in drawn.items()}
    lengths, resets = torch.tensor([0] * 8 + [1, 3]), torch.zeros(3, 10, dtype=torch.bool)
    h0, x = torch.rand(2, 10, size), torch.rand(3, 10, 5)

    def last(**others: Any) -> torch.Tensor:
        options = {"reset_after": reset_after, "bfloat16": factors == "Bf16"}
        return torch_gru(weights, x, lengths, h0, implementation="cuda", **options, **others)[1]

    result = [last(resets=resets), last(), last(return_sequences=False)]
    gradients = [torch.autograd.grad(each.sum(), [*weights.values()]) for each in result]
    assert all(torch.equal(each, result[0]) for each in result)
    for each in gradients:
        assert all(map(torch.equal, each, gradients[0]))
    with torch.no_grad():
        assert torch.equal(last(return_sequences=False), result[0])
    assert torch.equal(result[0][:, :8], h0[:, :8])
    assert result[0].isfinite().all()


def test_torch_launches_the_kernel_with_copies_of_the_indices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another stream may write to the caller's indices while the kernel reads them."""
    launch, launched = cuda.launch, []

    def record(kernel: Any, call: Any, stream: Any) -> None:
        launched.append({call.tokens, call.lengths, call.resets})
        launch(kernel, call, stream)

    monkeypatch.setattr(cuda, "launch", record)
    weights = {n: torch.tensor(p).float() for n, p in init_gru(5, 15, 1, False, 0).items()}
    x, lengths = torch.rand(4, 5, requires_grad=True), torch.tensor([3, 1], dtype=torch.int32)
    tokens, resets = torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2, dtype=torch.bool)
    options = {"tokens": tokens, "resets": resets, "implementation": "cuda"}
    torch_gru(weights, x, lengths, **options)[0].sum().backward()
    own = {each.data_ptr() for each in (tokens, lengths, resets)}
    assert len(launched) == 2  # forward and backward
    for addresses in launched:
        assert addresses - {None} and not addresses & own


@of_kinds([kind for kind in KINDS if kind[:2] in SMALLEST])  # elsewhere the kernel is the same
def test_jax(factors: str, size: int, reset_after: bool) -> None:
    assert trial.error_of(size, factors, reset_after, jax_impl.cuda) <= trial.BOUNDS[factors]


# In use.

CASE = parity.draw(Size("", 4, 3, 5, 1, 2, [4, 0, 2]), False).astype(np.float32)
PARAMETERS = {n: torch.tensor(p).requires_grad_() for n, p in CASE.parameters.items()}
X, LENGTHS, H0 = torch.tensor(CASE.x), torch.tensor(CASE.lengths), torch.tensor(CASE.h0)


def in_torch(x: torch.Tensor, implementation: str = "auto") -> torch.Tensor:
    """The outputs."""
    return torch_gru(PARAMETERS, x, LENGTHS, H0, implementation=implementation)[0]


def in_jax(x: jax.Array) -> jax.Array:
    """The outputs."""
    return jax_gru(CASE.parameters, x, CASE.lengths, CASE.h0)[0]


def test_operator_validates_its_arguments() -> None:
    """The operator validates its arrays; values out of range on the device give NaN."""
    tokens = torch.tensor([[0, 2, -1, 1, 0], [1, 0, 1, 0, 0]], dtype=torch.int32)
    lengths = torch.tensor([2, 2, 2, 3, -1], dtype=torch.int32)
    W, U, b, x, h0 = (torch.rand(*n) for n in ((96, 3), (96, 32), (96,), (2, 3), (1, 5, 32)))

    def outputs(U: torch.Tensor, x: torch.Tensor, h0: torch.Tensor) -> list[torch.Tensor]:
        options = ([x, W, U, b, b, h0], tokens, lengths, None, [True, True, False])
        result = torch.ops.gru.forward(*options, True)
        ones = torch.ones_like(h0)
        return [result[0], torch.ops.gru.backward(*options, None, ones, result[2], True)[-1]]

    for nan in (each.isnan().any(-1) for each in outputs(U, x, h0)):
        assert nan.tolist() == [[False, *[True] * 4]] * len(nan)
    for wrong, what in (
        ((U[:, :9], x, h0), "weight_hh"),
        ((U, x, h0[:, :2]), "tokens"),
        ((U, x, h0.double()), "h0"),
        ((U.double(), x, h0), "weight_hh"),
        ((U, x, h0.expand(2, 5, 32)), "^h0: "),
    ):
        with pytest.raises((ValueError, TypeError), match=what):
            outputs(*wrong)
    tokens = None
    with pytest.raises(ValueError, match=r"^x: "):
        outputs(U, torch.zeros(2, 4, 3), h0)


def test_training() -> None:
    """The learners of both frameworks have the losses of the CPU."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((9, 4)).astype(np.float32)
    tokens, lengths = rng.integers(0, 9, (5, 3)), np.array([5, 2, 4])
    batch = Batch(np.arange(9), tokens.astype(np.int32), lengths, np.array([0, 1, 1]), np.arange(3))
    losses = []
    for twin, arguments in product((torch_impl, jax_impl), ("scan", "cuda")):
        options = TrainConfig(hidden_size=8, implementation=arguments, device="cpu")
        config = options.model_config(vectors.shape, classes=2, train_vectors=False)
        one = twin.learner.Learner(config, options, vectors)
        losses.append([float(one.step(batch)) for _ in range(3)])
    np.testing.assert_allclose(losses, [losses[0]] * 4, rtol=2e-5)


def test_threads() -> None:
    """Several threads call the kernel at the same time."""
    with ThreadPoolExecutor(4) as pool:
        expected, *others = pool.map(in_torch, [X] * 5)
    assert all(torch.equal(each, expected) for each in others)


def fake() -> None:
    """A call whose arrays have no numbers."""
    with FakeTensorMode() as mode:
        own = {n: mode.from_tensor(p).detach() for n, p in PARAMETERS.items()}
        torch_gru(own, *map(mode.from_tensor, (X, LENGTHS, H0)))


@pytest.mark.parametrize(
    "use",
    [
        lambda: torch.func.grad(lambda x: in_torch(x).sum())(X),
        lambda: torch.func.jvp(in_torch, (X,), (X,)),
        lambda: torch.compile(in_torch, fullgraph=True, backend="aot_eager")(X),
        fake,
        lambda: jax.jit(in_jax)(CASE.x),
    ],
)
def test_a_first_use(use: Callable) -> None:
    """The first call with "auto" starts a trial, even if its arrays are transformed."""
    trial._verdicts.clear()
    in_torch(X, "scan")
    in_torch(X, "cuda")
    assert not trial._verdicts
    with jax.numpy_rank_promotion("raise"):
        use()
    assert [*trial._verdicts.values()] == [""]


@pytest.mark.parametrize("cell", [CELL, JAX_CELL], ids=["torch", "jax"])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("hang", "had no result after 10 s"),
        ("crash", "ended its process: Segmentation fault"),
        ("wrong", "is off by 1.0e-02 on this device"),
        ("error", "fails on this device: .*CUDA_ERROR_ILLEGAL_ADDRESS"),
        ("", ""),
    ],
)
def test_trial(
    fault: str, reason: str, cell: Cell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A child process tries the kernel; "auto" uses it, or else scan with one warning."""
    monkeypatch.setenv("MOCK_FAULT", fault)
    monkeypatch.setenv("GRU_TWINS_CACHE", str(tmp_path))
    monkeypatch.setattr(trial, "LIMIT", 10.0 if fault == "hang" else 60.0)
    monkeypatch.setattr(trial, "_verdicts", {})
    start = Mock(wraps=subprocess.Popen)
    monkeypatch.setattr(trial.subprocess, "Popen", start)
    monkeypatch.setattr(cuda, "launch", Mock(side_effect=AssertionError("runs in the parent")))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        names = {cell.resolve("auto", "cpu", "float32", 15) for _ in range(2)}
    assert names == {"scan" if fault else "cuda"}
    output = [str(each.message) for each in caught if "the GRU kernel" in str(each.message)]
    assert len(output) == bool(fault) and re.search(reason, "".join(output))
    trial._verdicts.clear()
    monkeypatch.setenv("MOCK_FAULT", "")  # the verdict is remembered
    with warnings.catch_warnings(record=True):
        assert {cell.resolve("auto", "cpu", "float32", 15)} == names
    assert start.call_count == 1
