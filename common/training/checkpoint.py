"""The run directory: everything about a trained model, the same for both frameworks.

config.json            the options, the model's sizes, the data's classes, the framework
vocabulary.txt         a word a line; the line number is the word's id
vectors.safetensors    vectors [V, D]: the word vectors
model.safetensors      the canonical parameters: the best ones, or the last
metrics.json           the results on the test split
SHA256SUMS             the checksums of these five, written last: with it, the run is finished
figures/               loss curve and confusion matrix
log.jsonl              a line for each log line, with the loss of every step
.lock                  locked while a process trains here; holds that process's number
checkpoints/STEP/      what training goes on from after so many steps:
    config.json            as above
    model.safetensors      the parameters
    optimizer.safetensors  Adam's state under canonical names
    best.safetensors       the best parameters so far, where there is a validation split
    state.json             the place in the run and what has been measured since the last log line
    log.jsonl              the log until then
    SHA256SUMS             the checksums of these: it ties them together

SHA256SUMS is what the program of that name (sha256sum -c SHA256SUMS) reads. Where a folder has one,
no byte of the files it lists is used before all of them agree with it. A checkpoint is written
aside, synced to the disk and renamed, so a crash at any moment leaves the one before it.

A run directory may come from anybody. It holds JSON, text and safetensors, nothing that runs; the
names of the files are those above, whatever is written in them. Reading it takes no more memory
than the size of its files plus a constant: arrays are views of what was read, words and log lines
are looked up in it, and only what is of limited length is parsed as a whole.
"""

import dataclasses
import fcntl
import hashlib
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from jaxtyping import Float
from safetensors.numpy import save

from common import params
from common.errors import InputError
from common.files import Bytes, limit, parse_json, read, replace, sync, to_json, write, writing
from common.params import ModelConfig
from common.training.options import TrainConfig, option

SUMS = "SHA256SUMS"
RUN_FILES = (
    "config.json",
    "vocabulary.txt",
    "vectors.safetensors",
    "model.safetensors",
    "metrics.json",
)
CHECKPOINT_FILES = (
    "config.json",
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "log.jsonl",
)
BEST = "best.safetensors"
FORMAT = 2  # 1 had no checksums and no checkpoints
# A resumed run must not differ in anything else.
MAY_CHANGE = {"epochs", "device", "log_every", "checkpoint_seconds", "keep", "tensorboard"}
_NEITHER_HERE_NOR_THERE = {"out", "resume", "restart"}  # not properties of a run
_LONGEST_METRICS = 2 * 2**20  # as Python objects, twenty times as long
_LONGEST_TYPED_JSON = 2**20  # config.json, state.json, a line of log.jsonl
_LONGEST_HEADER = 4 * 2**20  # of a safetensors file
_LONGEST_WORD = 2**20
_MOST_LAYERS = 1000

T = TypeVar("T")


@dataclass(frozen=True)
class About:
    """What config.json holds."""

    framework: str
    classes: tuple[str, ...]
    model: ModelConfig
    options: TrainConfig
    format: int = 1


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
    log: Bytes
    """log.jsonl as it was."""

    def lines(self) -> list[LogLine]:
        """The lines of the log."""
        return list(_log_lines(self.log, self.path / "log.jsonl"))


@dataclass(frozen=True)
class Vocabulary:
    """The words of a run and their ids, the numbers of their lines in vocabulary.txt.

    It keeps the file as it is: a short word in a list and a dict takes fifty times its length.
    """

    lines: Bytes

    def __len__(self) -> int:
        return self.lines.count(b"\n")

    def ids(self, words: Iterable[str]) -> dict[str, int]:
        """Those of these words that are in the vocabulary, with their ids."""
        wanted = {word.encode(errors="replace"): word for word in words}
        found = ((line[1], number) for number, line in enumerate(self._matches()))
        return {wanted[word]: number for word, number in found if word in wanted}

    def words(self, ids: Iterable[int]) -> list[str]:
        """The words of these ids, in their order."""
        ids = list(ids)
        wanted = set(ids)
        found = {n: line[1] for n, line in enumerate(self._matches()) if n in wanted}
        return [found[number].decode(errors="replace") for number in ids]

    def longest(self) -> int:
        """The most bytes of a word."""
        return max((line.end() - line.start() - 1 for line in self._matches()), default=0)

    def _matches(self) -> Iterator[re.Match[bytes]]:
        return re.finditer(rb"(.*)\n", self.lines)


@dataclass(frozen=True)
class Run:
    """A run directory's model, read back."""

    model: ModelConfig
    options: TrainConfig
    classes: tuple[str, ...]
    framework: str
    vocabulary: Vocabulary
    vectors: Float[np.ndarray, "V D"]
    parameters: dict[str, np.ndarray]


def prepare(folder: Path) -> None:
    """Make the folder of a new run. Raises InputError where it cannot be written, or where a
    symbolic link in it would have us write somewhere else."""
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.unlink(missing_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error.strerror})") from None
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            if Path(parent, name).is_symlink():
                raise InputError(f"{Path(parent, name)}: is a symbolic link, which is not followed")


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep other processes from training in this folder; a crash lets go of it.

    Raises InputError where another process is at it.
    """
    path = folder / ".lock"
    with writing(path):
        file = path.open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(f"{folder}: process {file.read(20)} is at work here") from None
        with writing(path):
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


def clear(folder: Path) -> None:
    """Forget the run in this folder: what says that it is finished first, then its checkpoints."""
    with writing(folder):
        for name in (SUMS, *RUN_FILES):
            (folder / name).unlink(missing_ok=True)
        if (folder / "checkpoints").exists():
            shutil.rmtree(folder / "checkpoints")


def finish(
    folder: Path,
    about: About,
    words: list[str],
    vectors: Float[np.ndarray, "V D"],
    parameters: Mapping[str, np.ndarray],
    metrics: Mapping[str, Any],
) -> None:
    """Write what a finished run leaves. Raises InputError where that fails."""
    files = {
        "config.json": to_json(dataclasses.asdict(about)),
        "vocabulary.txt": "".join(f"{word}\n" for word in words).encode(),
        "vectors.safetensors": _pack({"vectors": vectors}),
        "model.safetensors": _pack(parameters),
        "metrics.json": to_json(metrics),
    }
    files[SUMS] = _sums(files)
    for name, content in files.items():
        with writing(folder / name):
            replace(folder / name, content)


def finished(folder: Path, framework: str, options: TrainConfig) -> dict[str, Any] | None:
    """The metrics of the finished run of these very options in this folder, if there is one."""
    try:
        files = _verified(folder, RUN_FILES)
        about = _about(files["config.json"], folder / "config.json")
        metrics = parse_json(files["metrics.json"], folder / "metrics.json", _LONGEST_METRICS)
    except InputError:
        return None
    same = about.framework == framework and not _differences(about.options, options, {"epochs"})
    return metrics if same and about.options.epochs == options.epochs else None


def load_run(folder: Path) -> Run:
    """Read a finished run directory of either framework.

    Raises InputError naming the file that is missing or damaged, or does not fit the others.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run directory")
    if (folder / SUMS).exists():
        files = _verified(folder, RUN_FILES)
    elif _numbers(folder):
        raise InputError(f"{folder}: this run is not finished: --resume {folder} goes on with it")
    else:  # of an earlier version
        files = {name: read(folder / name) for name in RUN_FILES[:-1]}
    about = _about(files["config.json"], folder / "config.json")
    if about.format == FORMAT and SUMS not in os.listdir(folder):
        raise InputError(f"{folder / SUMS}: is missing")
    model = about.model
    vocabulary = Vocabulary(files["vocabulary.txt"])
    limit(vocabulary.longest(), folder / "vocabulary.txt", _LONGEST_WORD)
    shape = (len(vocabulary), model.input_size)
    path = folder / "vectors.safetensors"
    vectors = _unpack(files["vectors.safetensors"], path, {"vectors": shape})["vectors"]
    path = folder / "model.safetensors"
    parameters = _unpack(files["model.safetensors"], path, params.shapes(model))
    return Run(
        model, about.options, about.classes, about.framework, vocabulary, vectors, parameters
    )


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
    place = folder / "checkpoints"
    target = place / f"{state.step:09d}"
    aside = place / ".partial"
    try:
        place.mkdir(exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        files = {
            "config.json": to_json(dataclasses.asdict(about)),
            "model.safetensors": _pack(parameters),
            "optimizer.safetensors": _pack(optimizer_state),
            "state.json": to_json(dataclasses.asdict(state)),
            "log.jsonl": (folder / "log.jsonl").read_bytes(),
        }
        if best is not None:
            files[BEST] = _pack(best)
        files[SUMS] = _sums(files)
        for name, content in files.items():
            write(aside / name, content)
        sync(aside)
        # One of the same step is damaged (else training had gone on from it), and so are later
        # ones.
        for path in _numbers(folder):
            if path.name >= target.name:
                shutil.rmtree(path)
        aside.rename(target)
        sync(place)
        sync(folder)
        for path in _numbers(folder)[:-keep]:
            shutil.rmtree(path)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise InputError(
            f"{target}: cannot be written ({error.strerror}); "
            f"the last checkpoint is {last(folder) or 'none'}"
        ) from None
    return target


def newest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The last checkpoint that is not damaged; warn is told, in a line, of each that is.

    None where there are no checkpoints. Raises InputError where all of them are damaged.
    """
    paths = _numbers(folder)
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
    return next(reversed(_numbers(folder)), None)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises InputError naming the file that is missing or damaged."""
    files = _verified(path, CHECKPOINT_FILES, optional=(BEST,))
    about = _about(files["config.json"], path / "config.json")
    state = _parse(State, files["state.json"], path / "state.json")
    if f"{state.step:09d}" != path.name:
        raise InputError(f"{path / 'state.json'}: is that of step {state.step}")
    for _ in _log_lines(files["log.jsonl"], path / "log.jsonl"):
        pass  # but checked
    shapes = params.shapes(about.model)
    moments: dict[str, tuple[int, ...]] = {"step": ()}
    for moment in ("first_moment", "second_moment"):
        moments |= {f"{moment}.{name}": shape for name, shape in shapes.items()}
    return Checkpoint(
        path,
        about,
        state,
        _unpack(files["model.safetensors"], path / "model.safetensors", shapes),
        _unpack(files["optimizer.safetensors"], path / "optimizer.safetensors", moments),
        _unpack(files[BEST], path / BEST, shapes) if BEST in files else None,
        files["log.jsonl"],
    )


def check_same(saved: Checkpoint, options: TrainConfig) -> None:
    """Raise InputError, naming what differs, unless a run of `options` may go on from there."""
    differences = _differences(saved.about.options, options)
    if differences:
        raise InputError(
            f"{saved.path.parents[1]}: holds another run: {', '.join(differences)}; "
            "--restart trains anew in its place"
        )


def _differences(was: TrainConfig, now: TrainConfig, strict: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    free = (MAY_CHANGE | _NEITHER_HERE_NOR_THERE) - strict
    fields = [field.name for field in dataclasses.fields(TrainConfig) if field.name not in free]
    return [
        f"{option(name)} was {getattr(was, name)}, is {getattr(now, name)}"
        for name in fields
        if getattr(was, name) != getattr(now, name)
    ]


def fingerprint(*parts: np.ndarray | bytes) -> str:
    """A hash of arrays and bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return digest.hexdigest()


def _parse(kind: type[T], content: Bytes, path: Path, longest: int = _LONGEST_TYPED_JSON) -> T:
    """JSON as a dataclass. What the class does not name is skipped and takes no memory."""
    limit(len(content), path, longest)
    try:
        return msgspec.json.decode(content, type=kind, dec_hook=lambda kind, value: kind(value))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not what it should hold ({error})") from None


def _log_lines(log: Bytes, path: Path) -> Iterator[LogLine]:
    for line in re.finditer(rb".+", log):
        limit(line.end() - line.start(), path, _LONGEST_TYPED_JSON)
        yield _parse(LogLine, line[0], path)


def _about(content: Bytes, path: Path) -> About:
    about = _parse(About, content, path)
    model = about.model
    if about.format not in (1, FORMAT):
        raise InputError(f"{path}: format {about.format}, this program knows 1 and {FORMAT}")
    if len(about.classes) != model.classes or not all(map(str.isprintable, about.classes)):
        raise InputError(f"{path}: classes: expected the names of {model.classes} classes")
    for name in ("input_size", "hidden_size", "num_layers", "classes"):
        if getattr(model, name) < 1:
            raise InputError(f"{path}: model.{name} {getattr(model, name)}: must be at least 1")
    if model.num_layers > _MOST_LAYERS:
        raise InputError(f"{path}: model.num_layers {model.num_layers}: more than {_MOST_LAYERS}")
    if about.options.max_length is not None and about.options.max_length < 1:
        raise InputError(f"{path}: options.max_length {about.options.max_length}: below 1")
    return about


def _pack(tensors: Mapping[str, np.ndarray]) -> bytes:
    return save({name: np.asarray(value, order="C") for name, value in tensors.items()})


@dataclass(frozen=True)
class _Tensor:
    """What the header of a safetensors file says of a tensor."""

    dtype: str = ""
    shape: tuple[int, ...] = ()
    data_offsets: tuple[int, int] = (0, 0)


def _unpack(
    content: bytearray, path: Path, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, as views of its content.

    The library's own reader copies all of them, which takes the size of the file again.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    if not 8 < start <= len(content):
        raise InputError(f"{path}: not a safetensors file")
    limit(start, path, _LONGEST_HEADER)
    header = _parse(dict[str, _Tensor], content[8:start], path, _LONGEST_HEADER)
    header.pop("__metadata__", None)
    for name in shapes.keys() ^ header.keys():
        problem = "is missing" if name in shapes else "is not expected"
        raise InputError(f"{path}: the tensor {name} {problem}")
    tensors = {}
    # In canonical order, not the file's: sums over all parameters (the norm of the gradient) depend
    # on it in the last bit.
    for name, shape in shapes.items():
        about = header[name]
        if about.shape != shape:
            raise InputError(f"{path}: {name} has shape {about.shape}, expected {shape}")
        kinds = ("I32", "I64") if name == "step" else ("F32", "F64")
        if about.dtype not in kinds:
            raise InputError(f"{path}: {name} is {about.dtype}, expected {' or '.join(kinds)}")
        dtype = np.dtype(f"<{about.dtype[0].lower()}{int(about.dtype[1:]) // 8}")
        begin, end = (start + offset for offset in about.data_offsets)
        size = math.prod(shape)
        if not start <= begin <= end <= len(content) or end - begin != size * dtype.itemsize:
            raise InputError(f"{path}: {name} does not lie where the header says")
        value = np.frombuffer(content, dtype, size, begin).reshape(shape)
        # Of the extremes alone: isfinite of all would take memory, too. NaN is both.
        if not value.flags.aligned or (size and not np.isfinite([value.min(), value.max()]).all()):
            raise InputError(f"{path}: {name} is not all finite numbers")
        tensors[name] = value
    return tensors


def _sums(files: Mapping[str, Bytes]) -> bytes:
    lines = (f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files))
    return "".join(lines).encode()


def _verified(
    folder: Path, names: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, bytearray]:
    """The content of the files, if it is what SHA256SUMS says.

    Raises InputError naming the file that is not.
    """
    said = read(folder / SUMS, 2**16)
    names += tuple(name for name in optional if f"  {name}\n".encode() in said)
    files = {name: read(folder / name) for name in names}
    expected = _sums(files)
    if said != expected:
        pairs = zip(said.splitlines(), expected.splitlines(), strict=False)
        differing = [ours for theirs, ours in pairs if theirs[:64] != ours[:64]]
        # With most lines right, the others name the damaged file; else SHA256SUMS itself is it.
        name = differing[0][66:].decode() if len(differing) == 1 else SUMS
        raise InputError(f"{folder / name}: damaged (its SHA-256 is not that in {SUMS})")
    return files


def _numbers(folder: Path) -> list[Path]:
    """The checkpoints, the last one last."""
    try:
        found = os.listdir(folder / "checkpoints")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{folder / 'checkpoints'}: cannot be read ({error.strerror})") from None
    return [folder / "checkpoints" / name for name in sorted(found) if re.fullmatch(r"\d{9}", name)]
