"""The workers that train together: processes started by a launcher, torchrun or Slurm's srun.

Each worker computes its shares of every batch. The workers exchange gradients and the values that
all of them must share. This file implements the exchange over `gather`; world.py in each twin
implements `gather` and the exchange of gradients.
"""

import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import numpy as np
from jaxtyping import Int, Int32

from common.cores import cores
from common.errors import LOST, InputError, NotFiniteError, Stopped, print_error, status_of

T = TypeVar("T")


def _alone(data: bytes) -> list[bytes]:
    return [data]


@dataclass(frozen=True)
class World:
    """One of `size` workers. The first worker, of rank 0, locks, prints and writes.

    gather: sends bytes to all workers and returns those of all workers by rank; every worker must
    call it. is_lost: whether an exception means that another worker was lost.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[bytes], list[bytes]] = _alone
    is_lost: Callable[[BaseException], bool] = lambda error: False

    @property
    def first(self) -> bool:
        """Whether this is the first worker."""
        return self.rank == 0

    def gather_values(self, value: T) -> list[T]:
        """The values of all workers by rank."""
        if self.size == 1:
            return [value]
        return [pickle.loads(data) for data in self.gather(pickle.dumps(value))]

    def call_in_all(self, make: Callable[[], T]) -> list[T]:
        """The results of make() in all workers by rank. If make() raises InputError in one worker,
        all workers raise InputError."""
        if self.size == 1:
            return [make()]
        made: list[T] = []
        problem = ""
        try:
            made.append(make())
        except InputError as error:
            problem = str(error)
        results = self.gather_values((made, problem))
        for rank, (_, problem) in enumerate(results):
            if problem:
                raise InputError(f"worker {rank}: {problem}" if rank else problem)
        return [made[0] for made, _ in results]

    def call_in_first(self, make: Callable[[], T]) -> T:
        """The result of make() in the first worker, returned in all."""
        return cast("T", self.call_in_all(make if self.first else lambda: None)[0])

    def same(self, what: str, value: object) -> None:
        """Raise InputError in all workers if a worker has another value than the first.

        what: the name of the value.
        """
        for rank, other in enumerate(all_values := self.gather_values(value)):
            if other != all_values[0]:
                raise InputError(f"worker {rank} has other {what} than the first")

    def shares(self, count: int) -> range:
        """The shares of this worker among the `count` shares of a batch."""
        return range(self.rank, count, self.size)

    def union(
        self, distinct: Sequence[Int32[np.ndarray, " K"]]
    ) -> tuple[Int32[np.ndarray, " U"], list[Int[np.ndarray, " K"]]]:
        """The ids that occur in any share of any worker, ascending, and the indices in these of the
        ids of each of this worker's shares.

        distinct: the ids of each of this worker's shares.
        """
        all_values = [ids for shares in self.gather_values(list(distinct)) for ids in shares]
        union = np.unique(np.concatenate(all_values))
        return union, [np.searchsorted(union, ids) for ids in distinct]


ALONE = World()


class Joining(Protocol):
    """The part of `Framework` (learner.py) that connects to the other workers."""

    def join(self) -> AbstractContextManager[World]: ...


def launched() -> bool:
    """Whether a launcher has started this process as one of several. Raises InputError as
    launch_number does."""
    return launch_number("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS") or "1", least=1) > 1


def launch_number(name: str, default: str = "", least: int = 0) -> int:
    """A number that a launcher has set in the environment. Raises InputError for any other value.

    name: the environment variable. least: the smallest valid number.
    """
    text = os.environ.get(name) or default
    if not text.isdecimal() or int(text) < least:
        raise InputError(
            f"{name}: expected a number >= {least}, as torchrun sets it, found {text or 'nothing'}"
        )
    return int(text)


def restarted() -> bool:
    """Whether the launcher has restarted the workers after one was lost."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(os.environ.get(name, "0") != "0" for name in counts)


def check_launch(framework: str) -> None:
    """Raise InputError for invalid environment variables of the launcher, and if workers on other
    machines could not reach this one.

    The workers communicate with gloo, which uses the address of the machine's name. On many
    machines, the name resolves to 127.0.1.1. In PyTorch, GLOO_SOCKET_IFNAME selects an interface.
    """
    size = os.environ.get("WORLD_SIZE")
    if framework == "torch" or size:  # otherwise srun, whose variables JAX reads itself
        launch_number("LOCAL_RANK", "0")
        launch_number("MASTER_PORT")
        if (rank := launch_number("RANK")) >= launch_number("WORLD_SIZE"):
            raise InputError(f"RANK: expected less than WORLD_SIZE, {size}, found {rank}")
        if not os.environ.get("MASTER_ADDR"):
            raise InputError("MASTER_ADDR: expected the first worker's machine, found nothing")
    if not size or int(size) == launch_number("LOCAL_WORLD_SIZE", size, least=1):
        return  # as far as is known, all workers run on this machine
    if framework == "torch" and "GLOO_SOCKET_IFNAME" in os.environ:
        return
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = "nothing"
    if address == "nothing" or address.startswith("127."):
        interface = (
            ", or GLOO_SOCKET_IFNAME must name its interface" if framework == "torch" else ""
        )
        raise InputError(
            f"the name of this machine, {name}, resolves to {address}, which other machines cannot "
            f"reach: /etc/hosts must contain its network address{interface}"
        )


@contextmanager
def joined(framework: Joining) -> Iterator[World]:
    """Connect to the workers that a launcher has started, if any. framework: the module of a twin.

    Only the first worker prints. An error of the first worker is an error of all. The others wait
    until it has printed the error, because a launcher terminates all workers when one exits.
    """
    if not launched():
        yield ALONE
        return
    with framework.join() as world:
        if not world.first:
            discard_output()
        try:
            yield world
            world.gather(b"")
            return
        except (InputError, NotFiniteError, Stopped) as error:
            if isinstance(error, Stopped) or not world.first:
                with suppress(Exception):  # in case the first worker has already exited
                    world.gather(b"")
            if world.first:
                print_error(error if isinstance(error, Stopped) else f"error: {error}")
            again = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
            # Otherwise torchrun would restart all workers.
            status = 0 if again and isinstance(error, Stopped) else status_of(error)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException as error:
            status = LOST if world.is_lost(error) else 1
            if status != LOST:
                traceback.print_exc()
            elif world.rank < 2:  # if the first worker was lost, the second prints
                hint = "the same command resumes from the last checkpoint"
                print_error(f"error: another worker was lost; {hint}")
        sys.stdout.flush()
        os._exit(status)  # skips exit handlers, which would wait for the other workers


def discard_output() -> None:
    """Discard the output of this process, except for what Python writes to standard error.

    If the first worker exits, XLA prints a page of text there and ends the process.
    """
    sys.stdout.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def bind_to_cores() -> int:
    """Restrict this worker to its part of the machine's cores; returns their number.

    If the launcher has already assigned cores, as srun does, the assignment is kept.
    """
    local_size = launch_number("LOCAL_WORLD_SIZE", "1", least=1)
    if local_size == 1 or not hasattr(os, "sched_setaffinity"):
        return cores()
    available = sorted(os.sched_getaffinity(0))
    count, rank = max(1, cores() // local_size), launch_number("LOCAL_RANK")
    own = {available[(rank * count + i) % len(available)] for i in range(count)}
    os.sched_setaffinity(0, own)
    return len(own)
