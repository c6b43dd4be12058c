"""Programs side by side, each on cores of its own.

Two programs that each use all cores stand in each other's way, with PyTorch's threads tenfold and
more. And one that has all cores often leaves some idle: nn.GRU's time steps are short, and XLA
compiles on one.
"""

import asyncio
import contextlib
import itertools
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
    waiting = iter(jobs)
    running: dict[Job, asyncio.subprocess.Process] = {}
    asked: list[int] = []
    stopped: list[str] = []

    def pass_on(number: int) -> None:
        asked.append(number)
        for process in running.values():
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                process.send_signal(number)

    async def work(share: set[int]) -> None:
        """Run jobs on a share of the cores, one after the other."""
        for job in itertools.takewhile(lambda _: not asked, waiting):
            process = running[job] = await _begin(job)
            assert process.stdout is not None
            last = ""
            try:
                if share:
                    with contextlib.suppress(ProcessLookupError):
                        os.sched_setaffinity(process.pid, share)
                async for line in process.stdout:
                    last = line.decode(errors="replace").rstrip("\n")
                    say(job, last)
                status = await process.wait()
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                await process.wait()
                raise
            finally:
                del running[job]
            if not status:
                ended(job)
            elif asked:
                stopped.append(f"{job.name}: {last}")
            else:
                kind = NotFiniteError if status == 3 else InputError
                message = last.removeprefix("error: ")
                raise kind(f"{job.name}: ended with exit status {status}: {message}")

    async def work_on_all() -> None:
        async with asyncio.TaskGroup() as group:
            for share in _shares(min(at_once, len(jobs))):
                group.create_task(work(share))

    with signals.caught(pass_on):
        try:
            asyncio.run(work_on_all())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
    if asked:
        raise Stopped(asked[0], f"; the same command goes on from there ({'; '.join(stopped)})")


async def _begin(job: Job) -> asyncio.subprocess.Process:
    # Found from wherever this was started, and nothing of that folder in its place.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", job.module, *job.arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
        limit=LONGEST_LINE,
        process_group=0,  # Ctrl-C reaches it through us alone: a second would end it at once
    )


def _shares(count: int) -> list[set[int]]:
    """The cores dealt out; an empty share is any core."""
    count = min(count, most_at_once())
    if count <= 1:
        return [set()]
    # A quota may allow fewer than can be seen. Which ones: not the same in every container.
    available = sorted(random.sample(sorted(os.sched_getaffinity(0)), cores()))
    return [set(available[number::count]) for number in range(count)]
