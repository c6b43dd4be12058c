"""A few of the calls of tools/fuzz_gru.py, which makes any number of them."""

from functools import partial
from pathlib import Path

import pytest

from tools import fuzz_gru

long = partial(pytest.param, marks=pytest.mark.long)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return fuzz_gru.build_sanitized(tmp_path_factory.mktemp("kernel"))
    except OSError as error:
        pytest.skip(str(error))


# JAX compiles almost every call.
@pytest.mark.parametrize(
    ("framework", "calls"), [("torch", 120), long("torch", 1500), long("jax", 500)]
)
def test_right_calls_are_right_and_wrong_ones_raise(
    framework: str, calls: int, library: Path
) -> None:
    report = fuzz_gru.fuzz(library, framework, calls)
    assert not report.failures, "\n".join(report.failures.values())
    assert report.calls == calls
