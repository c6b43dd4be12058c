"""Small cases in a rehearsal, against the oracle: what test_gpu.py and planted_faults.py run.

Not collected with the other tests: `start` has to come before torch_impl and jax_impl. With
SANITIZER in the environment, GCC's sanitizers look at the kernel meanwhile.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch

from common.kernels.cuda import trial
from common.params import init_gru
from tests.gpu import rehearsal

CONFIGURATIONS = {
    ("Bf16", 32): (1, 2, 1),
    ("Bf16", 128): (4, 2, 4),
    ("Tf32", 32): (1, 2, 2),
    ("Tf32", 64): (4, 1, 4),
    ("Float32", 16): (1, 1, 1),
    ("Float32", 32): (2, 1, 2),
}
SANITIZER = os.environ.get("SANITIZER", "")
if not SANITIZER:  # under which it takes long
    CONFIGURATIONS["Bf16", 256] = (16, 1, 1)
driver = rehearsal.start(configurations=CONFIGURATIONS, sanitizer=SANITIZER)
torch.set_deterministic_debug_mode("error")  # fills with NaN what is not written yet
of_kinds = partial(pytest.mark.parametrize, ("factors", "size", "reset_after"))
KINDS = [(factors, size - 1, after) for factors, size in CONFIGURATIONS for after in (False, True)]
SMALLEST = [("Bf16", 31), ("Float32", 15)]


@of_kinds(KINDS)
def test_torch(factors: str, size: int, reset_after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rightly, and the same bits under every schedule; of the largest under one."""
    from torch_impl import cuda

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", factors == "Tf32")

    def kept(function: Callable[..., Sequence[torch.Tensor]]) -> Callable[..., Any]:
        def run(*given: Any) -> Sequence[torch.Tensor]:
            results = function(*given)
            found[-1].extend(each.view(torch.int32) for each in results)
            return results

        return run

    found: list[list[torch.Tensor]] = []
    twin = trial.Twin(kept(cuda.forward), kept(cuda.backward), cuda.array)
    for seed in range(3 if size < 200 else 1):
        driver.mock_seed(seed)
        found.append([])
        assert trial.error_of(size, factors, reset_after, twin) <= trial.BOUNDS[factors]
        assert all(map(torch.equal, found[0], found[-1]))


@of_kinds([kind for kind in KINDS if kind[:2] in SMALLEST])
def test_torch_without_what_may_be_left_out(
    factors: str, size: int, reset_after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither tokens, resets, outputs nor a backward pass; nor, in a block of rows, a step."""
    from torch_impl.gru import gru

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    drawn = init_gru(5, size, 1, True, 0)
    weights = {name: torch.tensor(p).float().requires_grad_() for name, p in drawn.items()}
    lengths, resets = torch.tensor([0] * 8 + [1, 3]), torch.zeros(3, 10, dtype=torch.bool)
    h0, x = torch.rand(2, 10, size), torch.rand(3, 10, 5)

    def last(**others: Any) -> torch.Tensor:
        how = {"reset_after": reset_after, "bfloat16": factors == "Bf16"}
        return gru(weights, x, lengths, h0, implementation="cuda", **how, **others)[1]

    found = [last(resets=resets), last(), last(return_sequences=False)]
    gradients = [torch.autograd.grad(each.sum(), [*weights.values()]) for each in found]
    assert all(torch.equal(each, found[0]) for each in found)
    for each in gradients:
        assert all(map(torch.equal, each, gradients[0]))
    with torch.no_grad():
        assert torch.equal(last(return_sequences=False), found[0])
    assert torch.equal(found[0][:, :8], h0[:, :8])
    assert found[0].isfinite().all()


@of_kinds([kind for kind in KINDS if kind[:2] in SMALLEST])  # elsewhere the kernel is the same
def test_jax(factors: str, size: int, reset_after: bool) -> None:
    import jax

    from jax_impl import cuda

    twin = trial.Twin(cuda.forward, cuda.backward, cuda.array)
    with jax.default_matmul_precision("highest"):
        assert trial.error_of(size, factors, reset_after, twin) <= trial.BOUNDS[factors]
