"""The accuracy and the speed of a run's exported models.

Prints for each format the size, the accuracy on the test reviews, the number of reviews with
another class than in PyTorch, the largest difference of the logits from PyTorch's, relative to the
largest logit, and microseconds of processor time of a call on the first words of a long review, by
rows and words.
"""

import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from tyro.conf import Positional

import jax_impl.export
import torch_impl.export
import torch_impl.predictor
from benchmarks.timing import median_seconds
from common.data.batches import Batches
from common.inference import onnx_graph
from common.inference.export import Call, padded
from common.inference.model import Model
from common.training.data import load_data
from common.training.learner import predict
from common.training.run_directory import load_run
from tools.program import print_header, print_row, run_program

SIZES = {"1 of 20": (1, 20), "1 of 200": (1, 200), "32 of 200": (32, 200)}  # rows of words


def logits_of(model: Call, batches: Batches) -> Float[np.ndarray, "N C"]:
    """The logits of all reviews of a split, in its order.

    Reviews of similar lengths share a batch, because JAX compiles for each shape.
    """
    texts = [batches.split[i][-(batches.limit or 0) :] for i in range(len(batches.split))]
    order = np.argsort(batches.lengths)
    parts = np.array_split(order, math.ceil(len(order) / 250))
    logits = [model(*padded([texts[i] for i in rows])) for rows in parts]
    return np.concatenate(logits)[np.argsort(order)]


def compiled(content: bytes) -> tuple[bytes, Call]:
    """The package that AOTInductor compiles from a file of torch.export, and its model."""
    with tempfile.TemporaryDirectory() as folder:
        exported, package = (Path(folder, name) for name in ("model.pt2", "compiled.pt2"))
        exported.write_bytes(content)
        program = torch.export.load(exported)
        torch._inductor.aoti_compile_and_package(program, package_path=str(package))
        module = torch._inductor.aoti_load_package(str(package))
        file = package.read_bytes()
    return file, lambda *arrays: module(*map(torch.from_numpy, arrays)).numpy()


def main(run_dir: Positional[Path]) -> None:
    run = load_run(run_dir)
    batches = load_data(run.options, print).test
    predictor = Model(torch_impl.predictor, run, "cpu").predictor
    expected, labels = predict(predictor, batches)
    print(f"PyTorch itself: accuracy {(expected.argmax(1) == labels).mean():.2%}")
    content = torch_impl.export.save(run)
    formats: dict[str, tuple[Callable[[], bytes], Callable[[bytes], Call]]] = {
        "onnx": (partial(onnx_graph.save, run), onnx_graph.load),
        "onnx --int8": (partial(onnx_graph.save, run, int8=True), onnx_graph.load),
        "torch": (lambda: content, torch_impl.export.load),
        "stablehlo": (partial(jax_impl.export.save, run), jax_impl.export.load),
    }
    models = {name: (file := save(), load(file)) for name, (save, load) in formats.items()}
    models["torch, by AOTInductor"] = compiled(content)
    longest = batches.split[int(np.argmax(batches.split.lengths))]
    print_header("", "MB", "accuracy", "other classes", "logits", *SIZES)
    for name, (file, model) in models.items():
        logits = logits_of(model, batches)
        classes, difference = logits.argmax(1), np.abs(logits - expected).max()
        calls = [partial(model, *padded([longest[:n]] * rows)) for rows, n in SIZES.values()]
        # Processor time excludes most of the influence of other programs.
        timer = time.process_time
        seconds = [median_seconds({"": each}, 32, timer=timer)[""] for each in calls]
        print_row(
            name,
            f"{len(file) / 1e6:.1f}",
            f"{(classes == labels).mean():.2%}",
            (classes != expected.argmax(1)).sum(),
            f"{difference / np.abs(expected).max():.0e}",
            *(f"{each * 1e6:,.0f}" for each in seconds),
        )


if __name__ == "__main__":
    run_program(main)
