"""Small cases in a rehearsal, against the oracle: what planted_faults.py runs.

Not collected with the other tests: `start` has to come before torch_impl and jax_impl.
"""

from functools import partial

import pytest

from common.kernels.cuda import trial
from tests.gpu import rehearsal

CONFIGURATIONS = {
    ("Bf16", 32): (1, 2, 1),
    ("Bf16", 128): (4, 2, 4),
    ("Bf16", 256): (16, 1, 1),
    ("Float32", 32): (2, 1, 2),
}
rehearsal.start(configurations=CONFIGURATIONS)
of_kinds = partial(pytest.mark.parametrize, ("factors", "size", "reset_after"))
KINDS = [(factors, size - 1, after) for factors, size in CONFIGURATIONS for after in (False, True)]


@of_kinds(KINDS)
def test_torch(factors: str, size: int, reset_after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from torch_impl import cuda

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    twin = trial.Twin(cuda.forward, cuda.backward, cuda.array)
    assert trial.error_of(size, factors, reset_after, twin) <= trial.BOUNDS[factors]


@of_kinds([kind for kind in KINDS if kind[1] < 32])  # the kernel is the same, and XLA compiles long
def test_jax(factors: str, size: int, reset_after: bool) -> None:
    import jax

    from jax_impl import cuda

    twin = trial.Twin(cuda.forward, cuda.backward, cuda.array)
    with jax.default_matmul_precision("highest"):
        assert trial.error_of(size, factors, reset_after, twin) <= trial.BOUNDS[factors]
