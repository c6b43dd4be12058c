"""What users do with the layer, on an emulated GPU: `python -m tests.gpu.use`.

It fails or prints "all right". It has a process of its own: in a rehearsal the CPU's arrays are the
GPU's.
"""

import threading
import warnings
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


def close(ours: Any, theirs: Any) -> None:
    """To float32's precision, tensor by tensor."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-5, atol=2e-5)


def torch_case() -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, ...], dict[str, Any]]:
    """Parameters, x, lengths and h0, and the rest."""
    parameters = {n: torch.tensor(p).requires_grad_() for n, p in CASE.parameters.items()}
    arrays = tuple(torch.tensor(a) for a in (CASE.x, CASE.lengths, CASE.h0))
    rest = {"resets": torch.tensor(CASE.resets), "h_reset": torch.tensor(CASE.h_reset)}
    return parameters, arrays, rest


def in_torch() -> None:
    """torch.compile, torch.export, torch.func, derivatives of derivatives, fake tensors."""
    parameters, (x, lengths, h0), rest = torch_case()

    def call(x: torch.Tensor, implementation: str = "cuda") -> torch.Tensor:
        how = {"implementation": implementation, **rest}
        return torch_impl.gru.gru(parameters, x, lengths, h0, **how)[0]

    before = driver.mock_launches()
    eager = call(x)
    assert driver.mock_launches() > before  # and not scan
    compiled = torch.compile(call, fullgraph=True)
    close(compiled(x).detach(), eager.detach())
    names = list(parameters)[:4]
    gradients = [
        torch.autograd.grad((f(x) ** 2).sum(), [parameters[n] for n in names])
        for f in (call, compiled, lambda x: call(x, "scan"))
    ]
    close(gradients[0], gradients[2])
    close(gradients[1], gradients[2])
    for transform in (
        lambda f: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
        lambda f: torch.func.grad(lambda x: torch.func.grad(lambda x: f(x).sum())(x).sum())(x),
        lambda f: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    ):
        close(transform(call).detach(), transform(lambda x: call(x, "scan")).detach())

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return call(x)

    exported = torch.export.export(Layer(), (x,))
    assert "gru.forward" in str(exported.graph)
    with FakeTensorMode():  # a device that is not there
        fake = {
            n: [torch.empty(s, device="cuda")] * 2
            for n, s in {"W": (192, 3), "U": (192, 64), "b": (192,), "c": (192,)}.items()
        }
        states = torch.empty(2, 7, 64, device="cuda")
        lengths = torch.empty(7, dtype=torch.int32, device="cuda")
        x = torch.empty(9, 7, 3, device="cuda")
        how = (states, None, None, lengths, None, [False, True], True, True, True)
        found = torch.ops.gru.forward(*fake.values(), x, *how)
        assert [tuple(each.shape) for each in found] == [(9, 7, 128), (2, 7, 64), (2, 20_160)]
        assert found[0].device.type == "cuda"


def in_jax() -> None:
    """jit, vmap, grad and jvp."""
    parameters = {n: jnp.asarray(p) for n, p in CASE.parameters.items()}
    rest = {"resets": jnp.asarray(CASE.resets), "h_reset": jnp.asarray(CASE.h_reset)}
    lengths, h0, x = map(jnp.asarray, (CASE.lengths, CASE.h0, CASE.x))

    def call(x: jax.Array, implementation: str = "cuda") -> jax.Array:
        how = {"implementation": implementation, **rest}
        return jax_impl.gru.gru(parameters, x, lengths, h0, **how)[0]

    def scan(x: jax.Array) -> jax.Array:
        return call(x, "scan")

    before = driver.mock_launches()
    close(jax.jit(call)(x), scan(x))
    assert driver.mock_launches() > before
    for transform in (
        lambda f: jax.grad(lambda x: (f(x) ** 2).sum())(x),
        lambda f: jax.vmap(jax.grad(lambda x: f(x).sum()))(jnp.stack([x, 2 * x])),
        lambda f: jax.jvp(f, (x,), (jnp.ones_like(x),))[1],
        lambda f: jax.grad(lambda x: jax.grad(lambda x: (f(x) ** 2).sum())(x).sum())(x),
    ):
        ours, theirs = (jax.jit(partial(transform, f))() for f in (call, scan))
        close(ours, theirs)
    wrong = jax.jit(lambda lengths: jax_impl.gru.gru(parameters, x, lengths, h0, **HOW)[1])(
        lengths.at[2].set(9)
    )
    assert np.isnan(wrong[:, 2]).all()
    assert np.isfinite(wrong[:, :2]).all()


def wrong_arguments() -> None:
    """What is out of range is said, and what the operator is told is looked at."""
    parameters, (x, lengths, h0), _ = torch_case()
    with pytest.raises(ValueError, match=r"lengths: expected values in 0..4"):
        torch_impl.gru.gru(parameters, x, lengths + 1, h0, **HOW)
    with pytest.raises(InputError, match="implementation cuda: on cpu, the gru has"):
        torch_impl.gru.gru(
            {n: p.double() for n, p in parameters.items()}, x.double(), lengths, **HOW
        )
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
    close(losses, [losses[0]] * 4)


def first_uses() -> None:
    """Whatever transforms or fakes the first call's arrays, the kernel is tried out on others."""
    parameters, (x, lengths, h0), _ = torch_case()

    def call(x: torch.Tensor) -> torch.Tensor:
        return torch_impl.gru.gru(parameters, x, lengths, h0, **HOW)[0].sum()

    detached = {n: p.detach() for n, p in parameters.items()}

    def fake() -> None:
        with FakeTensorMode() as mode:
            own = {n: mode.from_tensor(p) for n, p in detached.items()}
            arrays = (mode.from_tensor(each) for each in (x, lengths, h0))
            torch_impl.gru.gru(own, *arrays, **HOW)

    def in_jax() -> None:
        own = {n: jnp.asarray(p) for n, p in CASE.parameters.items()}
        with jax.numpy_rank_promotion("raise"):
            jax.jit(lambda x: jax_impl.gru.gru(own, x, CASE.lengths, **HOW)[0])(jnp.asarray(CASE.x))

    for use in (
        lambda: torch.func.grad(call)(x),
        lambda: torch.func.jvp(call, (x,), (x,)),
        lambda: torch.compile(call, fullgraph=True, backend="aot_eager")(x),
        fake,
        in_jax,
    ):
        trial._tried.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            use()
        assert [*trial._tried.values()] == [None]
    trial._tried.clear()
    torch_impl.gru.gru(parameters, x, lengths, h0, implementation="scan")
    assert not trial._tried  # who asks for another does not wait for it


def threads() -> None:
    """Several at once."""
    parameters, (x, lengths, h0), _ = torch_case()
    expected = torch_impl.gru.gru(parameters, x, lengths, h0, **HOW)[0].detach()
    found: list[torch.Tensor] = []

    def run() -> None:
        with torch.no_grad():
            found.append(torch_impl.gru.gru(parameters, x, lengths, h0, **HOW)[0])

    workers = [threading.Thread(target=run) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(each, expected) for each in found)
    assert len(found) == 4


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
    for check in (first_uses, in_torch, in_jax, wrong_arguments, training, threads, not_trusted):
        check()
    print("all right")
