"""The workers that train together: processes that a launcher starts, torchrun or Slurm's srun.

Each computes its shares of every batch; what they exchange is gradients, and what has to be the
same for all. This file knows how they speak (`gather`), the twins' world.py over what.
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
from common.errors import LOST, InputError, NotFiniteError, Stopped, complain, status_of

T = TypeVar("T")


def _alone(data: bytes) -> list[bytes]:
    return [data]


@dataclass(frozen=True)
class World:
    """A worker among `size`. The first one, of rank 0, locks, prints and writes.

    gather: hands bytes to all, and returns those of each worker, by rank; all have to call it.
    is_lost: whether an error says that a worker is gone.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[bytes], list[bytes]] = _alone
    is_lost: Callable[[BaseException], bool] = lambda error: False

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def everyones(self, value: T) -> list[T]:
        """The value that each worker has, by rank."""
        if self.size == 1:
            return [value]
        return [pickle.loads(data) for data in self.gather(pickle.dumps(value))]

    def each(self, make: Callable[[], T]) -> list[T]:
        """What make() comes to in each worker, by rank. All raise the InputError of one."""
        if self.size == 1:
            return [make()]
        made: list[T] = []
        problem = ""
        try:
            made.append(make())
        except InputError as error:
            problem = str(error)
        found = self.everyones((made, problem))
        for rank, (_, wrong) in enumerate(found):
            if wrong:
                raise InputError(f"worker {rank}: {wrong}" if rank else wrong)
        return [theirs[0] for theirs, _ in found]

    def of_first(self, make: Callable[[], T]) -> T:
        """What make() comes to in the first, for all."""
        found = self.each(make if self.first else lambda: None)[0]
        return cast("T", found)

    def same(self, what: str, value: object) -> None:
        """Raise InputError, in all, where a worker has another value than the first."""
        for rank, other in enumerate(everyones := self.everyones(value)):
            if other != everyones[0]:
                raise InputError(f"worker {rank} has other {what} than the first")

    def shares(self, count: int) -> range:
        """Which of a batch's so many shares are this worker's."""
        return range(self.rank, count, self.size)

    def union(
        self, distinct: Sequence[Int32[np.ndarray, " K"]]
    ) -> tuple[Int32[np.ndarray, " U"], list[Int[np.ndarray, " K"]]]:
        """The ids that any worker's shares have, ascending, and where those of each of mine are.

        distinct: the ids of each of this worker's shares.
        """
        everyones = [ids for mine in self.everyones(list(distinct)) for ids in mine]
        found = np.unique(np.concatenate(everyones))
        return found, [np.searchsorted(found, ids) for ids in distinct]


ALONE = World()


class Joining(Protocol):
    """What finds the other workers: see `Framework`."""

    def join(self) -> AbstractContextManager[World]: ...


def launched() -> bool:
    """Whether a launcher started this process as one of several. Raises InputError as `told`."""
    return told("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS") or "1", least=1) > 1


def told(name: str, default: str = "", least: int = 0) -> int:
    """A number that a launcher has set in the environment. Raises InputError for what is none."""
    said = os.environ.get(name) or default
    if not said.isdecimal() or int(said) < least:
        found = said or "nothing"
        raise InputError(
            f"{name}: expected a number from {least} on, as by torchrun, found {found}"
        )
    return int(said)


def restarted() -> bool:
    """Whether the launcher has started it again, after a worker was lost."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(os.environ.get(name, "0") != "0" for name in counts)


def check_launch(framework: str) -> None:
    """Raise InputError for what a launcher does not set so, and where workers on other machines
    could not reach this one.

    They speak over gloo, which takes the address that the machine's name stands for, and many
    machines call themselves 127.0.1.1; in PyTorch GLOO_SOCKET_IFNAME names an interface instead.
    """
    size = os.environ.get("WORLD_SIZE")
    if framework == "torch" or size:  # else by srun, which JAX understands
        told("LOCAL_RANK", "0")
        told("MASTER_PORT")
        if (rank := told("RANK")) >= told("WORLD_SIZE"):
            raise InputError(f"RANK: expected less than WORLD_SIZE, {size}, found {rank}")
        if not os.environ.get("MASTER_ADDR"):
            raise InputError("MASTER_ADDR: expected the first worker's machine, found nothing")
    if not size or int(size) == told("LOCAL_WORLD_SIZE", size, least=1):
        return  # all are here, for all that is known
    if framework == "torch" and "GLOO_SOCKET_IFNAME" in os.environ:
        return
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = "nothing"
    if address == "nothing" or address.startswith("127."):
        interface = ", or GLOO_SOCKET_IFNAME its interface" if framework == "torch" else ""
        raise InputError(
            f"this machine's name, {name}, stands for {address}, where the workers on others do "
            f"not reach it: /etc/hosts has to give its address in the network{interface}"
        )


@contextmanager
def joined(framework: Joining) -> Iterator[World]:
    """Among the workers that a launcher has started, if it has; framework: a twin's module.

    The first alone prints. What is wrong for it is wrong for all: so the others wait for it to say
    so, since a launcher ends all when one has ended.
    """
    if not launched():
        yield ALONE
        return
    with framework.join() as world:
        if not world.first:
            hush()
        try:
            yield world
            world.gather(b"")
            return
        except (InputError, NotFiniteError, Stopped) as error:
            if isinstance(error, Stopped) or not world.first:
                with suppress(Exception):  # if the first has gone already
                    world.gather(b"")
            if world.first:
                complain(error if isinstance(error, Stopped) else f"error: {error}")
            again = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
            # Else torchrun would start all of them again.
            status = 0 if again and isinstance(error, Stopped) else status_of(error)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException as error:
            status = LOST if world.is_lost(error) else 1
            if status != LOST:
                traceback.print_exc()
            elif world.rank < 2:  # if it is the first that is gone, the second says so
                goes_on = "the same command goes on from the last checkpoint"
                complain(f"error: another worker is gone; {goes_on}")
        sys.stdout.flush()
        os._exit(status)  # not by way of what waits for the others at the exit


def hush() -> None:
    """Let this process say no more than what Python has to say on standard error.

    XLA writes a page there, and ends the process, where the first worker has gone.
    """
    sys.stdout.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def take_cores() -> int:
    """Keep this worker to its part of the machine's cores; returns how many those are.

    Where the launcher has dealt them out already, as srun does, that stays.
    """
    local_size = told("LOCAL_WORLD_SIZE", "1", least=1)
    if local_size == 1 or not hasattr(os, "sched_setaffinity"):
        return cores()
    available = sorted(os.sched_getaffinity(0))
    count, number = max(1, cores() // local_size), told("LOCAL_RANK")
    mine = {available[(number * count + i) % len(available)] for i in range(count)}
    os.sched_setaffinity(0, mine)
    return len(mine)
