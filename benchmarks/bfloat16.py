"""The speed of products in bfloat16 relative to float32, for each instruction set that has them.

The table, for docs/performance.md, shows milliseconds of training (forward and backward) and of
inference of a layer of 300 inputs in PyTorch, and the ratio of float32 to bfloat16.
"""

from functools import partial
from itertools import product
from typing import Any

import torch

import torch_impl
from benchmarks.timing import median_seconds
from common import kernels
from tools.program import print_header, print_row, run_program
from torch_impl.gru import gru

SIZES = ((64, 200, 128), (64, 100, 256), (64, 50, 512))  # rows, steps, units
INSTRUCTION_SETS = ("amx", "avx512bf16")


def call(layer: tuple[Any, ...], trains: bool, instruction_set: str, bfloat16: bool) -> None:
    """Call the layer; with `trains`, also compute its gradients."""
    kernels.library().gru_instruction_set(instruction_set.encode())
    options = {"implementation": "fused", "return_sequences": False, "bfloat16": bfloat16}
    with torch.inference_mode(not trains):
        h_last = gru(*layer, **options)[1]
    if trains:
        h_last.sum().backward()


def main() -> None:
    torch.set_flush_denormal(True)
    library = kernels.library()
    names = INSTRUCTION_SETS if library else ()
    known = [name for name in names if library.gru_instruction_set(name.encode())]
    if not known:
        print("fused in bfloat16 needs the kernel, and AMX or AVX-512 BF16")
        return
    variants = {"float32": (known[0], False)} | {name: (name, True) for name in known}
    print_header("", *variants, *(f"ratio, {name}" for name in known))
    for trains, (B, T, H) in product((True, False), SIZES):
        x, lengths = torch.randn(T, B, 300), torch.full((B,), T, dtype=torch.int32)
        layer = torch_impl.GRU(300, H, reset_after=False).canonical(), x, lengths
        calls = {name: partial(call, layer, trains, *each) for name, each in variants.items()}
        seconds = median_seconds(calls, 15)
        task = f"{'train' if trains else 'infer'}, B {B}, T {T}, H {H}"
        ratios = (f"{seconds['float32'] / seconds[name]:.2f}" for name in known)
        print_row(task, *(f"{each * 1e3:.1f}" for each in seconds.values()), *ratios)


if __name__ == "__main__":
    run_program(main)
