"""What the exported models of a run answer on its test reviews, and how fast.

    python -m benchmarks.export RUN_DIR

Prints, for each format: its size, its accuracy, how many answers are other than PyTorch's, by how
much the logits differ from PyTorch's, relative to the largest, and the processor time of a call on
the first words of a long review, median: 1 row of 20 words, 1 of 200, 32 of 200.
"""

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

import jax_impl.export
import torch_impl.export
import torch_impl.predictor
from common.data.batches import Batches
from common.inference import onnx_graph
from common.inference.export import Call, padded
from common.inference.model import Model
from common.training.data import load_data
from common.training.learner import predict
from common.training.run_directory import load_run

CALLS = {"1 of 20": (1, 20), "1 of 200": (1, 200), "32 of 200": (32, 200)}


def read(model: Call, batches: Batches) -> Float[np.ndarray, "N C"]:
    """The logits of all reviews of a split, in its order. JAX compiles for each batch's shape."""
    texts = [batches.split[i][-(batches.limit or 0) :] for i in range(len(batches.split))]
    order = np.argsort(batches.lengths)
    parts = np.array_split(order, math.ceil(len(order) / 250))
    logits = [model(*padded([texts[i] for i in rows])) for rows in parts]
    return np.concatenate(logits)[np.argsort(order)]


def compiled(content: bytes, **how: object) -> tuple[bytes, Call]:
    """What AOTInductor makes of a file of torch.export: its package, and the model in that."""
    with tempfile.TemporaryDirectory() as folder:
        exported, package = (Path(folder, name) for name in ("model.pt2", "compiled.pt2"))
        exported.write_bytes(content)
        program = torch.export.load(exported)
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(package), inductor_configs=how
        )
        module = torch._inductor.aoti_load_package(str(package))
        found = package.read_bytes()
    return found, lambda *arrays: module(*map(torch.from_numpy, arrays)).numpy()


def microseconds(call: Callable[[], object]) -> float:
    """The processor time of a call, median: others may be at work on the machine."""
    taken = []
    for _ in range(32):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return statistics.median(taken) * 1e6


def main() -> None:
    """Measure and print."""
    run = load_run(Path(sys.argv[1]))
    batches = load_data(run.options, print).test
    predictor = Model(torch_impl.predictor, run, "cpu").predictor
    expected, labels = predict(predictor, batches)
    print(f"PyTorch itself: accuracy {(expected.argmax(1) == labels).mean():.2%}")
    content = torch_impl.export.save(run)
    kinds: dict[str, tuple[Callable[[], bytes], Callable[[bytes], Call]]] = {
        "onnx": (partial(onnx_graph.save, run), onnx_graph.load),
        "onnx --int8": (partial(onnx_graph.save, run, int8=True), onnx_graph.load),
        "torch": (lambda: content, torch_impl.export.load),
        "stablehlo": (partial(jax_impl.export.save, run), jax_impl.export.load),
    }
    found = {name: (file := save(), load(file)) for name, (save, load) in kinds.items()}
    found["torch, by AOTInductor"] = compiled(content)
    longest = batches.split[int(np.argmax(batches.split.lengths))]
    print(f"| | MB | accuracy | other answers | logits | {' | '.join(CALLS)} |")
    for name, (file, model) in found.items():
        logits = read(model, batches)
        answers, difference = logits.argmax(1), np.abs(logits - expected).max()
        others, share = (answers != expected.argmax(1)).sum(), difference / np.abs(expected).max()
        times = [
            microseconds(partial(model, *padded([longest[:steps]] * rows)))
            for rows, steps in CALLS.values()
        ]
        print(
            f"| {name} | {len(file) / 1e6:.1f} | {(answers == labels).mean():.2%} "
            f"| {others} | {share:.0e} | {' | '.join(f'{each:,.0f}' for each in times)} |"
        )


if __name__ == "__main__":
    main()
