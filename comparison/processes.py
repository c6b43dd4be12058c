"""Programs side by side, each on cores of its own.

Two programs that each use all cores stand in each other's way, with PyTorch's threads tenfold and
more. And one that has all cores often leaves some idle: nn.GRU's time steps are short, and XLA
compiles on one.
"""

import asyncio
import contextlib
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import signals
from common.data.encoding import cores
from common.errors import InputError, NotFiniteError, Stopped

ROOT = Path(__file__).parents[1]
LONGEST_LINE = 2**20  # characters


@dataclass(frozen=True)
class Job:
    """A program of this project, `python -m MODULE ARGUMENTS`, and its name for people."""

    name: str
    module: str
    arguments: tuple[str, ...]


def most_at_once() -> int:
    """How many programs can run here on cores of their own."""
    return cores() if hasattr(os, "sched_setaffinity") else 1


def run(
    jobs: Sequence[Job],
    at_once: int,
    say: Callable[[Job, str], None],
    ended: Callable[[Job], None],
) -> None:
    """Run the jobs, begun in their order, at most so many at once.

    say is given each line that a job prints; ended is called when one has ended well.

    Raises InputError or, for its exit status, NotFiniteError, where a job does not end well: the
    others are asked to stop, and have stopped, then. A SIGINT or SIGTERM is passed on to all that
    run; when they have ended, Stopped is raised.
    """
    if not jobs:
        return
    work = _Work(say, ended)
    with signals.caught(work.pass_on):
        try:
            asyncio.run(work.run(jobs, _shares(min(at_once, len(jobs)))))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
    if work.asked:
        stopped = "; ".join(work.stopped)
        raise Stopped(work.asked[0], f"; the same command goes on from there ({stopped})")


class _Work:
    """What runs, what it printed last, and the signals that ask for an end."""

    def __init__(self, say: Callable[[Job, str], None], ended: Callable[[Job], None]) -> None:
        self.say, self.ended = say, ended
        self.running: dict[Job, asyncio.subprocess.Process] = {}
        self.last: dict[Job, str] = {}
        self.asked: list[int] = []
        self.stopped: list[str] = []

    def pass_on(self, number: int) -> None:
        self.asked.append(number)
        for process in self.running.values():
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                process.send_signal(number)

    async def run(self, jobs: Sequence[Job], shares: Sequence[set[int]]) -> None:
        free: asyncio.Queue[set[int]] = asyncio.Queue()
        for share in shares:
            free.put_nowait(share)
        async with asyncio.TaskGroup() as group:
            for job in jobs:
                group.create_task(self.one(job, free))

    async def one(self, job: Job, free: asyncio.Queue[set[int]]) -> None:
        """Run a job when a share of the cores is free."""
        share = await free.get()
        if not self.asked:
            status, last = await self.process(job, share), self.last.get(job, "")
            if not status:
                self.ended(job)
            elif self.asked:
                self.stopped.append(f"{job.name}: {last}")
            else:
                kind = NotFiniteError if status == 3 else InputError
                message = last.removeprefix("error: ")
                raise kind(f"{job.name}: ended with exit status {status}: {message}")
        free.put_nowait(share)

    async def process(self, job: Job, share: set[int]) -> int:
        """Run a job's process; its exit status."""
        # Found from wherever this was started, and nothing of that folder in its place.
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", job.module, *job.arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            limit=LONGEST_LINE,
            process_group=0,  # Ctrl-C reaches it through us alone: a second would end it at once
        )
        self.running[job] = process
        assert process.stdout is not None
        try:
            if share:
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(process.pid, share)
            async for line in process.stdout:
                self.last[job] = line.decode(errors="replace").rstrip("\n")
                self.say(job, self.last[job])
            return await process.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()
            raise
        finally:
            del self.running[job]


def _shares(count: int) -> list[set[int]]:
    """The cores dealt out; an empty share is any core."""
    count = min(count, most_at_once())
    if count == 1:
        return [set()]
    # A quota may allow fewer than can be seen. Which ones: not the same in every container.
    available = sorted(random.sample(sorted(os.sched_getaffinity(0)), cores()))
    return [set(available[number::count]) for number in range(count)]
