"""The parity checks of `python compare.py`, in a process of their own, beside the trainings."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import jax
import msgspec
import numpy as np

import jax_impl.learner
import torch_impl.learner
from common import files
from common.data.batches import Batch
from common.errors import exit_on_input_error
from common.report.schema import Check
from common.training.data import Data, load_data
from common.training.learner import Framework
from common.training.options import TrainConfig, parse_options
from comparison import parity
from comparison.implementations import Implementation
from comparison.jax_layers import jax_gru
from comparison.torch_layers import torch_gru

Answers = dict[str, np.ndarray]


@dataclass(frozen=True)
class ChecksConfig(TrainConfig):
    """Check the twins on a real batch; writes the rows, as in results.json, to the file --out."""

    frameworks: tuple[str, ...] = ("torch", "jax")
    """Whose implementation is checked against the oracle."""
    models: tuple[str, ...] = ("gru", "bigru")
    """Which of the twins' models."""
    oracle: bool = False
    """Also check what is trained, and nn.GRU, against the oracle, on real reviews."""


def main() -> None:
    """Run the command line; that a check fails stands in the file alone."""
    with exit_on_input_error():
        options = parse_options(ChecksConfig, "python -m comparison.checks")
        assert options.out is not None
        rows = []
        if options.oracle:
            print("checking what is trained against the float64 oracle", flush=True)
            rows += parity.run(trained(options), [parity.real(False), parity.real(True)])
        print("checking the twins' parity on a real batch", flush=True)
        rows += check_twins(options, options.models, print)
        files.write_json(options.out, msgspec.to_builtins(rows))


def trained(options: ChecksConfig) -> list[Implementation]:
    """What each framework trains with on its device, and nn.GRU."""
    found = []
    if "torch" in options.frameworks:
        kind = torch_impl.learner.find_device(options.device).type
        found.append(
            torch_gru(torch_impl.learner.CELLS["gru"].resolve(options.implementation, kind))
        )
    if "jax" in options.frameworks:
        kind = jax_impl.learner.find_device(options.device).platform
        found.append(jax_gru(jax_impl.learner.CELLS["gru"].resolve(options.implementation, kind)))
    return [*found, parity.NN_GRU]


def check_twins(
    options: TrainConfig, models: tuple[str, ...], report: Callable[[str], None]
) -> list[Check]:
    """Compare logits, loss and all gradients of the twins on the first batch of training.

    Errors are relative to the tensor's largest value. float64: the bounds of the parity suite.
    float32: twice two times the error that the plain loop of tensor operations makes in float32
    (each twin may be off by twice as much), plus one unit in the last place.
    """
    data = load_data(options, report)
    batch = next(data.train.epoch(0))
    rows: list[Check] = []
    for model in models:
        how = dataclasses.replace(options, model=model, device="cpu", implementation="auto")
        loop = dataclasses.replace(how, implementation="loop")
        exact = _answers(torch_impl.learner, how, data, batch, "float64")
        rounded = _answers(torch_impl.learner, loop, data, batch, "float32")
        for dtype in ("float64", "float32"):
            with jax.enable_x64(dtype == "float64"):
                theirs = _answers(jax_impl.learner, how, data, batch, dtype)
            ours = _answers(torch_impl.learner, how, data, batch, dtype)
            ulp = float(np.finfo(dtype).eps)
            for name in ("logits", "loss", "gradients"):
                bound = parity.BOUND_GRADIENT if name == "gradients" else parity.BOUND_RESULT
                if dtype == "float32":
                    bound = 4 * largest_error(exact, rounded, name) + ulp
                twins = [f"torch {model}", f"jax {model}"]
                error = largest_error(ours, theirs, name)
                rows.append(Check.of(twins, f"{name}, real batch", dtype, error, bound, ulp))
    return rows


def _answers(
    framework: Framework, options: TrainConfig, data: Data, batch: Batch, dtype: str
) -> Answers:
    """logits, loss and "gradients NAME" from the parameters that training starts from."""
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
