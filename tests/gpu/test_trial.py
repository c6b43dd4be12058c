"""Trials of GPU kernels: how the parent handles each outcome of its child. child.py is the child.

small.py tests the real child, on the emulated GPU.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import jax_impl.cuda
import jax_impl.gru
import torch_impl.cuda
import torch_impl.gru
from common.errors import InputError
from common.kernels import cuda
from common.kernels.cuda import nvrtc, trial
from tests import ROOT

TWINS = {"torch_impl": torch_impl, "jax_impl": jax_impl}
SUBJECT = "the GRU kernel for GPUs (Float32, 64 units)"
VERSION = nvrtc.version
KERNEL = (64, "Float32", (9, 0), "H100")
# A process that asks for the kernel; it needs no framework, because it starts no real child.
PARENT = """
import sys
from common.kernels.cuda import nvrtc, trial
sys.modules["torch_impl.cuda"], nvrtc.version, trial.program = trial, lambda: (13, 0), sys.argv[1:]
print(trial.trusted("torch_impl", 64, "Float32", (9, 0), "H100"))
"""


class Children:
    """The child processes that were started; `behavior` is that of the next ones."""

    def __init__(self, log: Path) -> None:
        self.log, self.behavior = log, "right"

    @property
    def program(self) -> list[str]:
        return ["-m", "tests.gpu.child", self.behavior, str(self.log)]

    def pids(self) -> list[int]:
        return [*map(int, self.log.read_text().split())] if self.log.exists() else []


@pytest.fixture
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Children:
    """Trials by child.py in an empty cache, of a process that works in another folder."""
    children = Children(tmp_path / "log")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRU_TWINS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trial, "_verdicts", {})
    monkeypatch.setattr(trial, "program", [])  # `ask` replaces it
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    return children


def ask(children: Children, twin: str = "torch_impl", kernel: tuple = KERNEL) -> tuple[bool, str]:
    """Whether a new process trusts the kernel, and its warning."""
    trial._verdicts.clear()
    trial.program = children.program
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        answers = {trial.trusted(twin, *kernel) for _ in range(2)}
    output = [str(each.message) for each in caught if each.category is UserWarning]
    assert len(answers) == 1 and len(output) == (answers == {False})
    return answers.pop(), "".join(output)


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize(
    ("behavior", "reason", "is_remembered"),
    [
        ("right", "", True),
        ("wrong", "is off by 1.0e-02", True),
        ("SIGSEGV", "ended its process: Segmentation fault", True),
        ("hang", "had no result after 0.5 s", True),
        # These outcomes do not prove a fault of the kernel.
        ("SIGKILL", "could not be tried: its process ended with status -9", False),
        ("error", "could not be tried: ImportError: no NVRTC", False),
        # The parent may have allocated most of the device's memory.
        ("memory", "false", True),
    ],
)
def test_verdict(
    twin: str,
    behavior: str,
    reason: str,
    is_remembered: bool,
    children: Children,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One trial gives the verdict; one warning in each process names the reason."""
    children.behavior = behavior
    if behavior == "hang":
        monkeypatch.setattr(trial, "LIMIT", 0.5)
    for _ in range(2):
        is_trusted, warning = ask(children, twin)
        assert is_trusted == (not reason)
        assert warning.startswith(reason and f"{SUBJECT} {reason}")
        assert ("remembered in" in warning) == (is_remembered and not is_trusted)
    assert len(children.pids()) == (1 if is_remembered else 2)
    assert not any(map(is_running, children.pids()))


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_child_that_cannot_be_killed(children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver may block the end of the child; the parent continues without it."""
    children.behavior = "hang"
    monkeypatch.setattr(trial, "LIMIT", 0.5)
    monkeypatch.setattr(trial, "GRACE", 0.1)
    start = time.perf_counter()
    with monkeypatch.context() as patch:
        patch.setattr(subprocess.Popen, "kill", lambda self: None)
        assert not ask(children)[0]
    assert time.perf_counter() - start < 10
    for pid in children.pids():
        os.kill(pid, signal.SIGKILL)


def test_trial_of_each_device_driver_and_source(
    children: Children, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "source"
    shutil.copytree(Path(trial.__file__).parent, folder)
    (folder / "recurrence.cu").write_text("// changed")
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: monkeypatch.setattr(trial, "driver", lambda: 13010),
        lambda: monkeypatch.setattr(nvrtc, "version", lambda: (13, 1)),
        lambda: monkeypatch.setattr(trial, "__file__", str(folder / "trial.py")),
    ]
    for number, change in enumerate(changes, 1):
        change()
        assert ask(children)[0] and len(children.pids()) == number
    for kernel in (
        (64, "Tf32", *KERNEL[2:]),
        (*KERNEL[:2], (10, 0), "H100"),
        (*KERNEL[:3], "H200"),
    ):
        number += 1
        assert ask(children, kernel=kernel)[0] and len(children.pids()) == number
    assert ask(children, "jax_impl")[0] and len(children.pids()) == number + 1


def start_parent(children: Children) -> subprocess.Popen:
    command = [sys.executable, "-c", PARENT, *children.program]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def test_two_processes_at_once(children: Children) -> None:
    """One process tries the kernel; the other one waits and has the same verdict."""
    children.behavior = "slow"
    parents = [start_parent(children) for _ in range(2)]
    assert [parent.communicate()[0] for parent in parents] == ["True\n"] * 2
    assert len(children.pids()) == 1


def test_child_ends_with_its_parent(children: Children) -> None:
    children.behavior = "hang"
    parent = start_parent(children)
    deadline = time.monotonic() + 10
    while not children.pids():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.kill()
    parent.communicate()
    (pid,) = children.pids()
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_cache_that_cannot_be_written(
    children: Children, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel is compiled and tried, but the verdict is not kept."""
    (tmp_path / "cache").write_text("a file")
    assert ask(children)[0] and ask(children)[0]
    assert len(children.pids()) == 2
    kernel = cuda.instance(64, "Float32", False, False, (9, 0))
    monkeypatch.setattr(nvrtc, "_compile", lambda options: (b"image", "log"))
    assert kernel and nvrtc.compile(kernel, (9, 0)) == b"image"


def test_no_nvrtc(children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "version", VERSION)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    is_trusted, warning = ask(children)
    assert not is_trusted and "could not be tried: NVRTC, which the" in warning
    assert not children.pids()
    kernel = cuda.instance(64, "Float32", False, False, (9, 0))
    with pytest.raises(InputError, match="NVRTC, which the extra cuda installs, is missing"):
        assert kernel and nvrtc.compile(kernel, (9, 0))


@pytest.mark.parametrize("twin", TWINS)
def test_only_auto_starts_a_trial(
    twin: str, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only "auto" starts a trial, and GRU_TWINS_CUDA=off prevents it."""
    if not jax_impl.cuda.BUILT:
        pytest.skip("the kernels have not been built with JAX's headers")
    children.behavior = "wrong"
    trial.program = children.program
    monkeypatch.setattr(cuda, "library", lambda: SimpleNamespace(gru_cuda_driver=lambda: 13000))
    monkeypatch.setattr(cuda, "rehearsed", (9, 0))
    cell, call = TWINS[twin].gru.CELL, ("cpu", "float32", 64)
    assert cell.resolve("cuda", *call) == "cuda" and cell.resolve("scan", *call) == "scan"
    monkeypatch.setenv("GRU_TWINS_CUDA", "off")
    assert cell.resolve("auto", *call) == "scan"
    with pytest.raises(InputError, match=r"implementation cuda: .* the gru has auto, loop, scan"):
        cell.resolve("cuda", *call)
    assert not children.pids()
    monkeypatch.setenv("GRU_TWINS_CUDA", "no")
    with pytest.raises(InputError, match=re.escape('GRU_TWINS_CUDA: expected "off" or nothing')):
        cell.resolve("auto", *call)
    monkeypatch.delenv("GRU_TWINS_CUDA")
    with pytest.warns(UserWarning, match="is off by"):
        assert cell.resolve("auto", *call) == "scan"
    assert len(children.pids()) == 1


@pytest.mark.parametrize("twin", TWINS)
def test_without_the_packages_of_the_extra_a_warning_names_it(
    twin: str, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.extras.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r'not used: isal .*pip install -e "\.\[cuda\]"'):
        assert not TWINS[twin].cuda.passes(64, False)
    assert not children.pids()
