"""The speed of a changed cell in PyTorch: forward and backward of a layer, on two threads.

B 64, T 200, 300 inputs, H 128. The changed cell has the step of the GRU but is not registered, so
that the kernel does not support it: `loop` calls the step as it is, or compiled by torch.compile.
"""

from functools import partial

import torch
from torch import nn

import torch_impl
import torch_impl.gru
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


def main() -> None:
    """Print the durations as multiples of the changed cell's."""
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)  # nn.GRU is slow with denormal numbers
    layers = {
        "loop": changed_layer(compiled=False),
        "loop, step compiled": changed_layer(compiled=True),
        "scan of the GRU": torch_impl.GRU(D, H, reset_after=False, implementation="scan"),
        "kernel of the GRU": torch_impl.GRU(D, H, reset_after=False),
        "nn.GRU": nn.GRU(D, H),
    }
    x = torch.randn(T, B, D)
    seconds = median_seconds({name: partial(train, each, x) for name, each in layers.items()}, 3)
    for name, duration in seconds.items():
        print(f"{name:20} {duration / seconds['loop']:6.2f} times the time of loop")


if __name__ == "__main__":
    run_program(main)
