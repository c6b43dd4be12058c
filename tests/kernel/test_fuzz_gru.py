"""A few of the calls of tools/fuzz_gru.py, which makes any number of them."""

from pathlib import Path

import pytest

from common import kernels
from tools import fuzz_gru


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel with AddressSanitizer, which takes longer to build than the calls take."""
    try:
        return fuzz_gru.build_sanitized(tmp_path_factory.mktemp("kernel"))
    except OSError as error:
        pytest.skip(str(error))


def check(library: Path, framework: str, calls: int) -> None:
    """Assert that all calls end as they must."""
    report = fuzz_gru.fuzz(library, framework, calls)
    assert not report.failures, "\n".join(report.failures.values())
    assert report.calls == calls


@pytest.mark.skipif(not kernels.available(), reason="the kernel has not been built")
def test_valid_calls_are_right_and_invalid_ones_raise() -> None:
    try:
        fuzz_gru.sanitizer()
    except OSError as error:
        pytest.skip(str(error))
    check(kernels.PATH, "torch", 40)
    with pytest.raises(RuntimeError, match="absent does not load"):
        fuzz_gru.fuzz(Path("absent"), "torch", 1)


@pytest.mark.long
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_calls_of_the_emulated_matrix_unit(framework: str, emulated_kernel: Path) -> None:
    """Without AddressSanitizer, which takes longer to build."""
    check(emulated_kernel, framework, 60)


@pytest.mark.long
@pytest.mark.parametrize(("framework", "calls"), [("torch", 1500), ("jax", 500)])
def test_calls_of_the_sanitized_kernel(framework: str, calls: int, sanitized: Path) -> None:
    """JAX, which compiles almost every call, has fewer."""
    check(sanitized, framework, calls)
