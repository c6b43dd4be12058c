"""What users do with the layer, on an emulated GPU: `python -m tests.gpu.use`.

It fails or prints "all right". It has a process of its own: in a rehearsal the CPU's arrays are the
GPU's.
"""

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import jax_impl.cuda
import jax_impl.fused
import torch_impl.cuda
from common.data.batches import Batch
from common.errors import InputError
from common.kernels import cuda
from common.kernels.cuda import nvrtc, trial
from common.training.options import TrainConfig
from comparison import parity
from comparison.parity import Size
from tests.gpu import rehearsal

SMALL = {key: sizes for key, sizes in cuda.CONFIGURATIONS.items() if key[1] == 64}
driver = rehearsal.start(configurations=SMALL)
torch.compiler.assume_constant_result(torch_impl.cuda.tried)  # as in PyTorch built for CUDA
torch.backends.cudnn.allow_tf32 = False
jax.config.update("jax_default_matmul_precision", "highest")
CASE = parity.draw(Size("", 4, 3, 5, 1, 2, [4, 0, 2], resets=True), False).astype(np.float32)
HOW: dict[str, Any] = {"implementation": "cuda"}
PARAMETERS = {n: torch.tensor(p).requires_grad_() for n, p in CASE.parameters.items()}
X, LENGTHS, H0 = torch.tensor(CASE.x), torch.tensor(CASE.lengths), torch.tensor(CASE.h0)
RESETS = {"resets": torch.tensor(CASE.resets), "h_reset": torch.tensor(CASE.h_reset)}


def in_torch(x: torch.Tensor, implementation: str = "cuda") -> torch.Tensor:
    """The outputs."""
    how = {"implementation": implementation, **RESETS}
    return torch_impl.gru.gru(PARAMETERS, x, LENGTHS, H0, **how)[0]


def in_jax(x: jax.Array, implementation: str = "cuda") -> jax.Array:
    """The outputs."""
    how = {"resets": CASE.resets, "h_reset": CASE.h_reset, "implementation": implementation}
    return jax_impl.gru.gru(CASE.parameters, x, CASE.lengths, CASE.h0, **how)[0]


def same(transform: Callable[[Callable], Any], call: Callable) -> None:
    """What it makes of the kernel is what it makes of scan, to float32's precision."""
    ours = transform(call)
    theirs = transform(partial(call, implementation="scan"))
    with torch.no_grad():
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), ours, theirs)


def transformations() -> None:
    """torch.compile, torch.func, jit, vmap, derivatives of derivatives."""
    x, weights = jnp.asarray(CASE.x), list(PARAMETERS.values())[:4]
    for call in (lambda: in_torch(X), lambda: jax.jit(in_jax)(x).block_until_ready()):
        before = driver.mock_launches()
        call()
        assert driver.mock_launches() > before  # and not scan
    for transform in (
        lambda f: f(X).detach(),
        lambda f: torch.compile(f, fullgraph=True)(X).detach(),
        lambda f: torch.autograd.grad(f(X).square().sum(), weights),
        lambda f: torch.autograd.grad(torch.compile(f)(X).square().sum(), weights),
        lambda f: torch.func.jvp(f, (X,), (torch.ones_like(X),))[1],
        lambda f: torch.func.grad(lambda x: torch.func.grad(lambda x: f(x).sum())(x).sum())(X),
        lambda f: torch.func.vmap(f)(torch.stack([X, 2 * X])),
    ):
        same(transform, in_torch)
    for transform in (
        lambda f: f(x),
        lambda f: jax.grad(lambda x: (f(x) ** 2).sum())(x),
        lambda f: jax.vmap(jax.grad(lambda x: f(x).sum()))(jnp.stack([x, 2 * x])),
        lambda f: jax.jvp(f, (x,), (jnp.ones_like(x),))[1],
        lambda f: jax.grad(lambda x: jax.grad(lambda x: (f(x) ** 2).sum())(x).sum())(x),
    ):
        same(lambda f, transform=transform: jax.jit(partial(transform, f))(), in_jax)


def without_a_device() -> None:
    """torch.export and fake tensors."""

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return in_torch(x)

    assert "gru.forward" in str(torch.export.export(Layer(), (X,)).graph)
    with FakeTensorMode():
        empty = partial(torch.empty, device="cuda")
        weights = ([empty(*shape)] * 2 for shape in ((192, 3), (192, 64), (192,), (192,)))
        lengths = empty(7, dtype=torch.int32)
        how = (None, None, lengths, None, [False, True], True, True, True)
        found = torch.ops.gru.forward(*weights, empty(9, 7, 3), empty(2, 7, 64), *how)
        assert [tuple(each.shape) for each in found] == [(9, 7, 128), (2, 7, 64), (2, 20_160)]
        assert found[0].device.type == "cuda"


def wrong_arguments() -> None:
    """What is out of range is said, and what the operator is told is looked at."""
    with pytest.raises(ValueError, match=r"lengths: expected values in 0..4"):
        torch_impl.gru.gru(PARAMETERS, X, LENGTHS + 1, H0, **HOW)
    with pytest.raises(InputError, match="implementation cuda: on cpu, the gru has"):
        doubled = {n: p.double() for n, p in PARAMETERS.items()}
        torch_impl.gru.gru(doubled, X.double(), LENGTHS, **HOW)
    W, U, b, c = (torch.zeros(192, 3), torch.zeros(192, 64), torch.zeros(192), torch.zeros(192))
    states, few = torch.zeros(1, 3, 64), torch.zeros(3, dtype=torch.int32)
    rest = (None, few, None, [False], True, True, True)
    torch.ops.gru.forward([W], [U], [b], [c], torch.zeros(2, 3, 3), states, None, *rest)
    for U_, x_, states_, what in (
        (U[:, :9], torch.zeros(2, 3, 3), states, "weight_hh"),
        (U, torch.zeros(2, 4, 3), states, "x"),
        (U, torch.zeros(2, 3, 3), states.double(), "h0"),
        (U.double(), torch.zeros(2, 3, 3), states, "weight_hh"),
    ):
        with pytest.raises((ValueError, TypeError), match=what):
            torch.ops.gru.forward([W], [U_], [b], [c], x_, states_, None, *rest)
    # On the device it is too late to raise: a token or a length out of range makes NaN.
    tokens = torch.tensor([[0, 5, 1], [1, 0, -1]], dtype=torch.int32)
    lengths = torch.tensor([2, 2, 3], dtype=torch.int32)
    U = torch.eye(64).repeat(3, 1)
    rest = (tokens, lengths, None, [False], True, True, True)
    outputs, _, _ = torch.ops.gru.forward(
        [W], [U], [b], [c], torch.zeros(2, 3), states, None, *rest
    )
    assert outputs.isnan().any(-1).tolist() == [[False, True, True], [False, True, True]]
    last = jax.jit(lambda lengths: jax_impl.gru.gru(CASE.parameters, CASE.x, lengths, **HOW)[1])(
        CASE.lengths + np.array([0, 0, 9])
    )
    assert np.isnan(last).any((0, 2)).tolist() == [False, False, True]


def training() -> None:
    """Both twins' learners, with the CPU's answer."""
    import jax_impl.learner
    import torch_impl.learner

    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((9, 4)).astype(np.float32)
    tokens, lengths = rng.integers(0, 9, (5, 3)), np.array([5, 2, 4])
    batch = Batch(np.arange(9), tokens.astype(np.int32), lengths, np.array([0, 1, 1]), np.arange(3))
    losses = []
    for learner in (torch_impl.learner.Learner, jax_impl.learner.Learner):
        for implementation in ("scan", "cuda"):
            options = TrainConfig(hidden_size=8, implementation=implementation, device="cpu")
            config = options.model_config(vectors.shape, classes=2, train_vectors=False)
            one = learner(config, options, vectors)
            assert one.implementation == implementation
            losses.append([float(one.step(batch)) for _ in range(3)])
    np.testing.assert_allclose(losses, [losses[0]] * 4, rtol=2e-5)


def first_uses() -> None:
    """Whatever transforms or fakes the first call's arrays, the kernel is tried out on others."""

    def fake() -> None:
        with FakeTensorMode() as mode:
            own = {n: mode.from_tensor(p).detach() for n, p in PARAMETERS.items()}
            torch_impl.gru.gru(own, *map(mode.from_tensor, (X, LENGTHS, H0)), **HOW)

    def strictly() -> None:
        with jax.numpy_rank_promotion("raise"):
            jax.jit(in_jax)(jnp.asarray(CASE.x))

    for use in (
        lambda: torch.func.grad(lambda x: in_torch(x).sum())(X),
        lambda: torch.func.jvp(in_torch, (X,), (X,)),
        lambda: torch.compile(in_torch, fullgraph=True, backend="aot_eager")(X),
        fake,
        strictly,
    ):
        trial._tried.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            use()
        assert [*trial._tried.values()] == [None]
    trial._tried.clear()
    in_torch(X, "scan")
    assert not trial._tried  # who asks for another does not wait for it


def threads() -> None:
    """Several at once."""
    with ThreadPoolExecutor(4) as pool:
        expected, *others = pool.map(in_torch, [X] * 5)
    assert all(torch.equal(each, expected) for each in others)


def not_trusted() -> None:
    """What cannot be compiled, does not launch or is off is said once, and is then not there."""
    compile_ = nvrtc.compile

    def absent(*_: Any) -> bytes:
        raise ImportError("no NVRTC")

    def wrong(*given: Any) -> Any:
        outputs, h_last, saved = torch_impl.cuda.forward(*given)
        return outputs + 0.01, h_last, saved

    try:
        for reason, compiler, forward in (
            ("is not to be had: no NVRTC", absent, torch_impl.cuda.forward),
            ("is not to be had: the GRU on the GPU: CUDA_ERROR", lambda *_: b"nothing\0", None),
            ("is off by 1.0e-02", compile_, wrong),
        ):
            nvrtc.compile = compiler
            cuda.ready.cache_clear()
            trial._tried.clear()
            arch = (9, len(reason))  # another device: the driver knows this one's kernels by now
            own = torch_impl.cuda
            twin = trial.Twin(forward or own.forward, own.backward, own.array)
            cuda.rehearsed = arch
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                for _ in range(2):
                    assert not trial.trusted(64, "Float32", arch, twin)
            (one,) = said
            assert reason in str(one.message)
            assert "scan takes over" in str(one.message)
            assert "cuda" not in torch_impl.gru.CELL.implementations("cpu", "float32", 64)
    finally:
        nvrtc.compile, cuda.rehearsed = compile_, rehearsal.H100


if __name__ == "__main__":
    first_uses()
    transformations()
    without_a_device()
    wrong_arguments()
    training()
    threads()
    not_trusted()
    print("all right")
