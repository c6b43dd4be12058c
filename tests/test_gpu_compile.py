"""What NVRTC makes of the GPU's kernel, the layouts of its fragments, and driver.h: without a GPU."""

import pytest
from gpu.resources import ARCHS, kernels, nvdisasm, resources

from common.kernels.cuda import CONFIGURATIONS, instance

SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227}  # at most, of a block


@pytest.mark.parametrize(
    ("name", "factors", "size"),
    [
        (name, *key)
        for name, arch in ARCHS.items()
        for key in CONFIGURATIONS
        if list(kernels(arch, *key))
    ],
)
def test_kernels_fit(name: str, factors: str, size: int) -> None:
    """Weights and sums stay in registers, the loop over time is not unrolled, and has the products
    and barriers that the algorithm needs, no more."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC")
    if nvdisasm() is None:
        pytest.skip("needs nvdisasm")
    for kernel in kernels(ARCHS[name], factors, size):
        cluster, _, parts = kernel.configuration
        found = resources(kernel, ARCHS[name])
        about = f"{kernel.template}: {found}"
        assert (found.stack, found.spilled, found.local) == (0, 0, 0), about
        # Registers are given out by 8 a thread.
        assert -(-found.registers // 8) * 8 * kernel.threads <= 65_536, about
        assert kernel.shared_bytes <= SHARED_KIB[name] * 1024, about
        each = {"Bf16": 1, "Tf32": 1, "Float32": 3}[factors]
        assert found.products == 3 * size // parts // (16 if factors == "Bf16" else 8) * each, about
        exchanges = 1 if kernel.reset_after else 2
        assert found.waits == (exchanges if cluster > 1 else 0), about
        assert found.barriers == exchanges * ((cluster == 1) + (parts > 1)), about


def test_clusters_take_an_arch_that_has_them() -> None:
    assert {
        (name, len([key for key in CONFIGURATIONS if list(kernels(arch, *key))]))
        for name, arch in ARCHS.items()
    } == {("sm_80", 4), ("sm_90", 11), ("sm_100", 11)}
    assert instance(64, "Bf16", False, False, (7, 5)) is None
