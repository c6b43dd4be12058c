"""Writes a run directory from another framework's checkpoint, for prediction and training.

A checkpoint contains only parameters. The caller provides the training data set, whose vocabulary
selects the words to keep, and the file of word vectors.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import files, params
from common.errors import InputError
from common.training import checkpoint, run_directory
from common.training.data import Data, fingerprint_of, load_data
from common.training.options import PRESETS, TrainConfig


def write_run(
    folder: Path,
    parameters: Mapping[str, np.ndarray],
    reset_after: bool,
    data: str,
    vectors: str,
    classes: Sequence[str] = (),
    pooling: str = "last",
    relu: bool = True,
) -> None:
    """Write a run directory with canonical parameters at step 0.

    The options are those of the preset `homework`. `classes`: the outputs in their order (default:
    the order of the data set); `pooling`, `relu`: the input of the classifier.
    Raises InputError if the parameters do not match these, the word vectors or the classes, if data
    or vectors cannot be read, and if the folder is not empty.
    """
    inputs = {"data": data, "vectors": vectors, "pooling": pooling, "relu": relu}
    options = options_of(parameters, out=folder, reset_after=reset_after, **inputs)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: exists and is not empty")
    dataset = load_data(options, print)
    D, matrix = parameters["gru.0.forward.weight_ih"].shape[1], dataset.vectors.matrix
    if (size := matrix.shape[1]) != D:
        raise InputError(f"the GRU has {D} inputs, the vectors of {vectors} {size} dimensions")
    order = class_order(dataset, len(parameters["head.bias"]), classes)
    values = {name: np.asarray(value, np.float32) for name, value in parameters.items()}
    values |= {name: values[name][order] for name in ("head.weight", "head.bias")}
    model = options.model_config(matrix.shape, len(order), train_vectors=False)
    moments = {"step": np.array(0)} | {
        f"{moment}.{name}": np.zeros_like(value)
        for moment in ("first_moment", "second_moment")
        for name, value in values.items()
    }
    about = run_directory.About(model, options, dataset.classes, "torch")
    state = checkpoint.State(fingerprint_of(options, dataset), implementation="")
    with run_directory.lock(folder):
        files.replace(folder / "log.jsonl", b"")
        checkpoint.save_checkpoint(folder, about, state, values, moments, {})
        # The files for prediction; the metrics are empty, because the model is not tested here.
        tensors = {run_directory.VECTORS: {"vectors": matrix}, run_directory.MODEL: values}
        run_directory.write(folder, about, dataset.vectors.words, {}, tensors)


def options_of(parameters: Mapping[str, np.ndarray], **options: Any) -> TrainConfig:
    """The training options of a model, and those given. Raises InputError if they do not fit."""
    if "head.weight" not in parameters:
        raise InputError("a GRU without a classifier, which a run requires")
    if "vectors.weight" in parameters:
        raise InputError("contains word vectors, but not their words")
    layers, directions = params.structure(parameters)
    H = parameters["gru.0.forward.weight_hh"].shape[1]
    options |= PRESETS["homework"] | {"hidden_size": H, "num_layers": layers}
    model = "gru" if len(directions) == 1 else "bigru"
    config = TrainConfig(model=model, preset="homework", **options)
    config.check()
    head_size = parameters["head.weight"].shape[1]
    features = H * len(directions) * len(config.pooling.split("+"))
    if head_size != features:
        raise InputError(
            f"the classifier has {head_size} inputs, --pooling {config.pooling} has {features}"
        )
    return config


def class_order(dataset: Data, count: int, classes: Sequence[str]) -> list[int]:
    """The output of a model with `count` outputs, `classes`, for each class of the data."""
    if len(dataset.classes) != count:
        expected = ", ".join(dataset.classes)
        raise InputError(f"the model has {count} classes, {dataset.name} has {expected}")
    names = list(classes or dataset.classes)
    if sorted(names) != sorted(dataset.classes):
        raise InputError(f"--classes {' '.join(names)}: the data has {' '.join(dataset.classes)}")
    return [names.index(name) for name in dataset.classes]
