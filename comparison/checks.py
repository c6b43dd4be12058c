"""The parity checks of `python compare.py`, in a process that runs beside the trainings."""

if __name__ == "__main__":
    from common.program import start

    start()

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import msgspec
import numpy as np

import jax_impl.learner
import torch_impl.learner
from common import files
from common.data.batches import Batch
from common.errors import exit_on_input_error
from common.params import ModelConfig
from common.report.schema import Check
from common.training.data import Data, load_data
from common.training.learner import Framework
from common.training.options import TrainConfig, parse_options
from comparison import parity
from comparison.implementations import Implementation
from comparison.peers.jax import jax_cell
from comparison.peers.torch import torch_cell

Answers = dict[str, np.ndarray]


@dataclass(frozen=True)
class ChecksConfig(TrainConfig):
    """Check the twins on a real batch; writes the rows of results.json to the file --out."""

    frameworks: tuple[str, ...] = ("torch", "jax")
    """The frameworks whose implementation is checked against the oracle."""
    models: tuple[str, ...] = ("gru", "bigru")
    """The models of the twins."""
    oracle: bool = False
    """Also check the trained implementations and nn.GRU against the oracle, on real reviews."""


def main() -> None:
    """Run the command line; failed checks do not affect the exit status."""
    with exit_on_input_error():
        options = parse_options(ChecksConfig, "python -m comparison.checks")
        assert options.out is not None
        rows = []
        if options.oracle:
            print("checking the trained implementations against the float64 oracle", flush=True)
            rows += parity.run(trained(options), [parity.real(False), parity.real(True)])
        print("checking the twins' parity on a real batch", flush=True)
        rows += check_twins(options)
        files.write_json(options.out, msgspec.to_builtins(rows))


def trained(options: ChecksConfig) -> list[Implementation]:
    """The implementation that each framework trains with on its device, and nn.GRU."""
    config = ModelConfig(input_size=1, implementation=options.implementation)
    twins = {"torch": (torch_impl.learner, torch_cell), "jax": (jax_impl.learner, jax_cell)}
    implementations = [
        cell(learner.Learner(config, options, np.zeros((1, 1))).implementation)
        for name, (learner, cell) in twins.items()
        if name in options.frameworks
    ]
    return [*implementations, parity.NN_GRU]


def check_twins(options: ChecksConfig) -> list[Check]:
    """Compare logits, loss and all gradients of the twins on the first batch of training.

    Errors are relative to the tensor's largest value. float64: the bounds of the parity suite.
    float32: four times the error of the plain loop of tensor operations in float32, because each
    twin may have twice its error, plus one unit in the last place.
    """
    data = load_data(options, print)
    answers = partial(_answers, data, next(data.train.epoch(0)))
    rows: list[Check] = []
    for model in options.models:
        auto = dataclasses.replace(options, model=model, device="cpu", implementation="auto")
        loop = dataclasses.replace(auto, implementation="loop")
        exact = answers(torch_impl.learner, auto, "float64")
        rounded = answers(torch_impl.learner, loop, "float32")
        twins = [f"torch {model}", f"jax {model}"]
        for dtype in ("float64", "float32"):
            with jax.enable_x64(dtype == "float64"):
                theirs = answers(jax_impl.learner, auto, dtype)
            ours = exact if dtype == "float64" else answers(torch_impl.learner, auto, dtype)
            ulp = float(np.finfo(dtype).eps)
            for name in ("logits", "loss", "gradients"):
                bound = parity.BOUND_GRADIENT if name == "gradients" else parity.BOUND_RESULT
                if dtype == "float32":
                    bound = 4 * largest_error(exact, rounded, name) + ulp
                error = largest_error(ours, theirs, name)
                rows.append(Check.of(twins, f"{name}, real batch", dtype, error, bound, ulp))
    return rows


def _answers(
    data: Data, batch: Batch, framework: Framework, options: TrainConfig, dtype: str
) -> Answers:
    """logits, loss and "gradients NAME" at the initial parameters."""
    vectors = data.vectors
    shape, classes = vectors.matrix.shape, len(data.classes)
    config = options.model_config(shape, classes, vectors.trained_with_model)
    learner = framework.Learner(config, options, vectors.matrix, dtype=dtype)
    loss, gradients = learner.gradients(batch)
    named = {f"gradients {name}": value for name, value in gradients.items()}
    return {"logits": learner.logits(batch), "loss": np.array(loss), **named}


def largest_error(a: Answers, b: Answers, prefix: str) -> float:
    """The largest difference, relative to the tensor's largest value; NaN counts as infinite."""
    errors = [np.abs(a[n] - b[n]).max() / np.abs(a[n]).max() for n in a if n.startswith(prefix)]
    return float(np.nan_to_num(max(errors), nan=np.inf))


if __name__ == "__main__":
    main()
