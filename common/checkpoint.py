"""The run directory: everything about a trained model, the same for both frameworks.

config.json            the options, the model's sizes, the data's classes, the framework
vocabulary.txt         a word a line; the line number is the word's id
vectors.safetensors    vectors [V, D]: the word vectors
model.safetensors      the canonical parameters
optimizer.safetensors  Adam's state under canonical names
state.json             epoch and step
log.jsonl              a line for each log line, with the loss of every step
metrics.json           the results on the test split
figures/               loss curve and confusion matrix
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from common import params
from common.config import ModelConfig, TrainConfig
from common.errors import InputError


@dataclass(frozen=True)
class Run:
    """A run directory's model, read back."""

    model: ModelConfig
    options: TrainConfig
    classes: tuple[str, ...]
    framework: str
    words: list[str]
    vectors: Float[np.ndarray, "V D"]
    parameters: dict[str, np.ndarray]


def prepare(folder: Path) -> None:
    """Make the folder of a new run. Raises InputError where it cannot be written."""
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error.strerror})") from None


def save_setup(
    folder: Path,
    options: TrainConfig,
    model: ModelConfig,
    classes: tuple[str, ...],
    framework: str,
    words: list[str],
    vectors: Float[np.ndarray, "V D"],
) -> None:
    """Write what does not change while the model is trained."""
    about = {
        "framework": framework,
        "classes": classes,
        "model": dataclasses.asdict(model),
        "options": dataclasses.asdict(options),
    }
    write_json(folder / "config.json", about)
    (folder / "vocabulary.txt").write_text("".join(f"{w}\n" for w in words), encoding="utf-8")
    _write_tensors(folder / "vectors.safetensors", {"vectors": vectors})


def save_model(
    folder: Path,
    parameters: Mapping[str, np.ndarray],
    optimizer_state: Mapping[str, np.ndarray],
    state: Mapping[str, int],
) -> None:
    """Write the parameters and all that is needed to go on training from them."""
    _write_tensors(folder / "model.safetensors", parameters)
    _write_tensors(folder / "optimizer.safetensors", optimizer_state)
    write_json(folder / "state.json", state)


def load_run(folder: Path) -> Run:
    """Read a run directory of either framework.

    Raises InputError naming the file that is missing or damaged, or does not fit the others.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run directory")
    about = read_json(folder / "config.json")
    try:
        model = ModelConfig(**about["model"])
        options = about["options"]
        out = Path(options.pop("out"))
        betas = tuple(options.pop("betas"))
        options = TrainConfig(**options, out=out, betas=betas)
        classes, framework = tuple(about["classes"]), str(about["framework"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'}: not a run's configuration ({error})") from None
    words = _read(folder / "vocabulary.txt").decode("utf-8", "replace").split("\n")[:-1]
    vectors = _read_tensors(
        folder / "vectors.safetensors", {"vectors": (len(words), model.input_size)}
    )["vectors"]
    parameters = _read_tensors(folder / "model.safetensors", params.shapes(model))
    return Run(model, options, classes, framework, words, vectors, parameters)


def load_optimizer_state(folder: Path, model: ModelConfig) -> dict[str, np.ndarray]:
    """Adam's state of a run. Raises InputError as load_run does."""
    shapes = params.shapes(model)
    expected: dict[str, tuple[int, ...]] = {"step": ()}
    for moment in ("first_moment", "second_moment"):
        expected |= {f"{moment}.{name}": shape for name, shape in shapes.items()}
    return _read_tensors(folder / "optimizer.safetensors", expected)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file, whole or not at all."""
    _replace(path, json.dumps(value, indent=1, default=str).encode())


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises InputError naming it where it is missing or damaged."""
    try:
        return json.loads(_read(path))
    except ValueError as error:
        raise InputError(f"{path}: not a JSON file ({error})") from None


def _write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    aside = path.with_name(path.name + ".partial")
    save_file({name: np.asarray(value, order="C") for name, value in tensors.items()}, aside)
    os.replace(aside, path)


def _read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    _check_file(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from None
    for name in shapes.keys() ^ tensors.keys():
        problem = "is missing" if name in shapes else "is not expected"
        raise InputError(f"{path}: the tensor {name} {problem}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise InputError(f"{path}: {name} has shape {tensors[name].shape}, expected {shape}")
    return tensors


def _read(path: Path) -> bytes:
    _check_file(path)
    return path.read_bytes()


def _check_file(path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _replace(path: Path, content: bytes) -> None:
    aside = path.with_name(path.name + ".partial")
    aside.write_bytes(content)
    os.replace(aside, path)
