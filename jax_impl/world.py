"""Workers that train together in JAX: jax.distributed. Its twin is torch_impl/world.py."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from common.errors import InputError
from common.training.world import World, bind_to_cores, check_launch, launch_number


@contextmanager
def join() -> Iterator[World]:
    """The workers that torchrun has started, which sets environment variables, or srun, which JAX
    supports itself."""
    check_launch("jax")
    bind_to_cores()  # before JAX starts its threads
    if os.environ.get("WORLD_SIZE"):
        # A port that differs from that of torchrun's store and is not assigned at random.
        port = 10_000 + launch_number("MASTER_PORT") % 20_000
        address = os.environ.get("JAX_COORDINATOR_ADDRESS")
        address = address or f"{os.environ['MASTER_ADDR']}:{port}"
        size, rank = launch_number("WORLD_SIZE"), launch_number("RANK")
        place = address, size, rank, launch_number("LOCAL_RANK", "0")
    else:
        place = None
    try:
        jax.distributed.initialize(*place or ())
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the workers do not find each other: {error}") from None

    def gather(data: bytes) -> list[bytes]:
        sizes = multihost_utils.process_allgather(np.int32(len(data)))
        # Few lengths, because JAX compiles for each.
        padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        gathered = multihost_utils.process_allgather(padded)
        return [row[:size].tobytes() for row, size in zip(gathered, sizes, strict=True)]

    yield World(jax.process_index(), jax.process_count(), gather, is_lost)
    jax.distributed.shutdown()


def is_lost(error: BaseException) -> bool:
    """Whether an error means that another worker was lost."""
    return any(each in str(error).lower() for each in ("gloo", "nccl", "coordination"))


class Exchange:
    """Sums the results of the shares of a batch, with the same result in every worker.

    shares: their number in all workers together. A worker distributes its shares over its devices
    of that platform, of which it uses a number that divides the number of shares.
    """

    def __init__(self, world: World, shares: int, platform: str) -> None:
        self.world, self.shares = world, shares
        self.each = -(-shares // world.size)  # the largest number of shares of a worker
        everyones: list[list[jax.Device]] = [[] for _ in range(world.size)]
        for device in jax.devices(platform):
            everyones[device.process_index].append(device)
        self.used = math.gcd(self.each, *map(len, everyones))  # devices of a worker
        self.mine = everyones[world.rank][: self.used]
        # A worker assigns its shares k, k + size, ... to its devices in turn.
        devices = np.array([each[: self.used] for each in everyones]).T.flatten()
        mesh = Mesh(devices, "share")
        self.dealt = NamedSharding(mesh, PartitionSpec("share"))
        # jit alone compiles an all-reduce and a permutation, which take twice the time.
        self.gather = jax.jit(
            jax.shard_map(
                lambda row: jax.lax.all_gather(row, "share", tiled=True),
                mesh=mesh,
                in_specs=PartitionSpec("share"),
                out_specs=PartitionSpec(),
                check_vma=False,
            )
        )

    def __call__(self, mine: Sequence[Float[Array, " P"]]) -> Float[Array, " P"]:
        """The sum over all shares, in their order. mine: this worker's results, each on its
        device."""
        if len(self.dealt.mesh.devices) == 1:
            return _total(tuple(mine), self.shares)
        rows = list(mine)
        while len(rows) < self.each:
            rows.append(jax.device_put(jnp.zeros_like(mine[0]), self.device(len(rows))))
        totals: list[Array] = []
        for start in range(0, self.each, self.used):
            turn = [row[None] for row in rows[start : start + self.used]]
            shape = self.used * self.world.size, len(rows[0])
            together = jax.make_array_from_single_device_arrays(shape, self.dealt, turn)
            totals.append(self.gather(together).addressable_data(0))
        return _total(tuple(totals), self.shares)

    def device(self, number: int) -> jax.Device:
        """The device of this worker's share with this number."""
        return self.mine[number % self.used]


@partial(jax.jit, static_argnums=1)
def _total(parts: tuple[Float[Array, "..."], ...], count: int) -> Float[Array, " P"]:
    """The sum of the first rows, in order."""
    total, *rows = [row for part in parts for row in jnp.atleast_2d(part)][:count]
    for row in rows:
        total = total + row
    return total
