"""The options of a run: dataclasses, their presets, and the command line made from them."""

import argparse
import contextlib
import dataclasses
import inspect
import io
import math
import re
import shutil
import sys
import textwrap
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import tyro
from docstring_parser import parse_from_object
from msgspec import Meta

from common import __version__
from common.data import sources, vectors
from common.errors import InputError
from common.extras import require
from common.params import CELLS, POOLING, ModelConfig, ProductDtype

Device = Literal["auto", "cpu", "cuda", "mps"]
_OWN = tuple(prefix + cell for cell in CELLS for prefix in ("", "bi"))
MODELS = {"torch": (*_OWN, "nn.gru", "nn.bigru"), "jax": _OWN}

# What a number may be is part of its type.
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Positive = Annotated[float, Meta(gt=0, le=sys.float_info.max)]
Decay = Annotated[float, Meta(ge=0, lt=1)]


@dataclass(frozen=True)
class DataConfig:
    """What every training reads, and where it writes."""

    preset: str = "quick"
    """quick, full, best (the best that was found; docs/recipes.md) or homework (the homework's
    recipe); every other option overrides it."""
    data: str = "imdb"
    """The data set: imdb, rt, or KIND:PATH with one of the kinds amazon, dlstudio, csv, tsv, jsonl,
    parquet, text and hf (docs/data.md)."""
    skip_bad_rows: bool = False
    """Leave out, count and report the rows of a table (csv, tsv, jsonl, parquet, hf) that cannot be
    used, in place of ending with the first."""
    train_size: Count | None = 4_000
    """Use only so many training reviews, balanced over the classes; None for all."""
    test_size: Count | None = 1_000
    """Use only so many test reviews, balanced over the classes; None for all."""
    validation_size: Annotated[int, Meta(ge=0)] = 0
    """Hold out so many training reviews, balanced over the classes. A model that is trained in
    epochs reads them after each: the parameters with the lowest loss on them are the ones kept."""
    temperature: bool = False
    """At the end, divide the logits by the temperature that suits the validation reviews best: so
    that the probabilities mean what they say. The answers stay the same."""
    out: Path | None = None
    """The run directory to write; runs/FRAMEWORK-MODEL by default. If a run of the same options was
    interrupted there, it goes on."""
    restart: bool = False
    """Train anew where the run directory holds a run already."""

    def check(self) -> None:
        """Raise InputError for the first value that makes no sense."""
        sources.fingerprint(self.data)
        if self.temperature and not self.validation_size:
            raise InputError("--temperature: needs a --validation-size")
        check_numbers(self)


@dataclass(frozen=True)
class TrainConfig(DataConfig):
    """Train a GRU text classifier."""

    model: str = "gru"
    """A handwritten cell: gru, rnn or another one that was added (docs/extending.md); with bi
    before it, as in bigru, both directions. In PyTorch also nn.gru, nn.bigru (the built-in one)."""
    vectors: str = "word2vec"
    """Word vectors: a file (word2vec .bin or text, gensim .kv, GloVe, fastText .vec, .safetensors;
    see docs/vectors.md), word2vec (trained on the training reviews) or random:DIM."""
    train_vectors: bool = False
    """Train the word vectors with the model instead of keeping them frozen (random: always). A step
    changes those of the batch's words alone, as a sparse Adam does."""
    max_length: Count | None = 200
    """Keep only the last so many known words of a review; None for all."""
    epochs: Count = 3
    """Passes over the training reviews."""
    batch_size: Count = 32
    """Reviews in a batch."""
    hidden_size: Count = 128
    """Size of the hidden state of each direction."""
    num_layers: Count = 1
    """GRU layers on top of each other."""
    reset_after: bool = False
    """Apply the reset gate after the product with the recurrent weights, as nn.GRU does."""
    pooling: str = "last"
    """What the last linear layer reads of the GRU's outputs: the last of each direction, the max or
    the mean over all words; or some of them, as in last+max+mean."""
    relu: bool = True
    """Apply ReLU to that."""
    learning_rate: Positive = 5e-4
    """Adam's step size."""
    betas: tuple[Decay, Decay] = (0.85, 0.9)
    """Adam's decay rates of the two moments."""
    eps: Positive = 1e-8
    """Adam's term against division by zero."""
    warmup: Decay = 0.0
    """The share of all steps over which the learning rate grows from zero."""
    schedule: Literal["constant", "linear"] = "constant"
    """The learning rate after the warmup: constant, or a linear decay to zero."""
    word_dropout: Decay = 0.0
    """Leave out this share of a batch's distinct words, each wherever it stands in the batch."""
    vector_dropout: Decay = 0.0
    """Set this share of the elements of a batch's word vectors to zero."""
    feature_dropout: Decay = 0.0
    """Set this share of the inputs of the last linear layer to zero."""
    ngrams: Annotated[int, Meta(ge=0, le=10)] = 0
    """Read, beside each word's vector, how much the n-grams that end there speak for a class: those
    of one word, of two, and of up to so many (log-count ratios; Wang and Manning 2012). 0: none."""
    class_weights: str = "none"
    """How much a review of each class counts in the loss: none (all the same), balanced (against
    how often it occurs), or numbers in the order of the classes: 1,2.5."""
    clip_norm: Positive | None = 1.0
    """Scale the gradient down to this norm, over all parameters together, where it is longer."""
    patience: Count | None = None
    """Stop after so many epochs without a lower loss on the validation reviews."""
    log_every: Annotated[int, Meta(ge=1, le=10_000)] = 25  # the losses are part of a checkpoint
    """Iterations between two log lines; each reports the mean loss since the last."""
    seed: Annotated[int, Meta(ge=0)] = 0
    """Determines the initial parameters and the order of the reviews."""
    device: Device = "auto"
    """Where to compute; auto takes a GPU if there is one (mps: PyTorch only)."""
    implementation: str = "auto"
    """auto, fused (the CPU kernel), cuda (the GPU kernel), scan, or loop (the equations step by
    step: slow)."""
    dtype: ProductDtype = "float32"
    """bfloat16: multiply in it in the GRU's products; sums and everything else are float32."""
    deterministic: bool = False
    """On a GPU too, the same numbers each time; slower there (the CPU does so anyway)."""
    tensorboard: bool = False
    """Write loss, tokens/s and test accuracy for TensorBoard, too, to OUT/tensorboard."""
    resume: Path | None = None
    """A run directory to go on with: its options are the defaults."""
    checkpoint_seconds: Annotated[float, Meta(ge=0, le=sys.float_info.max)] = 60.0
    """Seconds between two checkpoints; 0: after every step."""
    keep: Count = 3
    """How many checkpoints to keep."""
    shares: Count | None = None
    """Into how many shares each batch is cut, which the workers compute; the numbers depend on it,
    not on the workers. None for one a worker (docs/scale.md)."""

    @property
    def cell(self) -> str:
        """The cell of the model. Raises InputError where there is none of this name."""
        name = self.model.removeprefix("nn.")
        cell = name if name in CELLS else name.removeprefix("bi")
        if cell not in CELLS:
            known = ", ".join(dict.fromkeys(chain(*MODELS.values())))
            raise InputError(f"--model {self.model}: expected one of {known}")
        return cell

    @property
    def scheduled(self) -> bool:
        """Whether the size of a step hangs on how many have been taken, and how many there are."""
        return self.schedule != "constant" or self.warmup > 0

    def plain(self) -> "TrainConfig":
        """Of what has more options: those that a training takes."""
        fields = dataclasses.fields(TrainConfig)
        return TrainConfig(**{field.name: getattr(self, field.name) for field in fields})

    def check(self) -> None:
        if self.tensorboard:
            require("tensorboard", what="--tensorboard: ")
        super().check()
        vectors.check(self.vectors)
        self.check_values()

    def check_values(self) -> None:
        """The part of `check` that reads no file: also for options that come from a file."""
        if self.reset_after and not CELLS[self.cell].reset_gate:
            raise InputError(f"--model {self.model}: has no reset gate")
        if self.dtype == "bfloat16" and self.model not in ("gru", "bigru"):
            raise InputError(f"--model {self.model}: has no --dtype bfloat16")
        ways = self.pooling.split("+")
        if not {*ways} <= {*POOLING} or len({*ways}) < len(ways):
            raise InputError(f"--pooling {self.pooling}: expected some of {'+'.join(POOLING)}")
        if self.class_weights not in ("none", "balanced"):
            try:
                sensible = all(0 < float(n) < math.inf for n in self.class_weights.split(","))
            except ValueError:
                sensible = False
            if not sensible:
                raise InputError(
                    f"--class-weights {self.class_weights}: expected none, balanced, or numbers "
                    "above 0: 1,2.5"
                )
        if self.patience is not None and not self.validation_size:
            raise InputError(f"--patience {self.patience}: needs a --validation-size")

    def model_config(
        self, vectors: tuple[int, ...], classes: int, train_vectors: bool
    ) -> ModelConfig:
        """The model that these options ask for, on word vectors of this shape, [V, D]."""
        builtin = self.model.startswith("nn.")
        return ModelConfig(
            input_size=vectors[1],
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            bidirectional=self.model.removeprefix("nn.") == f"bi{self.cell}",
            reset_after=self.reset_after or builtin,
            classes=classes,
            vocabulary_size=vectors[0],
            train_vectors=train_vectors,
            builtin=builtin,
            pooling=self.pooling,
            relu=self.relu,
            ngrams=self.ngrams,
            cell=self.cell,
            implementation=self.implementation,
            dtype=self.dtype,
        )


def option(field: str) -> str:
    """The command-line spelling of a field: batch_size -> --batch-size."""
    return "--" + field.replace("_", "-")


# The options of each preset that differ from TrainConfig's defaults. docs/recipes.md has the
# measurements by which `quick` and `best` were chosen.
_FULL = dict(
    train_size=None, test_size=None, max_length=400, epochs=4, learning_rate=1e-3, clip_norm=None
)
_TUNED = dict(
    train_vectors=True,
    pooling="last+max+mean",
    relu=False,
    betas=(0.9, 0.99),
    warmup=0.1,
    schedule="linear",
    feature_dropout=0.4,
)
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {**_TUNED, "learning_rate": 5e-3, "epochs": 2},
    "full": _FULL,
    "best": {
        **_FULL,
        **_TUNED,
        "learning_rate": 2e-3,
        "epochs": 2,
        "hidden_size": 256,
        "ngrams": 3,
        "word_dropout": 0.2,
        "vector_dropout": 0.2,
    },
    "homework": {**_FULL, "max_length": None, "batch_size": 1, "log_every": 200},
}

C = TypeVar("C")


def parse_options(options: type[C], prog: str, default: C | None = None) -> C:
    """Read a dataclass of options from the command line with tyro.

    The defaults are those of `default`; without it, those of a DataConfig are its preset's, so
    --help --preset full shows them. --version alone prints it. Raises InputError, in one line, for
    what tyro cannot parse.
    """
    if sys.argv[1:] == ["--version"]:
        print(f"gru-twins {__version__}")
        sys.exit()
    prog = program(prog)
    if default is None and issubclass(options, DataConfig):
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--preset", nargs="?", default="quick", const="quick")
        preset = parser.parse_known_args()[0].preset
        if preset not in PRESETS:
            hint = " (once seed)" if preset == "seed" else ""
            raise InputError(f"--preset {preset}: expected one of {', '.join(PRESETS)}{hint}")
        known = {field.name for field in dataclasses.fields(options)}
        chosen = {name: value for name, value in PRESETS[preset].items() if name in known}
        default = options(preset=preset, **chosen)
    read = partial(tyro.cli, options, prog=prog, description=_about(options))
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return read() if default is None else read(default=default)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # tyro has no supported access to its errors: tyro._errors is private and may change in any
        # release, tyro.extras.get_parser is deprecated. tyro draws a box: a title, the complaint
        # and hints, with a rule after each. Indented by four is what is missing, unknown or perhaps
        # meant. Without a box, all of the text is the complaint.
        title, *rest = re.split("[─-]{5,}", re.sub("[│╮]", " ", complaint.getvalue()))
        message, *hints = rest or [title]
        line = " ".join(message.split())
        others = re.findall(r"^ {6}(--[\w.-]+)", "".join(hints), re.MULTILINE)
        if line.startswith("Missing from"):
            missing = re.findall(r"^ {6}(\S+)", message, re.MULTILINE)
            line = f"missing: {', '.join(missing)}"
            line += f"; unrecognized: {', '.join(others)}" if others else ""
        elif line.startswith("Unrecognized") and others:
            line += f"; did you mean {' or '.join(others)}?"
        raise InputError(f"{line} (see {prog} --help)") from None


def program(otherwise: str) -> str:
    """What a program is called on the command line: gru-twins NAME, or else."""
    return str(sys._xoptions.get("gru_twins", otherwise))


class _Lines(str):
    """Text that tyro leaves in the lines it has."""

    def split(self, *_: Any) -> list[str]:
        return [str(self)]


def _about(options: type) -> _Lines:
    """The description for --help, in lines that fit; and those of the options, each in one line.

    tyro would begin a line where an option's docstring does, and break the description nowhere.
    """
    for each in filter(dataclasses.is_dataclass, options.__mro__):
        fields = each.__dataclass_fields__
        for found in parse_from_object(each).params:
            text = " ".join(str(found.description).split())
            fields[found.arg_name].metadata = MappingProxyType({"help": text})
    fold = textwrap.TextWrapper(min(shutil.get_terminal_size().columns, 100))
    fold.break_on_hyphens = False
    return _Lines("\n\n".join(map(fold.fill, str(inspect.getdoc(options)).split("\n\n"))))


def check_numbers(options: Any) -> None:
    """Raise InputError for the first value that is not what its type says a number may be."""
    try:
        msgspec.convert(vars(options), type(options))
    except msgspec.ValidationError as error:
        [(rule, name)] = re.findall(r"(.+) - at `\$\.(\w+)", str(error).lower())
        raise InputError(f"{option(name)} {getattr(options, name)}: {rule}") from None


def to_arguments(options: DataConfig, default: DataConfig | None = None) -> list[str]:
    """The command line that parses back to these options; without those that are the default's."""
    arguments = []
    for name, value in vars(options).items():
        if default is not None and value == getattr(default, name):
            continue
        if isinstance(value, bool):
            arguments.append(option(name if value else f"no_{name}"))
        else:
            values = value if isinstance(value, tuple) else (value,)
            arguments += [option(name), *map(str, values)]
    return arguments
