"""The run directory: a trained model with its options and results, the same for both frameworks.

config.json            the options, the model's sizes, the data's classes, the framework, an example
vocabulary.txt         one word per line; the line number is the word's id
vectors.safetensors    vectors [V, D]: the word vectors; with --ngrams, also codes.N and ratios.N
model.safetensors      the canonical parameters: the best ones, or the last
metrics.json           the results on the test split
SHA256SUMS             the checksums of these five files, written last: it marks a finished run
figures/               loss curve and confusion matrix, drawn afterwards from the two JSON files
log.jsonl              the log lines, each with the losses of its steps
.lock                  locked while a process trains in this directory; contains its process id
checkpoints/STEP/      the state after this many steps, from which training resumes (checkpoint.py)

SHA256SUMS has the format of the program sha256sum (sha256sum -c SHA256SUMS). No file that it lists
is used before the checksums of all of them have been verified.

A run directory may come from an untrusted source. It contains JSON, text and safetensors, but no
code. The names of its files are fixed and do not depend on their content. Reading it needs at most
three times the memory of its files, thirty times for vocabulary.txt (a short word as a str), and a
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
from common.errors import InputError, print_error
from common.files import SUMS
from common.metrics import table
from common.params import ModelConfig
from common.training.learner import Arrays
from common.training.options import MODELS, DataConfig, TrainConfig, option

ROOT = Path(__file__).parents[2]
DRAW = ("common.report",)  # python -m common.report RUN_DIR draws the figures
CONFIG, METRICS, VOCABULARY = "config.json", "metrics.json", "vocabulary.txt"
VECTORS, MODEL = "vectors.safetensors", "model.safetensors"
RUN_FILES = (CONFIG, VOCABULARY, VECTORS, MODEL, METRICS)
FORMAT = 2
# The options that may change when a run resumes; the last three are not properties of a run.
MAY_CHANGE = {"epochs", "device", "log_every", "checkpoint_seconds", "keep", "tensorboard"}
MAY_CHANGE |= {"shares"} | {"out", "resume", "restart"}
_LONGEST_METRICS = 2 * 2**20  # bytes; Python objects take twenty times as many
_LONGEST_TYPED_JSON = 2**20  # config.json, state.json, a line of log.jsonl
_MOST_LAYERS, _MOST_NGRAMS = 1000, 10

T = TypeVar("T")


@dataclass(frozen=True)
class _Framework:
    """The field that every config.json has."""

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
    """The content of config.json."""

    model: ModelConfig
    options: TrainConfig
    classes: tuple[str, ...]
    framework: str
    example: str = field(default="", kw_only=True)
    """The words of a text of the data set; the page of the server shows them first."""
    format: int = field(default=FORMAT, kw_only=True)


@dataclass(frozen=True)
class Run(About):
    """The model of a run directory. The id of a word is its index in the vocabulary."""

    vocabulary: list[str]
    vectors: Float[np.ndarray, "V D"]
    parameters: dict[str, np.ndarray]
    ratios: Ratios | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays of the model by name, float32 or int64: the parameters, the word vectors as
        vectors.weight, and those of ratios.tensors()."""
        ratios = self.ratios.tensors() if self.ratios else {}
        named = {"vectors.weight": self.vectors, **self.parameters, **ratios}
        whole = np.dtype(np.int64), np.dtype(np.float32)
        return {n: v.astype(whole[v.dtype.kind == "f"], copy=False) for n, v in named.items()}


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Create the folder of a run and lock it; a crash releases the lock.

    If no file has been written in the folder, all that this function has created is removed again,
    including parent folders. Raises InputError if the folder is not writable, contains a symbolic
    link, through which files elsewhere would be overwritten, or is locked by another process.
    """
    path, figures = folder / ".lock", folder / "figures"
    with files.writing(folder):
        new = [each for each in (path, figures, folder, *folder.parents) if not each.exists()]
        figures.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    contents = {path, *folder.rglob("*")}
    for each in contents:
        if each.is_symlink():
            raise InputError(f"{each}: is a symbolic link, which is not followed")
    with files.writing(path):
        file = path.open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(f"{folder}: is locked by process {file.read(20)}") from None
        with files.writing(path):
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        try:
            yield
        finally:
            # Another process may have created other files in the meantime.
            with contextlib.suppress(OSError):
                for each in new if contents.issuperset(folder.rglob("*")) else ():
                    each.unlink() if each == path else each.rmdir()


def clear(folder: Path) -> None:
    """Remove the run in this folder: first the files that mark it as finished, then the rest."""
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
    """Write the files of a finished run, and their checksums last. If there are metrics, print them
    and draw the figures.

    about: a dataclass with options and classes. tensors: the arrays of each file by its name.
    Raises InputError if a file cannot be written.
    """
    contents = {
        CONFIG: files.to_json(dataclasses.asdict(about)),
        VOCABULARY: "".join(f"{word}\n" for word in words).encode(),
        **{name: files.to_tensors(arrays) for name, arrays in tensors.items()},
        METRICS: files.to_json(metrics),
    }
    contents[SUMS] = files.checksums(contents)
    with files.writing(folder / "figures"):
        files.remove(folder / "figures")  # those of another run, in case drawing fails
    for name, content in contents.items():
        with files.writing(folder / name):
            files.replace(folder / name, content)
    if metrics:
        print(f"{table(metrics)}\nrun directory: {folder}", flush=True)
        draw(folder)


def draw(folder: Path, program: tuple[str, ...] = DRAW) -> bool:
    """Draw the figures of a finished run in a child process; returns whether this succeeded.

    V8 draws the figures, and aborts the process if it gets too little address space. This and any
    other failure is printed as one warning; the run remains valid without figures.

    program: a module and its first arguments; the folder is appended.
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
        if error.returncode < 0:  # V8 prints pages of text before it aborts
            problem = f"the process ended: {signal.strsignal(-error.returncode)}"
        else:
            lines: list[str] = error.stderr.decode(errors="replace").splitlines()
            problem = lines[-1] if lines else f"exit status {error.returncode}"
    except OSError as error:  # the system cannot start another process
        problem = str(error)
    again = shlex.join(["python", "-m", *program, str(folder)])
    print_error(f"warning: {folder}: drawing failed ({problem}); to draw again: {again}")
    return False


def finished(
    folder: Path,
    framework: str,
    options: DataConfig,
    names: tuple[str, ...] = RUN_FILES,
    parse_config: Callable[[bytes, Path], Any] | None = None,
) -> dict[str, Any] | None:
    """The metrics of the finished run with the same options in this folder, or None.

    names: its files. parse_config: parses config.json, by default parse_about.
    """
    try:
        contents = files.read_verified(folder, names)
        about = (parse_config or parse_about)(contents[CONFIG], folder / CONFIG)
        removed = removed_options(contents[CONFIG], folder / CONFIG)
        metrics = files.parse_json(contents[METRICS], folder / METRICS, _LONGEST_METRICS)
    except InputError:
        return None
    # {} is valid: common.convert writes a run that has not been tested.
    if metrics != {} and not (
        isinstance(metrics, dict) and isinstance(metrics.get("accuracy"), float)
    ):
        return None
    different = differences(about.options, options, MAY_CHANGE - {"epochs"})
    is_same = about.framework == framework and not different and not removed
    return metrics if is_same else None


def load_run(folder: Path) -> Run:
    """Read a finished run directory of either framework.

    Raises InputError naming a file that is missing, damaged or inconsistent with the others.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run directory")
    if framework_of(folder) not in ("", *MODELS):
        raise InputError(f"{folder}: holds a linear model, which common.linear.predict reads")
    if not (folder / SUMS).exists() and any(folder.glob("checkpoints/[0-9]*")):
        raise InputError(f"{folder}: this run is not finished; --resume {folder} continues it")
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
    """The framework that config.json names; "" if it cannot be read."""
    with contextlib.suppress(InputError):
        return parse(_Framework, files.read(folder / CONFIG), folder / CONFIG).framework
    return ""


def differences(was: DataConfig, now: DataConfig, free: Set[str] = MAY_CHANGE) -> list[str]:
    """The differences of options other than the free ones, such as "--seed was 0, is 7"."""
    return [
        f"{option(name)} was {value}, is {getattr(now, name)}"
        for name, value in vars(was).items()
        if name not in free and value != getattr(now, name)
    ]


def parse(kind: type[T], content: bytes, path: Path) -> T:
    """Parse JSON as a dataclass. Keys that the class lacks are skipped and take no memory.

    Raises InputError naming the file.
    """
    files.limit(len(content), path, _LONGEST_TYPED_JSON)
    try:
        return msgspec.json.decode(content, type=kind, dec_hook=lambda kind, value: kind(value))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: has unexpected content ({error})") from None


def parse_vocabulary(content: bytes, path: Path) -> list[str]:
    """The words of a vocabulary.txt. Raises InputError naming the file."""
    try:
        words = content.decode().split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error})") from None
    if len({*words}) < len(words) or "" in words:
        raise InputError(f"{path}: expected distinct words, one per line")
    return words


def check_classes(classes: Sequence[str], path: Path) -> None:
    """Raise InputError unless these are valid names of classes."""
    if len({*classes}) < len(classes) or not all(map(str.isprintable, classes)):
        raise InputError(f"{path}: classes: expected distinct printable names")


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
        raise InputError(f"{path}: has format {about.format}; this program reads {FORMAT}")
    check_classes(about.classes, path)
    if len(about.classes) != model.classes:
        raise InputError(f"{path}: classes: expected the names of {model.classes} classes")
    if not 0 <= model.ngrams <= _MOST_NGRAMS:
        raise InputError(f"{path}: model.ngrams {model.ngrams}: must be in 0..{_MOST_NGRAMS}")
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
        raise InputError(f"{path}: model: does not match the options")
    return about
