"""Runs programs in parallel: on cores of this machine, as jobs of Slurm, or on workers of Dask.

All three back ends implement submit(*arguments), which returns a future of `work`; `work` runs a
program and redirects its output to a file. A cluster therefore only needs storage that its machines
share, with this project at the same path.

On this machine, each program has its own cores. Programs that share all cores contend: PyTorch's
threads take ten times as long and more. A single program with all cores often leaves some idle,
because the time steps of nn.GRU are short and XLA compiles on one core.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from common import signals
from common.cores import cores
from common.errors import InputError, NotFiniteError, Stopped
from common.extras import require

ROOT = Path(__file__).parents[1]
PAUSE = 0.05  # seconds between polls of the programs
NOT_BEGUN = -1  # the exit status of a program that was not started


@dataclass(frozen=True)
class Job:
    """A program of this project, `python -m MODULE ARGUMENTS`; `name` is for display."""

    name: str
    module: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Where programs run.

    max_jobs: the number of parallel programs on this machine. slurm: options of sbatch, NAME=VALUE.
    folder: for output and signals of the programs; on a cluster, all machines must share it.
    """

    on: Literal["local", "slurm", "dask"] = "local"
    max_jobs: int = 1
    slurm: tuple[str, ...] = ()
    folder: Path | None = None


def check(place: Place) -> None:
    """Raise InputError if a package, address or command that a place requires is missing."""
    for text in place.slurm:
        _pair(text)
    if place.on != "local":
        require(place.on, what=f"--on {place.on}: ")
    if place.on == "dask" and _scheduler() is None:
        raise InputError("--on dask: DASK_SCHEDULER_ADDRESS must name a scheduler")
    if place.on == "slurm" and shutil.which("sbatch") is None:
        raise InputError("--on slurm: sbatch is not installed")


def _scheduler() -> str | None:
    import dask

    return dask.config.get("scheduler-address", None)


class Future(Protocol):
    """A future of a back end: concurrent.futures.Future, submitit.Job or distributed.Future."""

    def done(self) -> bool: ...
    def result(self) -> int: ...
    def cancel(self) -> Any: ...


Submit = Callable[..., Future]
"""Calls `work` with these arguments on a back end."""


def default_max_jobs() -> int:
    """The number of programs that can each have a core of this machine."""
    return cores() if hasattr(os, "sched_setaffinity") else 1


def run(
    jobs: Sequence[Job],
    place: Place,
    on_line: Callable[[Job, str], None],
    on_success: Callable[[Job], None],
) -> None:
    """Run the jobs, which start in their order.

    on_line receives each line that a job prints; on_success is called when a job succeeds. If a job
    fails, the others are stopped, and InputError or, for its exit status, NotFiniteError is raised.
    SIGINT and SIGTERM are forwarded to all running jobs; when they have ended, Stopped is raised.
    """
    if not jobs:
        return
    requests: list[int] = []
    stopped: list[str] = []
    failures: list[Exception] = []
    with (
        tempfile.TemporaryDirectory(prefix=".jobs-", dir=place.folder) as name,
        _back_end(place, len(jobs), folder := Path(name).absolute()) as submit,
    ):
        stop, cwd = folder / "stop", str(Path.cwd())
        runs: list[_Run] = []

        def handle(number: int) -> None:
            requests.append(number)
            _forward(number, stop)

        with signals.caught(handle):
            try:
                for number, job in enumerate(jobs):
                    log = folder / f"{number}.log"
                    runs.append(_Run(job, log, submit(job, log, stop, cwd)))
                while runs:
                    time.sleep(PAUSE)
                    for run in list(runs):
                        done = run.future.done()  # before reading, so that no last line is missed
                        for line in run.lines():
                            on_line(run.job, line)
                        if (requests or failures) and run.cancel():
                            runs.remove(run)
                        elif done:
                            runs.remove(run)
                            if not (status := run.status()):
                                on_success(run.job)
                            elif requests and status != NOT_BEGUN:
                                stopped.append(f"{run.job.name}: {run.last}")
                            elif status != NOT_BEGUN and not failures:
                                failures.append(run.failure(status))
            except BaseException:
                _forward(signal.SIGTERM, stop)
                for run in runs:
                    with contextlib.suppress(InputError):
                        run.cancel() or run.status()
                raise
    if requests:
        details = f" ({'; '.join(stopped)})" if stopped else ""
        raise Stopped(requests[0], f"; the same command continues from there{details}")
    if failures:
        raise failures[0]


@dataclass
class _Run:
    """A submitted job, whose output grows in the file `log`; `last` is the last complete line."""

    job: Job
    log: Path
    future: Future
    last: str = ""
    size: int = 0
    """The number of bytes of the log that were read."""

    def lines(self) -> Iterator[str]:
        """The complete lines that were written since the last call."""
        with contextlib.suppress(FileNotFoundError), self.log.open("rb") as file:
            file.seek(self.size)
            for line in file:
                if line.endswith(b"\n"):
                    self.size += len(line)
                    self.last = line[:-1].decode(errors="replace")
                    yield self.last

    def cancel(self) -> bool:
        """Cancel the job unless it has begun; returns whether the job was cancelled."""
        return not self.log.exists() and self.future.cancel() is not False

    def status(self) -> int:
        """The exit status, when the job has ended. Raises InputError if the back end lost it."""
        try:
            return self.future.result()
        except Exception as error:
            raise InputError(f"{self.job.name}: {str(error).strip().splitlines()[0]}") from None

    def failure(self, status: int) -> Exception:
        """The error for an exit status."""
        kind, last = NotFiniteError if status == 3 else InputError, self.last
        message = f"ended with exit status {status}: {last.removeprefix('error: ')}"
        return kind(f"{self.job.name}: {message}")


def work(job: Job, log: Path, stop: Path, cwd: str) -> int:
    """Run a program in the folder `cwd`, and return its exit status.

    Its output is appended to the file `log`. The program receives every signal whose number is
    written to the file `stop`, one per line; if the program fails, this function creates `stop`
    with SIGTERM, unless it exists. The program is killed together with this process
    (common/program.py), so that no two processes write its folder when a cluster calls this
    function again.
    """
    forwarded = 0
    if _signals(stop):
        return NOT_BEGUN
    # Imports this project from any working folder, and nothing from the working folder.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-X", "die_with_parent", "-m", job.module, *job.arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            process_group=0,  # only `stop` forwards Ctrl-C: a second SIGINT would end the program
        )
        while True:
            for number in _signals(stop)[forwarded:]:
                process.send_signal(number)
                forwarded += 1
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(PAUSE)
                break
    if status:
        with contextlib.suppress(FileExistsError), stop.open("x") as file:
            file.write(f"{int(signal.SIGTERM)}\n")  # no queued job may start
    return status


def _signals(stop: Path) -> list[int]:
    try:
        return [int(line) for line in stop.read_text().splitlines()]
    except FileNotFoundError:
        return []


def _forward(number: int, stop: Path) -> None:
    """Send a signal to all programs that read the file `stop`."""
    with stop.open("a") as file:
        file.write(f"{int(number)}\n")


@contextlib.contextmanager
def _back_end(place: Place, count: int, folder: Path) -> Iterator[Submit]:
    """The back end of a place for `count` jobs. Raises InputError if it is unavailable."""
    check(place)
    match place.on:
        case "local":
            shares = _shares(min(place.max_jobs, count))
            unused = iter(shares)

            def set_affinity() -> None:
                if share := next(unused):  # the cores of this thread and its child processes
                    os.sched_setaffinity(0, share)

            with ThreadPoolExecutor(len(shares), initializer=set_affinity) as threads:
                yield lambda *arguments: threads.submit(work, *arguments)
        case "slurm":
            import submitit
            from submitit.helpers import Checkpointable

            class Requeued(Checkpointable):
                """`work`, which returns to the queue if Slurm preempts it."""

                def __call__(self, *arguments: Any) -> int:
                    return work(*arguments)

            def submit(*arguments: Any) -> Future:
                try:
                    return slurm.submit(Requeued(), *arguments)
                except Exception as error:  # sbatch has failed
                    raise InputError(f"--on slurm: {' '.join(str(error).split())}") from None

            options = dict(_pair(text) for text in place.slurm)
            try:
                slurm = submitit.SlurmExecutor(folder)
                slurm.update_parameters(use_srun=False, additional_parameters=options)
            except RuntimeError as error:
                raise InputError(f"--on slurm: {error}") from None
            yield submit
        case "dask":
            from distributed import Client

            address = _scheduler()
            try:
                client = Client(address, timeout=20)
            except (OSError, ValueError) as error:
                raise InputError(f"--on dask: {address}: {error}") from None
            with client:  # Dask runs the job of a lost worker again on another
                if not client.scheduler_info()["workers"]:
                    print(f"--on dask: {address} has no workers yet; waiting", flush=True)
                yield partial(client.submit, work, pure=False)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise InputError(f"--slurm {text}: expected NAME=VALUE, such as partition=long")
    return name, value


def _shares(count: int) -> list[frozenset[int]]:
    """Disjoint sets of cores; an empty set means any core."""
    count = min(count, default_max_jobs())
    if count <= 1:
        return [frozenset()]
    # A quota may allow fewer cores than are visible; random ones avoid contention of containers.
    available = sorted(random.sample(sorted(os.sched_getaffinity(0)), cores()))
    return [frozenset(available[number::count]) for number in range(count)]
