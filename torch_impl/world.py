"""Workers that train together in PyTorch: torch.distributed. Its twin is jax_impl/world.py."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from common.errors import InputError
from common.training.world import World, bind_to_cores, check_launch, launch_number

LONGEST = timedelta(days=1)  # a worker may have to wait for another that encodes a data set


@contextmanager
def join() -> Iterator[World]:
    """The workers that torchrun has started; they communicate by gloo and, on GPUs, by NCCL."""
    check_launch("torch")
    backend = "gloo"
    torch.set_num_threads(bind_to_cores())
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(launch_number("LOCAL_RANK", "0") % torch.cuda.device_count())
    # After a restart, torchrun's store may still contain the previous addresses of the workers.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=LONGEST))
        store = dist.PrefixStore(attempt, store)
        where = {"store": store, "rank": rank, "world_size": size}
        dist.init_process_group(backend, timeout=LONGEST, **where)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the workers do not find each other: {error}") from None

    def gather(data: bytes) -> list[bytes]:
        gathered: list[bytes] = [b""] * dist.get_world_size()
        dist.all_gather_object(gathered, data)
        return gathered

    yield World(dist.get_rank(), dist.get_world_size(), gather, is_lost)
    dist.destroy_process_group()  # otherwise its threads may abort


def is_lost(error: BaseException) -> bool:
    """Whether an error means that another worker was lost."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


class Exchange:
    """Sums the results of the shares of a batch, with the same result in every worker.

    shares: their number in all workers together.
    """

    def __init__(self, world: World, shares: int) -> None:
        self.world, self.shares = world, shares
        self.each = -(-shares // world.size)  # the largest number of shares of a worker

    def __call__(self, mine: Sequence[Float[Tensor, " P"]]) -> Float[Tensor, " P"]:
        """The sum over all shares, in their order. mine: the results of this worker's shares."""
        rows = list(mine)
        if (size := self.world.size) > 1:
            rows += [torch.zeros_like(rows[0])] * (self.each - len(rows))
            everyones = [rows[0].new_empty(self.each, len(rows[0])) for _ in range(size)]
            dist.all_gather(everyones, torch.stack(rows))
            rows = [everyones[k % size][k // size] for k in range(self.shares)]
        total = rows[0].clone()
        for row in rows[1:]:
            total += row
        return total
