"""What a changed cell costs in PyTorch: forward and backward of a layer, on two threads.

    python -m benchmarks.cell

B 64, T 200, 300 inputs, H 128. The changed cell is the GRU's step as a cell of its own, which the
kernel does not have: `loop` calls the step as it is, or compiled by torch.compile.
"""

from statistics import median
from time import perf_counter

import torch
from torch import nn

import torch_impl
import torch_impl.gru
from benchmarks.modules import step
from common.cells import Cell, Recurrence
from torch_impl.layers import loop

B, T, D, H = 64, 200, 300, 128
REPETITIONS = 3


def changed(compiled: bool) -> nn.Module:
    """A layer of the changed cell."""
    gru = torch_impl.gru
    function = torch.compile(gru.step) if compiled else gru.step
    cell = Cell(gru.CELL.spec, function, {"loop": Recurrence(loop(function))})
    return torch_impl.Recurrent(cell, D, H)


def main() -> None:
    """Measure and print the times as multiples of the changed cell's."""
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)  # which nn.GRU needs to be fast
    layers = {"loop": changed(False), "loop, step compiled": changed(True)}
    layers |= {"scan of the GRU": torch_impl.GRU(D, H, reset_after=False, implementation="scan")}
    layers |= {"kernel of the GRU": torch_impl.GRU(D, H, reset_after=False), "nn.GRU": nn.GRU(D, H)}
    x = torch.randn(T, B, D)
    taken: dict[str, list[float]] = {name: [] for name in layers}
    for repetition in range(REPETITIONS + 1):  # the first one compiles
        for name, layer in layers.items():
            start = perf_counter()
            step(layer, x)
            if repetition:
                taken[name].append(perf_counter() - start)
    own = median(taken["loop"])
    for name, times in taken.items():
        print(f"{name:20} {median(times) / own:6.2f} times the time of loop")


if __name__ == "__main__":
    main()
