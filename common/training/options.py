"""The options of a run: dataclasses, their presets, and the command line made from them."""

import argparse
import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Literal, TypeVar

import tyro

from common.data import sources, vectors
from common.errors import InputError
from common.params import ModelConfig

Device = Literal["auto", "cpu", "cuda", "mps"]
MODELS = {"torch": ("gru", "bigru", "nn.gru", "nn.bigru", "rnn"), "jax": ("gru", "bigru", "rnn")}
MOST_LOG_EVERY = 10_000


@dataclass(frozen=True)
class TrainConfig:
    """Train a GRU text classifier."""

    model: str = "gru"
    """gru, bigru, rnn (handwritten); in PyTorch also nn.gru, nn.bigru (the built-in layer)."""
    preset: str = "quick"
    """quick, full or homework (the homework's recipe); every other option overrides it."""
    data: str = "imdb"
    """The data set: imdb, rt, or KIND:PATH with one of the kinds amazon, dlstudio, csv, tsv, jsonl,
    parquet, text and hf (docs/data.md)."""
    vectors: str = "word2vec"
    """Word vectors: a file (word2vec .bin or text, gensim .kv, GloVe, fastText .vec, .safetensors;
    see docs/vectors.md), word2vec (trained on the training reviews) or random:DIM."""
    train_vectors: bool = False
    """Train the word vectors with the model instead of keeping them frozen (random: always)."""
    train_size: int | None = 4_000
    """Use only so many training reviews, balanced over the classes; None for all."""
    test_size: int | None = 1_000
    """Use only so many test reviews, balanced over the classes; None for all."""
    max_length: int | None = 200
    """Keep only the last so many known words of a review; None for all."""
    epochs: int = 3
    """Passes over the training reviews."""
    batch_size: int = 32
    """Reviews in a batch."""
    hidden_size: int = 128
    """Size of the hidden state of each direction."""
    num_layers: int = 1
    """GRU layers on top of each other."""
    reset_after: bool = False
    """Apply the reset gate after the product with the recurrent weights, as nn.GRU does."""
    learning_rate: float = 5e-4
    """Adam's step size."""
    betas: tuple[float, float] = (0.85, 0.9)
    """Adam's decay rates of the two moments."""
    eps: float = 1e-8
    """Adam's term against division by zero."""
    clip_norm: float | None = 1.0
    """Scale the gradient down to this norm, over all parameters together, where it is longer."""
    validation_size: int = 0
    """Hold out so many training reviews, balanced over the classes, and read them after each epoch:
    the parameters with the lowest loss on them are the ones kept."""
    patience: int | None = None
    """Stop after so many epochs without a lower loss on the validation reviews."""
    log_every: int = 25
    """Iterations between two log lines; each reports the mean loss since the last."""
    seed: int = 0
    """Determines the initial parameters and the order of the reviews."""
    device: Device = "auto"
    """Where to compute; auto takes a GPU if there is one (mps: PyTorch only)."""
    implementation: str = "auto"
    """auto, fused (the CPU kernel), scan, or loop (the equations step by step: slow)."""
    deterministic: bool = False
    """On a GPU too, the same numbers each time; slower there (the CPU does so anyway)."""
    tensorboard: bool = False
    """Write loss, tokens/s and test accuracy for TensorBoard, too, to OUT/tensorboard."""
    out: Path | None = None
    """The run directory to write; runs/FRAMEWORK-MODEL by default. If a run of the same options was
    interrupted there, it goes on."""
    resume: Path | None = None
    """A run directory to go on with: its options are the defaults."""
    restart: bool = False
    """Train anew where the run directory holds a run already."""
    checkpoint_seconds: float = 60.0
    """Seconds between two checkpoints; 0: after every step."""
    keep: int = 3
    """How many checkpoints to keep."""

    @property
    def cell(self) -> Literal["gru", "rnn"]:
        """What recurs in the model."""
        return "rnn" if self.model == "rnn" else "gru"

    def check(self) -> None:
        """Raise InputError for the first value that makes no sense."""
        if self.tensorboard and find_spec("tensorboardX") is None:
            raise InputError('--tensorboard: needs tensorboardX: pip install -e ".[tensorboard]"')
        sources.fingerprint(self.data)
        vectors.check(self.vectors)
        if self.model not in MODELS["torch"]:
            raise InputError(f"--model {self.model}: expected one of {', '.join(MODELS['torch'])}")
        if self.model == "rnn" and self.reset_after:
            raise InputError("--model rnn: has no reset gate")
        for rule, (holds, names) in _RULES.items():
            for name in names.split():
                value = getattr(self, name)
                numbers = value if isinstance(value, tuple) else (value,)
                if not all(number is None or holds(number) for number in numbers):
                    raise InputError(f"{option(name)} {' '.join(map(str, numbers))}: {rule}")
        if self.patience is not None and not self.validation_size:
            raise InputError(f"--patience {self.patience}: needs a --validation-size")

    def model_config(
        self, *, input_size: int, classes: int, vocabulary_size: int, train_vectors: bool
    ) -> ModelConfig:
        """The model that these options ask for, on vectors of input_size dimensions."""
        builtin = self.model.startswith("nn.")
        return ModelConfig(
            input_size=input_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            bidirectional=self.model.endswith("bigru"),
            reset_after=self.reset_after or builtin,
            classes=classes,
            vocabulary_size=vocabulary_size,
            train_vectors=train_vectors,
            builtin=builtin,
            cell=self.cell,
            implementation=self.implementation,
        )


def option(field: str) -> str:
    """The command-line spelling of a field: batch_size -> --batch-size."""
    return "--" + field.replace("_", "-")


# What each preset changes; the defaults of TrainConfig are those of quick.
PRESETS: dict[str, dict] = {
    "quick": {},
    "full": {
        "clip_norm": None,
        "train_size": None,
        "test_size": None,
        "max_length": 400,
        "epochs": 4,
        "learning_rate": 1e-3,
    },
    "homework": {
        "clip_norm": None,
        "train_size": None,
        "test_size": None,
        "max_length": None,
        "epochs": 4,
        "batch_size": 1,
        "learning_rate": 1e-3,
        "log_every": 200,
    },
}

# The rules for numbers, in words: the rule itself, and the fields that keep it or, where they may
# be, are None.
_RULES: dict[str, tuple[Callable[[float], bool], str]] = {
    "must be at least 1": (
        lambda number: number >= 1,
        "epochs batch_size hidden_size num_layers log_every keep",
    ),
    # The losses in between are part of a checkpoint.
    f"must be at most {MOST_LOG_EVERY}": (lambda number: number <= MOST_LOG_EVERY, "log_every"),
    "must be at least 1, or None": (lambda number: number >= 1, "patience"),
    "must not be negative": (lambda number: number >= 0, "validation_size seed"),
    "must be finite, 0 or more": (lambda number: 0 <= number < inf, "checkpoint_seconds"),
    "must be positive and finite, or None": (lambda number: 0 < number < inf, "clip_norm"),
    "must be at least 1, or None for all": (
        lambda number: number >= 1,
        "train_size test_size max_length",
    ),
    "must be positive and finite": (lambda number: 0 < number < inf, "learning_rate eps"),
    "must be in [0, 1)": (lambda number: 0 <= number < 1, "betas"),
}

C = TypeVar("C")


def parse_options(
    options: type[C], prog: str, args: Sequence[str] | None = None, default: C | None = None
) -> C:
    """Read a dataclass of options from the command line (sys.argv by default) with tyro.

    The defaults are those of `default`; without it, where the dataclass has a field `preset`, that
    preset's values, so --help --preset full shows them. Raises InputError, in one line, for what
    tyro cannot parse.
    """
    args = list(sys.argv[1:] if args is None else args)
    known = {field.name for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    if default is None and "preset" in known:
        preset = _preset(args)
        values = {key: value for key, value in PRESETS[preset].items() if key in known}
        default = options(preset=preset, **values)  # type: ignore[call-arg]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            if default is None:
                return tyro.cli(options, prog=prog, args=args)
            return tyro.cli(options, prog=prog, args=args, default=default)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # tyro draws a box: a title, the complaint and hints, with a rule after each.
        _, message, *_ = re.split("[─-]{5,}", complaint.getvalue())
        raise InputError(
            f"{' '.join(re.sub('[│╮]', ' ', message).split())} (see {prog} --help)"
        ) from None


def _preset(args: Sequence[str]) -> str:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?", default="quick", const="quick")
    preset = parser.parse_known_args(args)[0].preset
    if preset == "seed":
        raise InputError("--preset seed: is called homework now")
    if preset not in PRESETS:
        raise InputError(f"--preset {preset}: expected one of {', '.join(PRESETS)}")
    return preset


def to_arguments(options: TrainConfig) -> list[str]:
    """The command line that parses back to these options."""
    arguments = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, bool):
            arguments.append(option(field.name) if value else f"--no-{option(field.name)[2:]}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            arguments += [option(field.name), *map(str, values)]
    return arguments
