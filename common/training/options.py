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
_HANDWRITTEN = tuple(prefix + cell for cell in CELLS for prefix in ("", "bi"))
MODELS = {"torch": (*_HANDWRITTEN, "nn.gru", "nn.bigru"), "jax": _HANDWRITTEN}

# The range of a number is part of its type.
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Positive = Annotated[float, Meta(gt=0, le=sys.float_info.max)]
Decay = Annotated[float, Meta(ge=0, lt=1)]


@dataclass(frozen=True)
class DataConfig:
    """The data that a training reads, and the directory that it writes."""

    preset: str = "quick"
    """quick, full, best (the most accurate; docs/recipes.md) or homework (the homework's recipe).
    Other options override it."""
    data: str = "imdb"
    """The data set: imdb, rt, or KIND:PATH with one of the kinds amazon, dlstudio, csv, tsv, jsonl,
    parquet, text and hf (docs/data.md)."""
    skip_bad_rows: bool = False
    """Skip, count and report unusable rows of a table (csv, tsv, jsonl, parquet, hf) instead of
    stopping at the first one."""
    train_size: Count | None = 4_000
    """The number of training reviews to use, balanced over the classes; None: all."""
    test_size: Count | None = 1_000
    """The number of test reviews to use, balanced over the classes; None: all."""
    validation_size: Annotated[int, Meta(ge=0)] = 0
    """The number of training reviews to hold out, balanced over the classes. A model that is
    trained in epochs is validated on them after each; the parameters with the lowest validation
    loss are kept."""
    temperature: bool = False
    """After training, calibrate the probabilities: divide the logits by the temperature that
    minimizes the validation loss. The predicted classes do not change."""
    out: Path | None = None
    """The run directory to write; runs/FRAMEWORK-MODEL by default. A run with the same options that
    was interrupted there is continued."""
    restart: bool = False
    """Replace the run that the run directory holds."""

    def check(self) -> None:
        """Raise InputError for the first invalid value."""
        sources.fingerprint(self.data)
        if self.temperature and not self.validation_size:
            raise InputError("--temperature: needs a --validation-size")
        check_numbers(self)


@dataclass(frozen=True)
class TrainConfig(DataConfig):
    """Train a GRU text classifier."""

    model: str = "gru"
    """A handwritten cell: gru, rnn or one that you have added (docs/extending.md). The prefix bi,
    as in bigru, makes it bidirectional. In PyTorch also the built-in nn.gru and nn.bigru."""
    vectors: str = "word2vec"
    """Word vectors: a file (word2vec .bin or text, gensim .kv, GloVe, fastText .vec, .safetensors;
    see docs/vectors.md), word2vec (trained on the training reviews) or random:DIM."""
    train_vectors: bool = False
    """Train the word vectors with the model; random vectors are always trained. A step updates only
    the vectors of the words in its batch (sparse Adam)."""
    max_length: Count | None = 200
    """The number of words of a review to read, the last ones with a vector; None: all."""
    epochs: Count = 3
    """The number of passes over the training reviews."""
    batch_size: Count = 32
    """The number of reviews in a batch."""
    hidden_size: Count = 128
    """The size of the hidden state of each direction."""
    num_layers: Count = 1
    """The number of stacked layers."""
    reset_after: bool = False
    """Apply the reset gate after the product with the recurrent weights, as in nn.GRU."""
    pooling: str = "last"
    """The inputs of the last linear layer: the last output of each direction, the max or the mean
    of the outputs over all words, or several of these, as in last+max+mean."""
    relu: bool = True
    """Apply ReLU to these inputs."""
    learning_rate: Positive = 5e-4
    """Adam's learning rate."""
    betas: tuple[Decay, Decay] = (0.85, 0.9)
    """Adam's decay rates for the first and the second moment."""
    eps: Positive = 1e-8
    """The term of Adam that prevents a division by zero."""
    warmup: Decay = 0.0
    """The share of all steps over which the learning rate grows from zero."""
    schedule: Literal["constant", "linear"] = "constant"
    """The learning rate after the warmup: constant, or a linear decay to zero."""
    word_dropout: Decay = 0.0
    """Drop this share of the distinct words of a batch, each at all of its positions."""
    vector_dropout: Decay = 0.0
    """Set this share of the elements of the word vectors of a batch to zero."""
    feature_dropout: Decay = 0.0
    """Set this share of the inputs of the last linear layer to zero."""
    ngrams: Annotated[int, Meta(ge=0, le=10)] = 0
    """N: append to each word vector the log-count ratios of the 1- to N-grams that end at the word
    (Wang and Manning 2012). 0: none."""
    class_weights: str = "none"
    """The weight of each class in the loss: none (equal weights), balanced (inversely proportional
    to the number of its reviews), or numbers in the order of the classes: 1,2.5."""
    clip_norm: Positive | None = 1.0
    """The largest norm of the gradient over all parameters; a larger gradient is scaled down."""
    patience: Count | None = None
    """The number of epochs without a lower validation loss after which training stops."""
    log_every: Annotated[int, Meta(ge=1, le=10_000)] = 25  # the losses are part of a checkpoint
    """The number of iterations between two log lines, which report the mean loss in between."""
    seed: Annotated[int, Meta(ge=0)] = 0
    """The seed of the initial parameters, the order of the reviews and dropout."""
    device: Device = "auto"
    """The device; auto selects a GPU if one is available (mps: PyTorch only)."""
    implementation: str = "auto"
    """auto, fused (the CPU kernel), cuda (the GPU kernel), scan (operations of the framework), or
    loop (the equations, one time step after the other; slow)."""
    dtype: ProductDtype = "float32"
    """The dtype of the factors of the GRU's matrix products; everything else is float32."""
    deterministic: bool = False
    """Make results reproducible on a GPU, too, which is slower; on the CPU, they always are."""
    tensorboard: bool = False
    """Also write loss, tokens/s and test accuracy to OUT/tensorboard, for TensorBoard."""
    resume: Path | None = None
    """The run directory of a run to continue; its options become the defaults."""
    checkpoint_seconds: Annotated[float, Meta(ge=0, le=sys.float_info.max)] = 60.0
    """The time between two checkpoints in seconds; 0: a checkpoint after every step."""
    keep: Count = 3
    """The number of checkpoints to keep."""
    shares: Count | None = None
    """The number of shares into which each batch is divided among the workers. The results depend
    on it, but not on the number of workers. None: one share per worker (docs/scale.md)."""

    @property
    def cell(self) -> str:
        """The cell of the model. Raises InputError for an unknown model."""
        name = self.model.removeprefix("nn.")
        cell = name if name in CELLS else name.removeprefix("bi")
        if cell not in CELLS:
            known = ", ".join(dict.fromkeys(chain(*MODELS.values())))
            raise InputError(f"--model {self.model}: expected one of {known}")
        return cell

    @property
    def scheduled(self) -> bool:
        """Whether the learning rate depends on the step and on the total number of steps."""
        return self.schedule != "constant" or self.warmup > 0

    def plain(self) -> "TrainConfig":
        """The options of training alone, for an instance of a subclass."""
        fields = dataclasses.fields(TrainConfig)
        return TrainConfig(**{field.name: getattr(self, field.name) for field in fields})

    def check(self) -> None:
        if self.tensorboard:
            require("tensorboard", what="--tensorboard: ")
        super().check()
        vectors.check(self.vectors)
        self.check_values()

    def check_values(self) -> None:
        """The part of `check` that reads no file; for options from a config.json, too."""
        if self.reset_after and not CELLS[self.cell].reset_gate:
            raise InputError(f"--model {self.model}: has no reset gate")
        if self.dtype == "bfloat16" and self.model not in ("gru", "bigru"):
            raise InputError(f"--model {self.model}: has no --dtype bfloat16")
        poolings = self.pooling.split("+")
        if not {*poolings} <= {*POOLING} or len({*poolings}) < len(poolings):
            raise InputError(f"--pooling {self.pooling}: expected some of {'+'.join(POOLING)}")
        if self.class_weights not in ("none", "balanced"):
            try:
                is_valid = all(0 < float(n) < math.inf for n in self.class_weights.split(","))
            except ValueError:
                is_valid = False
            if not is_valid:
                raise InputError(
                    f"--class-weights {self.class_weights}: expected none, balanced, or numbers "
                    "above 0: 1,2.5"
                )
        if self.patience is not None and not self.validation_size:
            raise InputError(f"--patience {self.patience}: needs a --validation-size")

    def model_config(
        self, vectors: tuple[int, ...], classes: int, train_vectors: bool
    ) -> ModelConfig:
        """The model that these options describe, for word vectors of this shape, [V, D]."""
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

    The defaults are those of `default`. Without it, the defaults of a DataConfig are those of the
    preset, so that --help --preset full shows them. A single --version prints the version and
    exits. Raises InputError, in one line, for a command line that tyro cannot parse.
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
    message_box = io.StringIO()
    try:
        with contextlib.redirect_stderr(message_box):
            return read() if default is None else read(default=default)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # tyro has no supported access to its errors: tyro._errors is private and may change in any
        # release, tyro.extras.get_parser is deprecated. tyro draws a box with a title, the message
        # and hints, each followed by a rule. Names of missing, unknown and similar options are
        # indented by four. Without a box, the whole text is the message.
        title, *rest = re.split("[─-]{5,}", re.sub("[│╮]", " ", message_box.getvalue()))
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
    """The name of a program on the command line: gru-twins NAME, or `otherwise`."""
    return str(sys._xoptions.get("gru_twins", otherwise))


class _Lines(str):
    """Text whose lines tyro does not wrap again."""

    def split(self, *_: Any) -> list[str]:
        return [str(self)]


def _about(options: type) -> _Lines:
    """The description for --help, wrapped to the terminal.

    The help text of each option is joined to one line, because tyro keeps its line breaks; tyro
    wraps this line, but not the description.
    """
    for each in filter(dataclasses.is_dataclass, options.__mro__):
        fields = each.__dataclass_fields__
        for parameter in parse_from_object(each).params:
            text = " ".join(str(parameter.description).split())
            fields[parameter.arg_name].metadata = MappingProxyType({"help": text})
    fold = textwrap.TextWrapper(min(shutil.get_terminal_size().columns, 100))
    fold.break_on_hyphens = False
    return _Lines("\n\n".join(map(fold.fill, str(inspect.getdoc(options)).split("\n\n"))))


def check_numbers(options: Any) -> None:
    """Raise InputError for the first number that is out of the range of its type."""
    try:
        msgspec.convert(vars(options), type(options))
    except msgspec.ValidationError as error:
        [(rule, name)] = re.findall(r"(.+) - at `\$\.(\w+)", str(error).lower())
        raise InputError(f"{option(name)} {getattr(options, name)}: {rule}") from None


def to_arguments(options: DataConfig, default: DataConfig | None = None) -> list[str]:
    """The command line that parses to these options; options equal to `default` are left out."""
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
