"""The speed of cells other than the GRU: forward and backward of a layer, on two threads.

B 64, T 200, 300 inputs, H 128. The changed cell in PyTorch has the step of the GRU but is not
registered, so that the kernel does not support it: `loop` calls the step as it is, or compiled by
torch.compile. The tanh RNN is measured in both frameworks, with `scan` and on the kernel.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

import jax_impl
import jax_impl.rnn
import torch_impl
import torch_impl.gru
import torch_impl.rnn
from benchmarks.modules import train
from benchmarks.timing import median_seconds
from common.cells import Cell, Recurrence
from tools.program import run_program
from torch_impl.layers import loop

B, T, D, H = 64, 200, 300, 128


def changed_layer(compiled: bool) -> nn.Module:
    """A layer of the changed cell."""
    gru = torch_impl.gru
    step = torch.compile(gru.step) if compiled else gru.step
    cell = Cell(gru.CELL.spec, step, {"loop": Recurrence(loop(step))})
    return torch_impl.Recurrent(cell, D, H)


def jax_training(implementation: str) -> Callable[[], object]:
    """A compiled training step of a layer of the tanh RNN in JAX/Flax."""
    layer = jax_impl.Recurrent(
        jax_impl.rnn.CELL, D, H, implementation=implementation, time_major=True, rngs=nnx.Rngs(0)
    )
    graph, state = nnx.split(layer)
    gradients = jax.jit(jax.grad(lambda state, x: nnx.merge(graph, state)(x)[1].sum()))
    x = jax.random.normal(jax.random.key(0), (T, B, D), jnp.float32)
    return lambda: jax.block_until_ready(gradients(state, x))


def main() -> None:
    """Print the durations as multiples of the changed cell's, and of the kernel's."""
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)  # nn.GRU is slow with denormal numbers
    x = torch.randn(T, B, D)
    for framework in ("torch", "jax"):
        steps = {
            name: jax_training(name)
            if framework == "jax"
            else partial(
                train, torch_impl.Recurrent(torch_impl.rnn.CELL, D, H, implementation=name), x
            )
            for name in ("scan", "fused")
        }
        seconds = median_seconds(steps, 9)
        ratio = seconds["scan"] / seconds["fused"]
        print(f"tanh RNN in {framework}: {seconds['fused'] * 1e3:.1f} ms, scan {ratio:.2f} times")
    layers = {
        "loop": changed_layer(compiled=False),
        "loop, step compiled": changed_layer(compiled=True),
        "scan of the GRU": torch_impl.GRU(D, H, reset_after=False, implementation="scan"),
        "kernel of the GRU": torch_impl.GRU(D, H, reset_after=False),
        "nn.GRU": nn.GRU(D, H),
    }
    seconds = median_seconds({name: partial(train, each, x) for name, each in layers.items()}, 3)
    for name, duration in seconds.items():
        print(f"{name:20} {duration / seconds['loop']:6.2f} times the time of loop")


if __name__ == "__main__":
    run_program(main)
