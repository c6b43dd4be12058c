"""Trials of kernels on a GPU: before a kernel is used, a child process computes a small case.

A kernel that hangs or faults costs the child process alone. In the user's process, no kernel runs
before its verdict.
"""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import suppress
from functools import cache, partial
from importlib import import_module, metadata
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from common import oracle
from common.arguments import product_dtype
from common.cache import cached
from common.cells import LayerCall
from common.errors import InputError
from common.kernels.cuda import ROWS, Arch, driver, instance, nvrtc
from common.params import DIRECTIONS, GRU_PARAMETERS
from common.program import start

# The largest error of a small case, relative to the largest value of an array: some ten times what
# rounding causes, and far less than any fault causes.
BOUNDS = {"Bf16": 5e-2, "Tf32": 5e-3, "Float32": 1e-5}
LIMIT = 60.0  # seconds for a trial, in which the child imports its framework and compiles
GRACE = 5.0  # seconds for the end of a killed child: while it waits for the driver, it cannot end
CRASHES = {
    *(signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL),
    *(signal.SIGSEGV, signal.SIGSYS, signal.SIGTRAP),
}
"""The signals by which a fault ends a process. Other signals, such as those of Ctrl-C and of the
kernel's OOM killer, come from outside."""
VERDICT = "verdict: "  # precedes the verdict on the child's standard output
program = ["-m", "common.kernels.cuda.trial"]
"""The child's program, which calls `main`. A rehearsal has its own."""

# The verdicts of this process; an empty one is good.
_verdicts: dict[tuple[str, int, str, Arch, str], str] = {}
_trying = threading.Lock()


def trusted(twin: str, hidden: int, factors: str, arch: Arch, device: str, index: int = 0) -> bool:
    """Whether the kernel for this number of units has passed a trial on this device.

    A trial takes place once for a kernel, a twin ("torch_impl", "jax_impl"), a model of a device
    and a driver; the cache folder holds its verdict. If several processes need it, one tries the
    kernel and the others wait. A verdict that is not good causes one warning in each process.
    device: the model. index: the device's number in this process.
    """
    kernel = instance(hidden, factors, False, False, arch)
    if kernel is None:
        return False
    key = (twin, kernel.size, factors, arch, device)
    with _trying:
        if key not in _verdicts:
            _verdicts[key] = reason = _verdict(*key, index)
            if reason:
                warnings.warn(
                    f"the GRU kernel for GPUs ({factors}, {kernel.size} units) {reason}; scan, "
                    "which is slower, is used instead",
                    stacklevel=2,
                )
    return not _verdicts[key]


def _verdict(twin: str, size: int, factors: str, arch: Arch, device: str, index: int) -> str:
    """The reason why a kernel is not trusted; empty if it is trusted."""
    sources = [*Path(__file__).parent.glob("*.*"), Path(str(sys.modules[f"{twin}.cuda"].__file__))]
    release = Path("/proc/driver/nvidia/version")  # exists on Linux, except in WSL
    try:
        key = {
            "kernel": [factors, size],
            "device": [device, *arch],
            "driver": [driver(), release.read_text() if release.exists() else ""],
            "nvrtc": nvrtc.version(),
            "source": hashlib.sha256(b"".join(map(Path.read_bytes, sorted(sources)))).hexdigest(),
            "twin": [twin, metadata.version(twin.removesuffix("_impl"))],
        }
    except (InputError, ImportError, OSError) as error:
        return _untried(str(error))
    try_once = cache(partial(_try, twin, factors, size, index))

    def build(into: Path) -> None:
        reason, is_lasting = try_once()
        if not is_lasting:
            raise _NotRemembered
        (into / "verdict.txt").write_text(reason)

    try:
        folder = cached("gpu-trial", key, build)
    except (_NotRemembered, InputError):  # InputError: the cache cannot be written
        return try_once()[0]
    reason = (folder / "verdict.txt").read_text()
    return reason and f"{reason} (remembered in {folder})"


class _NotRemembered(Exception):
    """The trial has no verdict on the kernel."""


def _untried(problem: str) -> str:
    return f"could not be tried: {problem.strip().partition(chr(10))[0]}"


def _try(twin: str, factors: str, size: int, index: int) -> tuple[str, bool]:
    """Try a kernel in a child process.

    Returns the reason why it is not trusted, or an empty text, and whether that is a verdict on the
    kernel. It is none if, for example, a package is missing or the device's memory is in use.
    """
    variables = {
        "PYTHONPATH": os.pathsep.join(sys.path),  # the child imports what this process imports
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process may hold most of the memory
    }
    arguments = map(str, (twin, factors, size, index))
    try:
        child = subprocess.Popen(
            [sys.executable, "-P", "-X", "die_with_parent", *program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=os.environ | variables,
        )
    except OSError as error:  # the system cannot start another process
        return _untried(str(error)), False
    try:
        output, errors = child.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"had no result after {LIMIT:g} s", True
    finally:
        child.kill()
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)
    if -child.returncode in CRASHES:
        return f"ended its process: {signal.strsignal(-child.returncode)}", True
    for line in output.splitlines():
        if line.startswith(VERDICT):
            return line.removeprefix(VERDICT), True
    last_line = errors.strip().rpartition("\n")[2]
    return _untried(last_line or f"its process ended with status {child.returncode}"), False


def main() -> None:
    """The child process: prints a verdict, or raises an exception if the kernel cannot be tried."""
    twin, factors, size, index = sys.argv[1:]
    module = import_module(f"{twin}.cuda")
    module.prepare(int(index), factors)
    for reset_after, backward in product((False, True), repeat=2):
        kernel = instance(int(size), factors, reset_after, backward, module.arch())
        assert kernel is not None
        nvrtc.ready(kernel, module.arch())
    # Creates the device's context and cuBLAS's workspace: fails if the memory is in use.
    ones = module.array(np.ones((8, 8), np.float32))
    to_numpy(ones @ ones)
    print(VERDICT + judge(int(size), factors, module), flush=True)


def judge(size: int, factors: str, twin: Any) -> str:
    """The reason why a kernel is not correct on this process's device; empty if it is."""
    try:
        for reset_after in (False, True):
            error = error_of(size, factors, reset_after, twin)
            if not error <= BOUNDS[factors]:
                return f"is off by {error:.1e} on this device"
    except Exception as error:  # of any kind: an illegal address has the framework's own
        return f"fails on this device: {str(error).strip().partition(chr(10))[0]}"
    return ""


def error_of(size: int, factors: str, reset_after: bool, twin: Any) -> float:
    """The largest error of the results and gradients of a small case, in both directions, relative
    to each array's largest value, or to 1 where that is less.

    twin: torch_impl.cuda, jax_impl.cuda, or another object with forward, backward and array.
    """
    T, B, D, K = 4, ROWS + 1, 4, 9
    rng = np.random.default_rng(size)

    def draw(*shape: int) -> np.ndarray:
        return rng.uniform(-1, 1, shape).astype(np.float32)

    x, tokens, resets = draw(K, D), rng.integers(0, K, (T, B), np.int32), rng.random((T, B)) < 0.5
    lengths = np.array([T, 0, 1, *rng.integers(0, T + 1, B - 3)], np.int32)
    h0, h_reset, d_h_last = (draw(2, B, size) for _ in range(3))
    d_outputs = draw(T, B, 2 * size)
    shapes = {"weight_ih": (3 * size, D), "weight_hh": (3 * size, size)}
    weights = {
        name: [draw(*shapes.get(name, (3 * size,))) / np.float32(size**0.5) for _ in range(2)]
        for name in GRU_PARAMETERS
    }
    array = twin.array
    own = [[array(both[i]) for both in weights.values()] for i in range(2)]
    of_x, of_tokens, of_lengths, of_resets = map(array, (x, tokens, lengths, resets))
    states = (array(h0), of_resets, array(h_reset))
    flags = reset_after, True, product_dtype(factors == "Bf16")
    call = LayerCall(of_x, of_tokens, own, of_lengths, *states, *flags)
    outputs, h_last, saved = twin.forward(call, True)
    computed = twin.backward(call, array(d_outputs), array(d_h_last), saved, True)
    names = [f"gru.0.{side}.{name}" for side in DIRECTIONS for name in GRU_PARAMETERS]
    in_order = (both[i] for i in range(2) for both in weights.values())
    parameters = dict(zip(names, in_order, strict=True))
    run = oracle.forward(
        parameters, x[tokens], lengths, h0, resets, h_reset, reset_after=reset_after
    )
    gradients = oracle.backward(run, d_outputs, d_h_last)
    d_x = np.zeros((K, D))
    np.add.at(d_x, tokens, gradients["x"])
    exact = [run.outputs, run.h_last, d_x, *(gradients[name] for name in names)]
    exact += [gradients["h0"], gradients["h_reset"]]
    actual = [np.asarray(to_numpy(each), np.float64) for each in (outputs, h_last, *computed)]
    return max(
        float(np.nan_to_num(np.abs(ours - theirs), nan=np.inf).max() / max(np.abs(theirs).max(), 1))
        for ours, theirs in zip(actual, exact, strict=True)
    )


def to_numpy(array: Any) -> np.ndarray:
    """A framework's array, from the device."""
    return np.asarray(array.cpu() if hasattr(array, "cpu") else array)


if __name__ == "__main__":
    start()
    main()
