"""Programs side by side: on cores of this machine, as jobs of Slurm, or on the workers of Dask.

There is one door for all three, an engine's submit(*arguments) -> future of `work`, which runs a
program, with what that prints in a file. So a cluster needs no more than storage that its machines
share, this project at the same place, and the way there.

On this machine each program has cores of its own. Two that each use all of them stand in each
other's way, with PyTorch's threads tenfold and more. And one that has all cores often leaves some
idle: nn.GRU's time steps are short, and XLA compiles on one.
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
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from common import signals
from common.cores import cores
from common.errors import InputError, NotFiniteError, Stopped

ROOT = Path(__file__).parents[1]
PAUSE = 0.05  # seconds between two looks at what the programs do
NOT_BEGUN = -1  # an exit status


@dataclass(frozen=True)
class Job:
    """A program of this project, `python -m MODULE ARGUMENTS`, and its name for people."""

    name: str
    module: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Where programs run.

    at_once: how many here; elsewhere, the cluster decides. slurm: options of sbatch, NAME=VALUE.
    folder: for the files by which they speak; of those that all machines see, unless it is here.
    """

    on: Literal["local", "slurm", "dask"] = "local"
    at_once: int = 1
    slurm: tuple[str, ...] = ()
    folder: Path | None = None


def check(place: Place) -> None:
    """Raise InputError where what a place needs is not there, as far as that is seen from here."""
    for text in place.slurm:
        _pair(text)
    needs = {"local": (), "slurm": ("submitit",), "dask": ("dask", "distributed")}[place.on]
    if any(find_spec(name) is None for name in needs):
        raise InputError(f'--on {place.on}: needs pip install -e ".[{place.on}]"')
    if place.on == "dask" and _scheduler() is None:
        raise InputError("--on dask: DASK_SCHEDULER_ADDRESS has to name a scheduler")
    if place.on == "slurm" and shutil.which("sbatch") is None:
        raise InputError("--on slurm: there is no sbatch here")


def _scheduler() -> str | None:
    import dask

    return dask.config.get("scheduler-address", None)


class Future(Protocol):
    """What an engine returns: that of concurrent.futures, a submitit.Job or a dask Future."""

    def done(self) -> bool: ...
    def result(self) -> int: ...
    def cancel(self) -> Any: ...


Submit = Callable[..., Future]
"""Calls `work` with its arguments, somewhere."""


def most_at_once() -> int:
    """How many programs can run here on cores of their own."""
    return cores() if hasattr(os, "sched_setaffinity") else 1


def run(
    jobs: Sequence[Job],
    place: Place,
    say: Callable[[Job, str], None],
    ended: Callable[[Job], None],
) -> None:
    """Run the jobs, begun in their order.

    say is given each line that a job prints; ended is called when one has ended well.

    Raises InputError or, for its exit status, NotFiniteError, where a job does not end well: the
    others are asked to stop, and have stopped, then. A SIGINT or SIGTERM is passed on to all that
    run; when they have ended, Stopped is raised.
    """
    if not jobs:
        return
    asked: list[int] = []
    stopped: list[str] = []
    failure: Exception | None = None
    with (
        tempfile.TemporaryDirectory(prefix=".jobs-", dir=place.folder) as name,
        _engine(place, len(jobs), folder := Path(name).absolute()) as submit,
    ):
        stop, here = folder / "stop", str(Path.cwd())
        futures: dict[Job, Future] = {}
        tails: dict[Job, _Tail] = {}

        def pass_on(number: int) -> None:
            with stop.open("a") as file:
                file.write(f"{int(number)}\n")

        def take(number: int) -> None:
            asked.append(number)
            pass_on(number)

        with signals.caught(take):
            for number, job in enumerate(jobs):
                tails[job] = _Tail(folder / f"{number}.log")
                futures[job] = submit(job, tails[job].path, stop, here)
            try:
                while futures:
                    time.sleep(PAUSE)
                    for job, future in list(futures.items()):
                        done = future.done()  # asked first, so that what it wrote last is read
                        for line in tails[job].lines():
                            say(job, line)
                        begun = tails[job].path.exists()
                        if (asked or failure) and not begun and future.cancel() is not False:
                            del futures[job]  # in a queue, it would hold us up
                            continue
                        if not done:
                            continue
                        del futures[job]
                        status = _status(job, future)
                        if not status:
                            ended(job)
                        elif asked:
                            if status != NOT_BEGUN:
                                stopped.append(f"{job.name}: {tails[job].last}")
                        elif failure is None:
                            kind = NotFiniteError if status == 3 else InputError
                            message = tails[job].last.removeprefix("error: ")
                            failure = kind(
                                f"{job.name}: ended with exit status {status}: {message}"
                            )
                            if not stop.exists():
                                pass_on(signal.SIGTERM)
            except BaseException:
                pass_on(signal.SIGTERM)
                for job, future in futures.items():
                    if tails[job].path.exists() or future.cancel() is False:
                        with contextlib.suppress(InputError):
                            _status(job, future)
                raise
    if asked:
        where = f" ({'; '.join(stopped)})" if stopped else ""
        raise Stopped(asked[0], f"; the same command goes on from there{where}")
    if failure:
        raise failure


def work(job: Job, log: Path, stop: Path, here: str) -> int:
    """Run a program where this is called, and return its exit status.

    What it prints is added to the file `log`. It is sent every signal whose number comes to stand,
    a line each, in the file `stop`; where it fails, that is what the others are sent. It is killed
    where this process is (common/__init__.py): whoever calls this again, as clusters do, then finds
    nobody at work in its folder. here: the folder it runs in.
    """
    passed = 0
    if _asked(stop):
        return NOT_BEGUN
    # Found from wherever this was started, and nothing of that folder in its place.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-X", "die_with_parent", "-m", job.module, *job.arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=here,
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            process_group=0,  # Ctrl-C reaches it through us alone: a second would end it at once
        )
        while True:
            for number in _asked(stop)[passed:]:
                process.send_signal(number)
                passed += 1
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(PAUSE)
                break
    if status:
        with contextlib.suppress(FileExistsError), stop.open("x") as file:
            file.write(f"{int(signal.SIGTERM)}\n")  # so that none begins that waits
    return status


def _asked(stop: Path) -> list[int]:
    try:
        return [int(line) for line in stop.read_text().splitlines()]
    except FileNotFoundError:
        return []


def _status(job: Job, future: Future) -> int:
    try:
        return future.result()
    except Exception as error:  # the engine's, that has lost it
        raise InputError(f"{job.name}: {str(error).strip().splitlines()[0]}") from None


class _Tail:
    """A growing file of lines, and the last of them."""

    def __init__(self, path: Path) -> None:
        self.path, self.last, self._rest, self._read = path, "", b"", 0

    def lines(self) -> Iterator[str]:
        """Those that have come since; of what was killed while it wrote, the rest with the next."""
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(self._read)
            found = file.read()
            self._read += len(found)
            *whole, self._rest = (self._rest + found).split(b"\n")
            for line in whole:
                self.last = line.decode(errors="replace")
                yield self.last


@contextlib.contextmanager
def _engine(place: Place, count: int, folder: Path) -> Iterator[Submit]:
    """That of a place, for so many jobs. Raises InputError where it is not there."""
    check(place)
    match place.on:
        case "local":
            shares = _shares(min(place.at_once, count))
            left = iter(shares)

            def take_share() -> None:
                if share := next(left):  # of the cores, for this thread and what it starts
                    os.sched_setaffinity(0, share)

            with ThreadPoolExecutor(len(shares), initializer=take_share) as threads:
                yield lambda *arguments: threads.submit(work, *arguments)
        case "slurm":
            import submitit
            from submitit.helpers import Checkpointable

            class Again(Checkpointable):
                """What Slurm takes off its machine is put in the queue again."""

                def __call__(self, *arguments: Any) -> int:
                    return work(*arguments)

            def submit(*arguments: Any) -> Future:
                try:
                    return slurm.submit(Again(), *arguments)
                except Exception as error:  # what sbatch says
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
            with client:  # what a worker that dies was at, another one begins again
                if not client.scheduler_info()["workers"]:
                    print(f"--on dask: {address} has no workers yet: waiting for some", flush=True)
                yield partial(client.submit, work, pure=False)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise InputError(f"--slurm {text}: expected NAME=VALUE, as in partition=long")
    return name, value


def _shares(count: int) -> list[frozenset[int]]:
    """The cores dealt out; an empty share is any core."""
    count = min(count, most_at_once())
    if count <= 1:
        return [frozenset()]
    # A quota may allow fewer than can be seen. Which ones: not the same in every container.
    available = sorted(random.sample(sorted(os.sched_getaffinity(0)), cores()))
    return [frozenset(available[number::count]) for number in range(count)]
