"""Another framework's checkpoint as a run directory, in which both twins predict and train on.

A checkpoint holds parameters and nothing else; what they were trained on has to be said: the data
set, whose vocabulary says which words to keep, and the file of word vectors.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common import files, params
from common.errors import InputError
from common.training import checkpoint, run_directory
from common.training.data import fingerprint_of, load_data
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
    """Write the run directory of canonical parameters, as if it had taken no step yet.

    Its options are those of the preset `homework`. `classes` are the names of the outputs in their
    order, where that is not the data set's; `pooling` and `relu` say what the classifier reads.
    Raises InputError where the parameters do not fit that, the word vectors or the classes, for
    data and vectors that cannot be read, and where the folder is not new.
    """
    if "head.weight" not in parameters:
        raise InputError("a GRU without a classifier: a run needs both")
    if "vectors.weight" in parameters:
        raise InputError("has word vectors of its own, and does not say of which words")
    layers, directions = params.structure(parameters)
    H = parameters["gru.0.forward.weight_hh"].shape[1]
    options = TrainConfig(
        model="gru" if len(directions) == 1 else "bigru",
        preset="homework",
        **PRESETS["homework"] | {"hidden_size": H, "num_layers": layers},
        reset_after=reset_after,
        pooling=pooling,
        relu=relu,
        data=data,
        vectors=vectors,
        out=folder,
    )
    options.check()
    reads = parameters["head.weight"].shape[1]
    gives = H * len(directions) * len(pooling.split("+"))
    if reads != gives:
        raise InputError(f"its classifier reads {reads} numbers, --pooling {pooling} gives {gives}")
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: is there already, and not empty")
    found = load_data(options, print)
    D, C = parameters["gru.0.forward.weight_ih"].shape[1], len(parameters["head.bias"])
    matrix = found.vectors.matrix
    if (size := matrix.shape[1]) != D:
        raise InputError(f"its GRU reads vectors of {D} dimensions, those of {vectors} have {size}")
    if len(found.classes) != C:
        raise InputError(f"it has {C} classes, {found.name} has {', '.join(found.classes)}")
    given = list(classes or found.classes)
    if sorted(given) != sorted(found.classes):
        raise InputError(f"--classes {' '.join(given)}: the data has {' '.join(found.classes)}")
    order = [given.index(name) for name in found.classes]
    values = {name: np.asarray(value, np.float32) for name, value in parameters.items()}
    values |= {name: values[name][order] for name in ("head.weight", "head.bias")}
    model = options.model_config(matrix.shape, C, train_vectors=False)
    moments = {"step": np.array(0)} | {
        f"{moment}.{name}": np.zeros_like(value)
        for moment in ("first_moment", "second_moment")
        for name, value in values.items()
    }
    about = run_directory.About(model, options, found.classes, "torch")
    state = checkpoint.State(fingerprint_of(options, found), implementation="")
    with run_directory.lock(folder):
        files.replace(folder / "log.jsonl", b"")
        checkpoint.save_checkpoint(folder, about, state, values, moments, {})
        # For prediction. It has not been tested here: so its metrics are empty.
        tensors = {run_directory.VECTORS: {"vectors": matrix}, run_directory.MODEL: values}
        run_directory.write(folder, about, found.vectors.words, {}, tensors)
