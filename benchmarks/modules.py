"""What the modules cost beside those that they replace, on one thread.

    python -m benchmarks.modules

Prints microseconds, medians of repetitions that take turns: forward and backward of a layer of 300
inputs and 128 units, a single step of a cell of as many units at one row, and forward and backward
of a layer of 256 units with its products in float32 and in bfloat16.
"""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

import jax_impl
import torch_impl
import torch_impl.gru
from common import kernels

D, H = 300, 128


def medians(contenders: dict[str, Callable[[], object]], number: int) -> str:
    """Microseconds of each; number: calls in a repetition."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(40):
        for name, call in contenders.items():
            call()
            start = time.perf_counter()
            for _ in range(number):
                call()
            taken[name].append((time.perf_counter() - start) / number * 1e6)
    return ", ".join(f"{name} {statistics.median(times):,.1f}" for name, times in taken.items())


def step(layer: nn.Module, x: torch.Tensor) -> None:
    """Forward and backward."""
    layer.zero_grad(set_to_none=True)
    layer(x)[1].sum().backward()


def jitted(cell: nnx.Module, h: jax.Array, x: jax.Array) -> Callable[[], object]:
    """A cell's step, compiled; its parameters are arguments."""
    graph, state = nnx.split(cell)
    function = jax.jit(lambda state, h, x: nnx.merge(graph, state)(h, x)[0])
    return lambda: jax.block_until_ready(function(state, h, x))


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # which nn.GRU needs to be fast
    kinds = {"nn.GRU": (nn.GRU, {}), "torch_impl.GRU": (torch_impl.GRU, {})}
    kinds["reset_after=False"] = (torch_impl.GRU, {"reset_after": False})
    for T, B in ((20, 1), (240, 1), (200, 32)):
        x, layers = torch.randn(T, B, D), {n: kind(D, H, **how) for n, (kind, how) in kinds.items()}
        calls = {name: lambda layer=layer, x=x: step(layer, x) for name, layer in layers.items()}
        print(f"{B} rows of {T} steps: {medians(calls, 1)}")
    x, h = torch.randn(1, D), torch.randn(1, H)
    cells = {"nn.GRUCell": nn.GRUCell(D, H), "torch_impl.GRUCell": torch_impl.GRUCell(D, H)}
    cells["reset_after=False"] = torch_impl.GRUCell(D, H, reset_after=False)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            calls = {name: lambda cell=cell: cell(x, h) for name, cell in cells.items()}
            print(f"a step, {'with' if grad else 'without'} a graph: {medians(calls, 50)}")
    a, b, rngs = jnp.ones((1, H)), jnp.ones((1, D)), nnx.Rngs(0)
    in_flax = {"nnx.GRUCell": nnx.GRUCell, "jax_impl.GRUCell": jax_impl.GRUCell}
    calls = {name: jitted(kind(D, H, rngs=rngs), a, b) for name, kind in in_flax.items()}
    calls["reset_after=False"] = jitted(jax_impl.GRUCell(D, H, reset_after=False, rngs=rngs), a, b)
    print(f"a step under jax.jit: {medians(calls, 50)}")
    lengths, layer = torch.full((64,), 100), torch_impl.GRU(D, 256, reset_after=False)
    x, parameters = torch.randn(100, 64, D), layer.canonical()

    def products(implementation: str, bfloat16: bool) -> None:
        how = {"implementation": implementation, "bfloat16": bfloat16}
        torch_impl.gru.gru(parameters, x, lengths, **how)[1].sum().backward()

    ways = {"fused": ("fused", False), "scan, bfloat16": ("scan", True)}
    if kernels.bfloat16():
        ways["fused, bfloat16"] = ("fused", True)
    calls = {name: lambda way=way: products(*way) for name, way in ways.items()}
    print(f"64 rows of 100 steps, 256 units: {medians(calls, 1)}")


if __name__ == "__main__":
    main()
