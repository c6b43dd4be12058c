"""Fixtures of all tests: a separate cache, small data, and command lines run in this process."""

import ctypes
import fcntl
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
import numpy as np
import pytest
import torch

import compare
from common.data.corpus import EncodedSplit, join
from common.report import schema
from common.report.__main__ import draw as draw_run
from common.training import run_directory
from tools import emulation

# XLA's older code generator, in one thread, compiles in less than half the time. jaxlib 0.11 lacks
# the older one, and ends the process for a flag that it does not know. The processes that tests
# start inherit the flags. XLA reads the variable when it compiles for the first time.
if jaxlib.version.__version_info__ < (0, 11):
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"


def pytest_collection_finish() -> None:
    """Exclude the imported modules from garbage collection, which would traverse them often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder that is empty at the start of the session.

    Most tests run a compiled function only once or twice. XLA therefore compiles without most
    optimizations and keeps compiled functions on disk, also in the processes that tests start.
    """
    base = tmp_path_factory.getbasetemp()  # each worker of xdist has a subfolder
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    quick = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(folder / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRU_TWINS_CACHE", str(folder / "cache"))
        for name, value in quick.items():
            patch.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        yield folder / "cache"


@pytest.fixture(scope="session")
def emulated_kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel with an emulated matrix unit; the workers of pytest-xdist share the build."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    if not emulation.POSSIBLE:
        pytest.skip("the emulation is compiled on Linux for x86")
    with (base / "emulation.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = emulation.build_once(base / "emulation")
    if path is None:
        pytest.skip("needs a C++ compiler")
    if not ctypes.CDLL(str(path)).gru_instruction_set(b"avx512"):
        pytest.skip("the emulation is compiled for AVX-512")
    return path


@pytest.fixture(scope="session", autouse=True)
def draw_in_process() -> Iterator[None]:
    """Figures are drawn in this process, because starting another takes a second or two."""

    def draw(folder: Path, program: tuple[str, ...] = run_directory.DRAW) -> bool:
        if program == compare.DRAW:
            compare.write_report(folder, schema.read(folder / "results.json"))
        else:
            draw_run(folder)
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_directory, "draw", draw)
        yield


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Restores SIGINT, which tests send and which background processes of a shell ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def clear_compiled_functions() -> Iterator[None]:
    """Frees the functions that JAX has compiled, after each module.

    Each compiled function uses some of the memory mappings that Linux allows a process
    (vm.max_map_count); XLA aborts when none is left.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def optimized() -> Iterator[None]:
    """XLA compiles with all optimizations, for tests whose bounds depend on its rounding."""
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64() -> Iterator[None]:
    """JAX computes in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """PyTorch uses one thread, because a second one slows down computations on small arrays."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A running Chromium."""
    from tests import chromium

    with chromium.start(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs a main function with arguments; returns exit status, standard output and error."""

    def run(main: Callable[[], object], *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Drops the capabilities by which root reads and writes all files, during the test."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the interface, this thread
    before, after = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for sets in (before, after):
        assert libc.capget(header, sets) == 0
    after[0] &= ~0b110  # effective: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, after) == 0
    yield
    assert libc.capset(header, before) == 0


@pytest.fixture
def small() -> list[str]:
    """Options of a training that takes a second or two."""
    sizes = {"--train-size": 192, "--test-size": 96, "--max-length": 40, "--hidden-size": 16}
    return ["--data", "rt", *(str(word) for pair in sizes.items() for word in pair)]


@pytest.fixture
def texts() -> EncodedSplit:
    """300 random texts of 0 to 60 words out of 500, two classes."""
    rng = np.random.default_rng(0)
    words = [rng.integers(0, 500, rng.integers(0, 61)).astype(np.int32) for _ in range(300)]
    return join(words, rng.integers(0, 2, 300))
