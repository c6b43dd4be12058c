"""Speed of products in bfloat16 against float32, with each instruction set that supports them.

    python -m benchmarks.bfloat16

The table, for docs/performance.md, shows milliseconds of training (forward and backward) and of
inference of a layer of 300 inputs in PyTorch, medians of interleaved repetitions, and the ratio of
float32 to bfloat16.
"""

import statistics
import time

import torch

import torch_impl
from common import kernels
from torch_impl.gru import gru

SIZES = ((64, 200, 128), (64, 100, 256), (64, 50, 512))  # rows, steps, units
SETS = ("amx", "avx512bf16")


def main() -> None:
    """Measure and print."""
    torch.set_flush_denormal(True)
    library = kernels.library()
    known = library is not None and [n for n in SETS if library.gru_instruction_set(n.encode())]
    if not known:
        print("fused in bfloat16 needs the kernel, and AMX or AVX-512 BF16")
        return
    ways = {"float32": (known[0], False)} | {name: (name, True) for name in known}
    print(f"| | {' | '.join([*ways, *(f'ratio, {name}' for name in known)])} |")
    print(f"|---{'|---' * (len(ways) + len(known))}|")
    for train in (True, False):
        for B, T, H in SIZES:
            x, lengths = torch.randn(T, B, 300), torch.full((B,), T, dtype=torch.int32)
            parameters = torch_impl.GRU(300, H, reset_after=False).canonical()
            taken: dict[str, list[float]] = {name: [] for name in ways}
            for repetition in range(16):
                for name, (instruction_set, bfloat16) in ways.items():
                    library.gru_instruction_set(instruction_set.encode())
                    start = time.perf_counter()
                    with torch.inference_mode(not train):
                        options = {"return_sequences": False, "bfloat16": bfloat16}
                        h_last = gru(parameters, x, lengths, implementation="fused", **options)[1]
                    if train:
                        h_last.sum().backward()
                    if repetition:
                        taken[name].append((time.perf_counter() - start) * 1e3)
            medians = {name: statistics.median(times) for name, times in taken.items()}
            cells = [f"{medians[name]:.1f}" for name in ways]
            cells += [f"{medians['float32'] / medians[name]:.2f}" for name in known]
            task = f"{'train' if train else 'infer'}, B {B}, T {T}, H {H}"
            print(f"| {task} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
