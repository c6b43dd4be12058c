"""Concurrent programs: their cores, their output, and their end by a failure or a signal."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.errors import InputError, NotFiniteError, Stopped, interrupt_again
from comparison import processes
from comparison.processes import Job, Place
from tests import ROOT

several_cores = pytest.mark.skipif(
    processes.default_max_jobs() < 2, reason="needs two cores that can be shared out"
)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules the jobs can run."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def write(programs: Path, name: str, text: str) -> Job:
    (programs / f"{name}.py").write_text(text)
    return Job(name, name, ())


def run(jobs: list[Job], max_jobs: int) -> tuple[list[tuple[str, str]], list[str]]:
    """(name, line) in their order, and the names in the order in which the programs ended."""
    lines: list[tuple[str, str]] = []
    ended: list[str] = []
    processes.run(
        jobs,
        Place(max_jobs=max_jobs),
        lambda job, line: lines.append((job.name, line)),
        lambda job: ended.append(job.name),
    )
    return lines, ended


@several_cores
def test_each_has_cores_of_its_own(programs: Path) -> None:
    text = "import os, time; print(*os.sched_getaffinity(0)); time.sleep(0.5)"
    lines, ended = run([write(programs, name, text) for name in ("first", "second")], 2)
    first, second = ({int(core) for core in line.split()} for _, line in lines)
    assert first and second and not first & second
    assert first | second == os.sched_getaffinity(0)
    assert sorted(ended) == ["first", "second"]


@several_cores
def test_cpu_quota_limits_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """joblib reads the quota of the container, or this environment variable."""
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert processes.default_max_jobs() == 1
    assert processes._shares(2) == [frozenset()]
    monkeypatch.undo()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(processes, "cores", lambda: 4)
    first, second = processes._shares(2)
    assert len(first) == len(second) == 2 and not first & second


def test_one_after_the_other_each_has_all_cores(programs: Path) -> None:
    text = "import os, time; print(time.monotonic()); time.sleep(0.2); print(time.monotonic())"
    lines, ended = run([write(programs, name, text) for name in ("b", "a")], 1)
    times = [float(line) for _, line in lines]
    assert times == sorted(times)
    assert [name for name, _ in lines] == ["b", "b", "a", "a"]
    assert ended == ["b", "a"]


@several_cores
@pytest.mark.parametrize(("status", "kind"), [(2, InputError), (3, NotFiniteError)])
def test_one_that_fails_stops_the_others(
    status: int, kind: type[Exception], programs: Path
) -> None:
    ready, saved = programs / "ready", programs / "saved"
    patient = write(
        programs,
        "patient",
        f"""
import pathlib, signal, sys, time

def save(*_):
    time.sleep(0.5)
    pathlib.Path({str(saved)!r}).write_text("saved")
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
pathlib.Path({str(ready)!r}).touch()
time.sleep(60)
""",
    )
    failing = write(
        programs,
        "failing",
        f"""
import pathlib, sys, time

while not pathlib.Path({str(ready)!r}).exists():
    time.sleep(0.01)
print("error: no")
sys.exit({status})
""",
    )
    never = write(programs, "never", "print('begun')")
    lines: list[str] = []
    with pytest.raises(kind, match=rf"^failing: ended with exit status {status}: no$"):
        processes.run(
            [patient, failing, never],
            Place(max_jobs=2),
            lambda job, line: lines.append(f"{job.name} {line}"),
            lambda job: pytest.fail(f"{job.name} ended well"),
        )
    assert saved.read_text() == "saved", "it was asked to stop, and waited for"
    assert "never begun" not in lines


@several_cores
def test_a_signal_is_passed_on_to_all(programs: Path) -> None:
    text = """
import signal, sys, time
def stop(number, _):
    print("stopped after step 7", flush=True)
    sys.exit(128 + number)
signal.signal(signal.SIGINT, stop)
print("ready", flush=True)
time.sleep(60)
"""
    jobs = [write(programs, name, text) for name in ("first", "second", "third")]
    lines: list[str] = []

    def say(job: Job, line: str) -> None:
        lines.append(f"{job.name} {line}")
        if lines.count("first ready") + lines.count("second ready") == 2 and line == "ready":
            threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT)).start()

    with pytest.raises(
        Stopped, match=r"there \(\w+: stopped after step 7; \w+: stopped"
    ) as stopped:
        processes.run(
            jobs, Place(max_jobs=2), say, lambda job: pytest.fail(f"{job.name} ended well")
        )
    assert stopped.value.status == 130
    assert not any(line.startswith("third") for line in lines)


def test_jobs_end_if_the_program_fails_while_listening(programs: Path) -> None:
    job = write(programs, "talks", "import time; print('x', flush=True); time.sleep(60)")

    def say(job: Job, line: str) -> None:
        raise BrokenPipeError

    started = time.monotonic()
    with pytest.raises(BrokenPipeError):
        processes.run([job], Place(), say, lambda job: None)
    assert time.monotonic() - started < 30


def back_end(monkeypatch: pytest.MonkeyPatch, futures: dict[str, Callable[[Path, Path], object]]):
    """Replace the back end; `futures` returns a job's future from its log and the stop file."""

    @contextlib.contextmanager
    def opened(*_: object) -> Iterator[Callable[..., object]]:
        yield lambda job, log, stop, _: futures[job.name](log, stop)

    monkeypatch.setattr(processes, "_back_end", opened)
    return [Job(name, "", ()) for name in futures]


def test_an_error_is_reported_although_a_job_that_it_prevents_is_read_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`work` writes the stop file before its own future is done."""
    done = iter([False, True])

    def fails(log: Path, _: Path) -> SimpleNamespace:
        log.write_text("error: no\n")
        return SimpleNamespace(done=lambda: next(done), result=lambda: 2, cancel=lambda: False)

    def prevented(*_: Path) -> SimpleNamespace:
        return SimpleNamespace(
            done=lambda: True, result=lambda: processes.NOT_BEGUN, cancel=lambda: False
        )

    jobs = back_end(monkeypatch, {"fails": fails, "prevented": prevented})
    with pytest.raises(InputError, match=r"^fails: ended with exit status 2: no$"):
        run(jobs, 2)


def test_jobs_end_if_a_later_one_cannot_be_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    signals: list[str] = []

    def begins(log: Path, stop: Path) -> SimpleNamespace:
        log.touch()
        return SimpleNamespace(result=lambda: signals.append(stop.read_text()))

    def refused(*_: Path) -> SimpleNamespace:
        raise InputError("sbatch: no such partition")

    jobs = back_end(monkeypatch, {"begins": begins, "refused": refused})
    with pytest.raises(InputError, match="no such partition"):
        run(jobs, 2)
    assert [int(text) for text in signals] == [signal.SIGTERM]


def test_an_interrupt_that_python_discards_is_raised_again() -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupt_again(SimpleNamespace(exc_type=KeyboardInterrupt))
        time.sleep(5)


def test_ctrl_c_while_speed_starts_its_processes_prints_no_traceback(tmp_path: Path) -> None:
    """A terminal sends the signal to all processes while they import the frameworks."""
    process = subprocess.Popen(
        [sys.executable, "compare.py", "speed", "--out", tmp_path],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and not children.read_text():
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate()[0]
    assert process.returncode == 130, output
    assert "Traceback" not in output
