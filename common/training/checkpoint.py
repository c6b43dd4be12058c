"""Checkpoints: what training goes on from, in the run directory's checkpoints/STEP/.

config.json            as in the run directory
model.safetensors      the parameters
optimizer.safetensors  Adam's state under canonical names
best.safetensors       the best parameters so far, where there is a validation split
state.json             the place in the run and what has been measured since the last log line
log.jsonl              the log until then
SHA256SUMS             the checksums of these: it ties them together

A checkpoint is written aside, synced to the disk and renamed, so a crash at any moment leaves the
one before it.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import files, params
from common.errors import InputError
from common.files import SUMS
from common.training.run_directory import About, parse, parse_about

CHECKPOINT_FILES = (
    "config.json",
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "log.jsonl",
)
BEST = "best.safetensors"


@dataclass
class State:
    """Where a run stands; what state.json holds. The order of the reviews needs no random state:
    it is a function of the seed and the epoch."""

    data: str
    """The fingerprint of the data and the word vectors."""
    implementation: str
    step: int = 0
    """Steps taken."""
    epoch: int = 0
    """Epochs that are over."""
    iteration: int = 0
    """Steps taken in the epoch that has begun."""
    seconds: float = 0.0
    """Training time so far."""
    first_step_seconds: float | None = None
    losses: list[float] = dataclasses.field(default_factory=list)
    """Of each step since the last log line."""
    gradient_norms: list[float] = dataclasses.field(default_factory=list)
    words: int = 0
    """Words read since the last log line,"""
    words_seconds: float = 0.0
    """in so much time."""
    best_loss: float | None = None
    """The lowest loss on the validation split after an epoch."""
    epochs_since_best: int = 0


@dataclass(frozen=True)
class LogLine:
    """A line of log.jsonl, which also has the loss of every step (step_losses).

    Means are over the steps since the last line. The validation split is read after each epoch.
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
    """A checkpoint, read back and found undamaged."""

    path: Path
    about: About
    state: State
    parameters: dict[str, np.ndarray]
    optimizer_state: dict[str, np.ndarray]
    best: dict[str, np.ndarray] | None
    log: bytes
    """log.jsonl as it was."""

    def lines(self) -> Iterator[LogLine]:
        """The lines of the log. Raises InputError for one that is malformed."""
        for line in re.finditer(rb".+", self.log):
            yield parse(LogLine, line[0], self.path / "log.jsonl")


def save_checkpoint(
    folder: Path,
    about: About,
    state: State,
    parameters: Mapping[str, np.ndarray],
    optimizer_state: Mapping[str, np.ndarray],
    best: Mapping[str, np.ndarray] | None,
    keep: int,
) -> Path:
    """Write a checkpoint and drop all but the last `keep`; returns its folder.

    log.jsonl is copied as it stands. Raises InputError where that fails; the checkpoints before are
    then as they were.
    """
    target = folder / "checkpoints" / f"{state.step:09d}"
    try:
        target.parent.mkdir(exist_ok=True)
        files.sync(folder)
        contents = {
            "config.json": files.to_json(dataclasses.asdict(about)),
            "model.safetensors": files.to_tensors(parameters),
            "optimizer.safetensors": files.to_tensors(optimizer_state),
            "state.json": files.to_json(dataclasses.asdict(state)),
            "log.jsonl": (folder / "log.jsonl").read_bytes(),
        }
        if best is not None:
            contents[BEST] = files.to_tensors(best)
        contents[SUMS] = files.checksums(contents)
        with files.aside(target, ".partial") as partial:
            partial.mkdir()
            for name, content in contents.items():
                (partial / name).write_bytes(content)
                files.sync(partial / name)
            # One of the same step is damaged (else training had gone on from it), and so are later
            # ones.
            for path in _all(folder):
                if path.name >= target.name:
                    files.remove(path)
        for path in _all(folder)[:-keep]:
            files.remove(path)
    except OSError as error:
        raise InputError(
            f"{target}: cannot be written ({error.strerror}); "
            f"the last checkpoint is {last(folder) or 'none'}"
        ) from None
    return target


def newest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The last checkpoint that is not damaged; warn is told, in a line, of each that is.

    None where there are no checkpoints. Raises InputError where all of them are damaged.
    """
    paths = _all(folder)
    for path in reversed(paths):
        try:
            return load_checkpoint(path)
        except InputError as error:
            warn(f"warning: {error}; the checkpoint before it is used instead")
    if paths:
        raise InputError(
            f"{folder / 'checkpoints'}: all are damaged, the last in {paths[-1].name}; "
            "--restart trains anew"
        )
    return None


def last(folder: Path) -> Path | None:
    """The last checkpoint, damaged or not."""
    return next(reversed(_all(folder)), None)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises InputError naming the file that is missing or damaged."""
    contents = files.read_verified(path, CHECKPOINT_FILES, optional=(BEST,))
    about = parse_about(contents["config.json"], path / "config.json")
    state = parse(State, contents["state.json"], path / "state.json")
    if f"{state.step:09d}" != path.name:
        raise InputError(f"{path / 'state.json'}: is that of step {state.step}")

    def tensors(name: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        return files.parse_tensors(contents[name], path / name, shapes)

    shapes = params.shapes(about.model)
    moments: dict[str, tuple[int, ...]] = {"step": ()}
    for moment in ("first_moment", "second_moment"):
        moments |= {f"{moment}.{name}": shape for name, shape in shapes.items()}
    found = Checkpoint(
        path,
        about,
        state,
        tensors("model.safetensors", shapes),
        tensors("optimizer.safetensors", moments),
        tensors(BEST, shapes) if BEST in contents else None,
        contents["log.jsonl"],
    )
    for _ in found.lines():
        pass  # but checked
    return found


def _all(folder: Path) -> list[Path]:
    """The checkpoints, the last one last."""
    try:
        found = os.listdir(folder / "checkpoints")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{folder / 'checkpoints'}: cannot be read ({error.strerror})") from None
    return [folder / "checkpoints" / name for name in sorted(found) if re.fullmatch(r"\d{9}", name)]
