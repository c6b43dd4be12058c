"""Checkpoints, from which training resumes: the run directory's checkpoints/STEP/.

config.json            as in the run directory
model.safetensors      the parameters
optimizer.safetensors  Adam's state, under canonical names
best.safetensors       the parameters with the lowest validation loss, if there is a validation
                       split
state.json             the position in the run, and the measurements since the last log line
log.jsonl              the log up to this step
SHA256SUMS             the checksums of these files

A checkpoint is written to a temporary folder, synced to the disk and renamed, so that a crash at
any moment leaves the checkpoint before it intact.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common import files, params
from common.errors import InputError
from common.files import SUMS
from common.training.learner import Arrays
from common.training.run_directory import (
    CONFIG,
    MODEL,
    About,
    parse,
    parse_about,
    removed_options,
)

OPTIMIZER, BEST, STATE, LOG = "optimizer.safetensors", "best.safetensors", "state.json", "log.jsonl"
CHECKPOINT_FILES = (CONFIG, MODEL, OPTIMIZER, STATE, LOG)


@dataclass
class State:
    """The position in a run, the content of state.json. There is no random state, because the order
    of the reviews is a function of the seed and the epoch."""

    data: str  # the fingerprint of the data and the word vectors
    implementation: str
    step: int = 0  # steps taken
    epoch: int = 0  # complete epochs
    iteration: int = 0  # steps taken in the current epoch
    seconds: float = 0.0  # training time so far
    first_step_seconds: float | None = None
    best_loss: float | None = None  # the lowest validation loss after an epoch
    epochs_since_best: int = 0
    # Since the last log line: loss and norm of each step, the words that were read, and the time.
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    words: int = 0
    words_seconds: float = 0.0


@dataclass(frozen=True)
class LogLine:
    """A line of log.jsonl, which also contains the loss of each step (step_losses).

    Means are over the steps since the last line. Validation takes place after each epoch.
    """

    epoch: int
    iteration: int
    seconds: float
    loss: float
    gradient_norm: float
    tokens_per_second: float
    validation_loss: float | None = None
    validation_accuracy: float | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read and verified."""

    path: Path
    about: About
    removed_options: dict[str, Any]
    state: State
    parameters: dict[str, np.ndarray]
    optimizer_state: dict[str, np.ndarray]
    best: dict[str, np.ndarray]  # empty without a validation split
    log: bytes  # the content of log.jsonl

    def lines(self) -> Iterator[LogLine]:
        """The lines of the log. Raises InputError for a malformed line."""
        for line in re.finditer(rb".+", self.log):
            yield parse(LogLine, line[0], self.path / LOG)


def save_checkpoint(
    folder: Path, about: About, state: State, parameters: Arrays, optimizer: Arrays, best: Arrays
) -> None:
    """Write a checkpoint and remove all but the last ones (the option `keep`).

    The current log.jsonl is copied. Raises InputError if writing fails; earlier checkpoints are
    then unchanged.
    """
    target = folder / "checkpoints" / f"{state.step:09d}"
    try:
        target.parent.mkdir(exist_ok=True)
        files.sync(folder)
        contents = {
            CONFIG: files.to_json(dataclasses.asdict(about)),
            MODEL: files.to_tensors(parameters),
            OPTIMIZER: files.to_tensors(optimizer),
            STATE: files.to_json(dataclasses.asdict(state)),
            LOG: (folder / LOG).read_bytes(),
        }
        if best:
            contents[BEST] = files.to_tensors(best)
        contents[SUMS] = files.checksums(contents)
        with files.aside(target, ".partial") as partial:
            partial.mkdir()
            for name, content in contents.items():
                (partial / name).write_bytes(content)
                files.sync(partial / name)
            # Checkpoints of this step or later are damaged; otherwise training would have resumed
            # from them.
            for path in _all(folder):
                if path.name >= target.name:
                    files.remove(path)
        for path in _all(folder)[: -about.options.keep]:
            files.remove(path)
    except OSError as error:
        raise InputError(
            f"{target}: cannot be written ({error.strerror}); "
            f"the last checkpoint is {last(folder) or 'none'}"
        ) from None


def newest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The last undamaged checkpoint, or None if there are no checkpoints.

    warn: is called with a line of text for each damaged checkpoint. Raises InputError if all are
    damaged.
    """
    for path in reversed(paths := _all(folder)):
        try:
            return load_checkpoint(path)
        except InputError as error:
            warn(f"warning: {error}; the checkpoint before it is used instead")
    if paths:
        raise InputError(
            f"{folder / 'checkpoints'}: all are damaged, the last in {paths[-1].name}; "
            "--restart replaces it"
        )
    return None


def last(folder: Path) -> Path | None:
    """The last checkpoint, whether or not it is damaged; None if there is none."""
    return next(reversed(_all(folder)), None)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises InputError naming a missing or damaged file."""
    contents = files.read_verified(path, CHECKPOINT_FILES, optional=(BEST,))
    about = parse_about(contents[CONFIG], path / CONFIG)
    state = parse(State, contents[STATE], path / STATE)
    if f"{state.step:09d}" != path.name:
        raise InputError(f"{path / STATE}: is the state of step {state.step}")
    shapes = params.shapes(about.model)
    moments: dict[str, tuple[int, ...]] = {"step": ()}
    removed = removed_options(contents[CONFIG], path / CONFIG)
    for moment in ("first_moment", "second_moment", *(["average"] if "ema" in removed else [])):
        moments |= {f"{moment}.{name}": shape for name, shape in shapes.items()}
    tensors = {
        name: files.parse_tensors(contents[name], path / name, expected)
        for name, expected in ((MODEL, shapes), (OPTIMIZER, moments), (BEST, shapes))
        if name in contents
    }
    arrays = tensors[MODEL], tensors[OPTIMIZER], tensors.get(BEST, {})
    checkpoint = Checkpoint(path, about, removed, state, *arrays, contents[LOG])
    for _ in checkpoint.lines():
        pass  # lines() validates each line
    return checkpoint


def _all(folder: Path) -> list[Path]:
    """The checkpoints in ascending order."""
    try:
        names = os.listdir(folder / "checkpoints")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{folder / 'checkpoints'}: cannot be read ({error.strerror})") from None
    return [folder / "checkpoints" / name for name in sorted(names) if re.fullmatch(r"\d{9}", name)]
