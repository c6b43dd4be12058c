"""Parity on the spot: do the twins compute the same on a real batch of the data at hand?"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

import jax_impl.learner
import torch_impl.learner
from common.data.batches import Batch
from common.report.schema import Check
from common.training.data import Data, load_data
from common.training.learner import Framework
from common.training.options import TrainConfig
from comparison.parity import BOUND_GRADIENT, BOUND_RESULT

Answers = dict[str, np.ndarray]


def check(
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
            for name in ("logits", "loss", "gradients"):
                ulp = np.finfo(dtype).eps
                bound = BOUND_GRADIENT if name == "gradients" else BOUND_RESULT
                if dtype == "float32":
                    bound = float(4 * _error(exact, rounded, name) + ulp)
                error = _error(ours, theirs, name)
                rows.append(
                    Check(
                        models=[f"torch {model}", f"jax {model}"],
                        check=f"{name}, real batch",
                        dtype=dtype,
                        error=error,
                        bound=bound,
                        ulp=float(error / ulp),
                        passed=error <= bound,
                    )
                )
    return rows


def _answers(
    framework: Framework, options: TrainConfig, data: Data, batch: Batch, dtype: str
) -> Answers:
    """logits, loss and "gradients NAME" from the parameters that training starts from."""
    vectors = data.vectors
    config = options.model_config(
        input_size=vectors.matrix.shape[1],
        classes=len(data.classes),
        vocabulary_size=len(vectors.words),
        train_vectors=vectors.trained_with_model,
    )
    learner = framework.Learner(config, options, vectors.matrix, dtype=dtype)
    loss, gradients = learner.gradients(batch)
    named = {f"gradients {name}": value for name, value in gradients.items()}
    return {"logits": learner.logits(batch), "loss": np.array(loss), **named}


def _error(a: Answers, b: Answers, prefix: str) -> float:
    """The largest difference, relative to the tensor's largest value; NaN counts as infinite."""
    errors = [np.abs(a[n] - b[n]).max() / np.abs(a[n]).max() for n in a if n.startswith(prefix)]
    return float(np.nan_to_num(max(errors), nan=np.inf))
