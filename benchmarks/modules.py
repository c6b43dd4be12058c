"""The speed of the modules relative to those that they replace, on one thread.

Prints microseconds: forward and backward of a layer of 300 inputs and 128 units, a single step of a
cell of the same size for one row, and forward and backward of a layer of 256 units with its
products in float32 and in bfloat16.
"""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

import jax_impl
import torch_impl
import torch_impl.gru
from benchmarks.timing import median_seconds
from common import kernels
from tools.program import run_program

D, H = 300, 128


def print_microseconds(
    title: str, calls: Mapping[str, Callable[[], object]], number: int = 1
) -> None:
    """Print the median duration of each call; number: the calls in a repetition."""
    seconds = median_seconds(calls, 40, number)
    print(f"{title}: {', '.join(f'{name} {each * 1e6:,.1f}' for name, each in seconds.items())}")


def train(layer: nn.Module, x: torch.Tensor) -> None:
    """Compute the results and the gradients of a layer."""
    layer.zero_grad(set_to_none=True)
    layer(x)[1].sum().backward()


def jitted(cell: nnx.Module, h: jax.Array, x: jax.Array) -> Callable[[], object]:
    """The compiled step of a cell, whose parameters are arguments."""
    graph, state = nnx.split(cell)
    function = jax.jit(lambda state, h, x: nnx.merge(graph, state)(h, x)[0])
    return lambda: jax.block_until_ready(function(state, h, x))


def main() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # nn.GRU is slow with denormal numbers
    layers = {
        "nn.GRU": nn.GRU(D, H),
        "torch_impl.GRU": torch_impl.GRU(D, H),
        "reset_after=False": torch_impl.GRU(D, H, reset_after=False),
    }
    for T, B in ((20, 1), (240, 1), (200, 32)):
        x = torch.randn(T, B, D)
        calls = {name: partial(train, layer, x) for name, layer in layers.items()}
        print_microseconds(f"{B} rows of {T} steps", calls)
    x, h = torch.randn(1, D), torch.randn(1, H)
    cells = {
        "nn.GRUCell": nn.GRUCell(D, H),
        "torch_impl.GRUCell": torch_impl.GRUCell(D, H),
        "reset_after=False": torch_impl.GRUCell(D, H, reset_after=False),
    }
    steps = {name: partial(cell, x, h) for name, cell in cells.items()}
    print_microseconds("a step with autograd", steps, 50)
    with torch.no_grad():
        print_microseconds("a step without autograd", steps, 50)
    arrays, rngs = (jnp.ones((1, H)), jnp.ones((1, D))), nnx.Rngs(0)
    steps_in_flax = {
        "nnx.GRUCell": jitted(nnx.GRUCell(D, H, rngs=rngs), *arrays),
        "jax_impl.GRUCell": jitted(jax_impl.GRUCell(D, H, rngs=rngs), *arrays),
        "reset_after=False": jitted(jax_impl.GRUCell(D, H, reset_after=False, rngs=rngs), *arrays),
    }
    print_microseconds("a step under jax.jit", steps_in_flax, 50)
    lengths, layer = torch.full((64,), 100), torch_impl.GRU(D, 256, reset_after=False)
    x, parameters = torch.randn(100, 64, D), layer.canonical()

    def train_gru(implementation: str, bfloat16: bool) -> None:
        options = {"implementation": implementation, "bfloat16": bfloat16}
        torch_impl.gru.gru(parameters, x, lengths, **options)[1].sum().backward()

    variants = {
        "fused": partial(train_gru, "fused", False),
        "scan, bfloat16": partial(train_gru, "scan", True),
    }
    if kernels.bfloat16():
        variants["fused, bfloat16"] = partial(train_gru, "fused", True)
    print_microseconds("64 rows of 100 steps, 256 units", variants)


if __name__ == "__main__":
    run_program(main)
