"""The run directory: everything about a trained model, the same for both frameworks.

config.json            the options, the model's sizes, the data's classes, the framework, an example
vocabulary.txt         a word a line; the line number is the word's id
vectors.safetensors    vectors [V, D]: the word vectors; with --ngrams, codes.N and ratios.N, too
model.safetensors      the canonical parameters: the best ones, or the last
metrics.json           the results on the test split
SHA256SUMS             the checksums of these five, written last: with it, the run is finished
figures/               loss curve and confusion matrix, drawn after that from the two JSON files
log.jsonl              a line for each log line, with the loss of every step
.lock                  locked while a process trains here; holds that process's number
checkpoints/STEP/      what training goes on from after so many steps (checkpoint.py)

SHA256SUMS is what the program of that name (sha256sum -c SHA256SUMS) reads. Where a folder has one,
no byte of the files it lists is used before all of them agree with it.

A run directory may come from anybody. It holds JSON, text and safetensors, nothing that runs; the
names of the files are those above, whatever is written in them. Reading it takes at most three
times the size of its files, thirty times that of vocabulary.txt (a short word as a str), and a
constant.
"""

import contextlib
import dataclasses
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from jaxtyping import Float

from common import files, params
from common.data.ngrams import Ratios
from common.errors import InputError, complain
from common.files import SUMS
from common.metrics import table
from common.params import ModelConfig
from common.training.learner import Arrays
from common.training.options import MODELS, DataConfig, TrainConfig, option

ROOT = Path(__file__).parents[2]
DRAW = ("common.report",)  # python -m common.report RUN_DIR draws its figures
CONFIG, METRICS, VOCABULARY = "config.json", "metrics.json", "vocabulary.txt"
VECTORS, MODEL = "vectors.safetensors", "model.safetensors"
RUN_FILES = (CONFIG, VOCABULARY, VECTORS, MODEL, METRICS)
FORMAT = 2
# A resumed run must not differ in anything else; the last three are no properties of a run.
MAY_CHANGE = {"epochs", "device", "log_every", "checkpoint_seconds", "keep", "tensorboard"}
MAY_CHANGE |= {"shares"} | {"out", "resume", "restart"}
_LONGEST_METRICS = 2 * 2**20  # as Python objects, twenty times as long
_LONGEST_TYPED_JSON = 2**20  # config.json, state.json, a line of log.jsonl
_MOST_LAYERS, _MOST_NGRAMS = 1000, 10

T = TypeVar("T")


@dataclass(frozen=True)
class _Framework:
    """What every config.json holds."""

    framework: str


@dataclass(frozen=True)
class _RemovedOptions:
    """Options of earlier releases, each with a default that had no effect."""

    weight_decay: float = 0.0
    layer_dropout: float = 0.0
    label_smoothing: float = 0.0
    ema: float = 0.0
    schedule: str = "constant"  # only the value cosine was removed


@dataclass(frozen=True)
class _EarlierConfig:
    options: _RemovedOptions = _RemovedOptions()


@dataclass(frozen=True)
class About:
    """What config.json holds."""

    model: ModelConfig
    options: TrainConfig
    classes: tuple[str, ...]
    framework: str
    example: str = field(default="", kw_only=True)
    """The words of a text of the data set, with which the server's page begins."""
    format: int = field(default=FORMAT, kw_only=True)


@dataclass(frozen=True)
class Run(About):
    """A run directory's model, read back. A word's id is its index in the vocabulary."""

    vocabulary: list[str]
    vectors: Float[np.ndarray, "V D"]
    parameters: dict[str, np.ndarray]
    ratios: Ratios | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """Every number of the model by name, float32 or int64: parameters, vectors (the trained
        ones, if any) as vectors.weight, and what ratios.tensors() names."""
        ratios = self.ratios.tensors() if self.ratios else {}
        named = {"vectors.weight": self.vectors, **self.parameters, **ratios}
        whole = np.dtype(np.int64), np.dtype(np.float32)
        return {n: v.astype(whole[v.dtype.kind == "f"], copy=False) for n, v in named.items()}


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Make a run's folder, and keep other processes from working there; a crash lets go of it.

    Where nothing was written in it, what was made here goes again, folders above it included.
    Raises InputError where it cannot be written, where a symbolic link in it would have us write
    somewhere else, and where another process is at it.
    """
    path, figures = folder / ".lock", folder / "figures"
    with files.writing(folder):
        new = [each for each in (path, figures, folder, *folder.parents) if not each.exists()]
        figures.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    there = {path, *folder.rglob("*")}
    for each in there:
        if each.is_symlink():
            raise InputError(f"{each}: is a symbolic link, which is not followed")
    with files.writing(path):
        file = path.open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(f"{folder}: process {file.read(20)} is at work here") from None
        with files.writing(path):
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        try:
            yield
        finally:
            # Another process may have put something beside it.
            with contextlib.suppress(OSError):
                for each in new if there.issuperset(folder.rglob("*")) else ():
                    each.unlink() if each == path else each.rmdir()


def clear(folder: Path) -> None:
    """Forget the run in this folder: what says that it is finished first, then its checkpoints."""
    with files.writing(folder):
        for name in (SUMS, *RUN_FILES, "checkpoints"):
            files.remove(folder / name)


def write(
    folder: Path,
    about: Any,
    words: Sequence[str],
    metrics: dict[str, Any],
    tensors: Mapping[str, Arrays],
) -> None:
    """Write the files of a finished run, tensors by the name of the file, and their checksums last.
    Of a run that was tested, print how good it is and draw its figures.

    about: a dataclass with options and classes. Raises InputError where a file cannot be written.
    """
    contents = {
        CONFIG: files.to_json(dataclasses.asdict(about)),
        VOCABULARY: "".join(f"{word}\n" for word in words).encode(),
        **{name: files.to_tensors(arrays) for name, arrays in tensors.items()},
        METRICS: files.to_json(metrics),
    }
    contents[SUMS] = files.checksums(contents)
    with files.writing(folder / "figures"):
        files.remove(folder / "figures")  # of another run, should this one's not be drawn
    for name, content in contents.items():
        with files.writing(folder / name):
            files.replace(folder / name, content)
    if metrics:
        print(f"{table(metrics)}\nrun directory: {folder}", flush=True)
        draw(folder)


def draw(folder: Path, program: tuple[str, ...] = DRAW) -> bool:
    """Draw the figures of a finished run in a child process; whether that was done.

    The figures are drawn by V8, which aborts the process where it gets too little address space.
    That, and any other failure, costs the figures alone: it is printed as one warning.

    program: a module and its first arguments, which is given the folder.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    try:
        subprocess.run(
            [sys.executable, "-X", "die_with_parent", "-m", *program, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            check=True,
        )
        return True
    except subprocess.CalledProcessError as error:
        if error.returncode < 0:  # V8 writes pages before it aborts
            problem = f"the process ended: {signal.strsignal(-error.returncode)}"
        else:
            lines: list[str] = error.stderr.decode(errors="replace").splitlines()
            problem = lines[-1] if lines else f"exit status {error.returncode}"
    except OSError as error:  # the system cannot start another process
        problem = str(error)
    again = shlex.join(["python", "-m", *program, str(folder)])
    complain(f"warning: {folder}: drawing failed ({problem}); to draw again: {again}")
    return False


def finished(
    folder: Path,
    framework: str,
    options: DataConfig,
    names: tuple[str, ...] = RUN_FILES,
    parse_config: Callable[[bytes, Path], Any] | None = None,
) -> dict[str, Any] | None:
    """The metrics of the finished run of these very options in this folder, if there is one.

    names: its files. parse_config: reads config.json, as parse_about does.
    """
    try:
        contents = files.read_verified(folder, names)
        about = (parse_config or parse_about)(contents[CONFIG], folder / CONFIG)
        removed = removed_options(contents[CONFIG], folder / CONFIG)
        metrics = files.parse_json(contents[METRICS], folder / METRICS, _LONGEST_METRICS)
    except InputError:
        return None
    # {} is legal: common.convert writes a run that has not been tested.
    if metrics != {} and not (
        isinstance(metrics, dict) and isinstance(metrics.get("accuracy"), float)
    ):
        return None
    different = differences(about.options, options, MAY_CHANGE - {"epochs"})
    is_same = about.framework == framework and not different and not removed
    return metrics if is_same else None


def load_run(folder: Path) -> Run:
    """Read a finished run directory of either framework.

    Raises InputError naming the file that is missing or damaged, or does not fit the others.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run directory")
    if framework_of(folder) not in ("", *MODELS):
        raise InputError(f"{folder}: holds a linear model, no GRU (common.linear.predict reads it)")
    if not (folder / SUMS).exists() and any(folder.glob("checkpoints/[0-9]*")):
        raise InputError(f"{folder}: this run is not finished: --resume {folder} goes on with it")
    contents = files.read_verified(folder, RUN_FILES)
    about = parse_about(contents[CONFIG], folder / CONFIG)
    words = parse_vocabulary(contents[VOCABULARY], folder / VOCABULARY)
    orders, width = range(1, about.model.ngrams + 1), params.ratio_columns(about.model.classes)
    shapes: dict[str, tuple[int | None, ...]] = {"vectors": (len(words), about.model.input_size)}
    shapes |= {f"codes.{n}": (None,) for n in orders}
    shapes |= {f"ratios.{n}": (None, width) for n in orders}
    tensors = files.parse_tensors(contents[VECTORS], folder / VECTORS, shapes)
    ratios = Ratios.of(len(words), tensors) if about.model.ngrams else None
    if ratios and (problem := ratios.problem()):
        raise InputError(f"{folder / VECTORS}: {problem}")
    parameters = files.parse_tensors(contents[MODEL], folder / MODEL, params.shapes(about.model))
    return Run(
        **vars(about),
        vocabulary=words,
        vectors=tensors["vectors"],
        parameters=parameters,
        ratios=ratios,
    )


def framework_of(folder: Path) -> str:
    """The framework that config.json names; nothing where it cannot be read."""
    with contextlib.suppress(InputError):
        return parse(_Framework, files.read(folder / CONFIG), folder / CONFIG).framework
    return ""


def differences(was: DataConfig, now: DataConfig, free: Set[str] = MAY_CHANGE) -> list[str]:
    """What, but for the free options, makes another run of them: "--seed was 0, is 7"."""
    return [
        f"{option(name)} was {value}, is {getattr(now, name)}"
        for name, value in vars(was).items()
        if name not in free and value != getattr(now, name)
    ]


def parse(kind: type[T], content: bytes, path: Path) -> T:
    """JSON as a dataclass. What the class does not name is skipped and takes no memory.

    Raises InputError naming the file.
    """
    files.limit(len(content), path, _LONGEST_TYPED_JSON)
    try:
        return msgspec.json.decode(content, type=kind, dec_hook=lambda kind, value: kind(value))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not what it should hold ({error})") from None


def parse_vocabulary(content: bytes, path: Path) -> list[str]:
    """The words of a vocabulary.txt. Raises InputError naming the file."""
    try:
        words = content.decode().split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error})") from None
    if len({*words}) < len(words) or "" in words:
        raise InputError(f"{path}: expected words that differ, one a line")
    return words


def check_classes(classes: Sequence[str], path: Path) -> None:
    """Raise InputError unless these can be the names of classes."""
    if len({*classes}) < len(classes) or not all(map(str.isprintable, classes)):
        raise InputError(f"{path}: classes: expected printable names that differ")


def removed_options(content: bytes, path: Path) -> dict[str, Any]:
    """The options of a config.json that had an effect and that this release no longer has."""
    options = parse(_EarlierConfig, content, path).options
    return {n: v for n, v in vars(options).items() if v not in (0, "constant", "linear")}


def parse_about(content: bytes, path: Path) -> About:
    """Parse a config.json. Raises InputError for values that no run has.

    Options of earlier releases are ignored, because a trained model predicts without them;
    `removed_options` returns them.
    """
    about = parse(About, content.replace(b'"schedule": "cosine"', b'"schedule": "linear"'), path)
    model = about.model
    if about.format != FORMAT:
        raise InputError(f"{path}: format {about.format}, this program knows {FORMAT}")
    check_classes(about.classes, path)
    if len(about.classes) != model.classes:
        raise InputError(f"{path}: classes: expected the names of {model.classes} classes")
    if not 0 <= model.ngrams <= _MOST_NGRAMS:
        raise InputError(f"{path}: model.ngrams {model.ngrams}: not from 0 to {_MOST_NGRAMS}")
    for name in ("input_size", "hidden_size", "num_layers", "classes"):
        if getattr(model, name) < 1:
            raise InputError(f"{path}: model.{name} {getattr(model, name)}: must be at least 1")
    if model.num_layers > _MOST_LAYERS:
        raise InputError(f"{path}: model.num_layers {model.num_layers}: more than {_MOST_LAYERS}")
    if (named := about.options.model) not in MODELS.get(about.framework, ()):
        raise InputError(f"{path}: no model {named!r} in the framework {about.framework!r}")
    try:
        about.options.check_values()
    except InputError as error:
        raise InputError(f"{path}: options: {str(error)!r}") from None
    shape = model.vocabulary_size, model.input_size
    if model != about.options.model_config(shape, model.classes, model.train_vectors):
        raise InputError(f"{path}: model: is not the one that the options describe")
    return about
