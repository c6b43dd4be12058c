"""What results.json holds: built by what measures (comparison/), read by the report.

A file is checked as it is read, so that nothing is drawn from one that was damaged or edited.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
from msgspec import UNSET, Meta, Struct, UnsetType, field

from common import files
from common.errors import InputError
from common.metrics import MOST_DRAWN

T = TypeVar("T")
Interval = tuple[float, float]
Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Index = Annotated[int, Meta(ge=0)]
REFERENCE = "nn.GRU padded"  # what speeds are compared with
BUILT_IN = "nn.GRU"  # the same of latencies, where there is no padding
PEER_BOUNDS = 4  # so many times its bound may the error of another library's layer be
FEWEST_SEEDS = 5  # of fewer, no finding and no headline says that models or words differ


class Accuracy(Struct, kw_only=True):
    """Of a run, or of it on the test reviews of one category, with its 95 % interval."""

    accuracy: Share
    accuracy_interval: Interval

    @property
    def half(self) -> float:
        """Half of the interval."""
        return (self.accuracy_interval[1] - self.accuracy_interval[0]) / 2


class Category(Accuracy):
    """How well a run does on the test reviews of one category."""

    support: int


class Score(Struct):
    """How well a run does on one class."""

    precision: Share
    recall: Share
    support: int | float
    """A float in results of earlier versions where no answer was right."""


class Bin(Struct):
    """Answers of about the same probability; their mean, and how many of them are right."""

    count: int
    confidence: Share
    accuracy: Share


class Run(Accuracy):
    """One trained model: what is kept of its metrics.json."""

    framework: str
    model: str
    implementation: str
    train_seconds: float
    tokens_per_second: float
    peak_memory_bytes: float
    categories: dict[str, Category]
    cores: int
    confusion: list[list[int]] = []
    """Of more than metrics.MOST_DRAWN classes, only in results of earlier versions."""
    mistakes: list[tuple[Index, Index, Index]] = []
    """Where there is no confusion: see metrics.mistakes."""
    classes: dict[str, Score] = {}
    """Not in results of earlier versions."""
    losses: list[float] = []
    """None where a model is not trained step by step."""
    loss_epochs: list[Positive] = []
    first_step_seconds: float | None = None
    roc_auc: float | None = None
    calibration_error: float | None = None
    temperature: float | None = None
    """What its logits have been divided by."""
    reliability: list[Bin] = []
    parameters: int | None = None
    compilations: int | None = None
    run_dir: str = ""

    def __post_init__(self) -> None:
        if len(self.losses) != len(self.loss_epochs):
            raise ValueError("losses and loss_epochs: not as many")

    def problem(self, classes: Sequence[str]) -> str:
        """What does not fit these classes; empty where everything does."""
        count = len(classes)
        if self.confusion or count <= MOST_DRAWN:
            fits = [len(row) for row in self.confusion] == [count] * count
            return "" if fits else f"confusion: expected {count} x {count} numbers"
        if [*self.classes] != [*classes]:
            return "classes: not those of the data"
        exist = all(max(true, predicted) < count for true, predicted, _ in self.mistakes)
        return "" if exist else f"mistakes: expected numbers of {count} classes"

    @property
    def name(self) -> str:
        """What it is called in figures and tables: torch gru."""
        return f"{self.framework} {self.model}"

    @property
    def most_mistaken(self) -> list[tuple[int, int, int]]:
        """The most frequent mistakes: true class, predicted class, how many reviews."""
        if not self.confusion:
            return self.mistakes
        matrix = np.array(self.confusion) * ~np.eye(len(self.confusion), dtype=bool)
        pairs, counts = np.argwhere(matrix), matrix[matrix > 0]
        most = np.argsort(-counts, kind="stable")[:MOST_DRAWN]
        rows = np.column_stack([pairs, counts])[most].tolist()
        return [(true, predicted, count) for true, predicted, count in rows]

    @property
    def recalls(self) -> list[tuple[int, float]]:
        """Of each class how many reviews are of it, and the share of them that is answered so."""
        if not self.confusion:
            return [(int(each.support), each.recall) for each in self.classes.values()]
        supports = [sum(row) for row in self.confusion]
        return [(n, self.confusion[c][c] / max(n, 1)) for c, n in enumerate(supports)]

    @property
    def by_size(self) -> list[int]:
        """The classes, the one with the most test reviews first."""
        supports = [support for support, _ in self.recalls]
        return sorted(range(len(supports)), key=lambda at: -supports[at])

    @property
    def miscalibration(self) -> str:
        """The expected calibration error, in points."""
        return "" if self.calibration_error is None else f"{100 * self.calibration_error:.1f}"

    @property
    def first_step(self) -> str:
        """When the first step was done."""
        return "" if self.first_step_seconds is None else f"{self.first_step_seconds:.2f} s"

    @property
    def peak_mib(self) -> float:
        """The peak memory in MiB."""
        return self.peak_memory_bytes / 2**20


class Named(Struct):
    """What a run's figures name of its data set."""

    name: str


class Metrics(Run, kw_only=True):
    """What a run's figures show of metrics.json."""

    data: Named


class Preset(Struct):
    """What they need of the options."""

    preset: str


class Config(Struct):
    """What they need of config.json."""

    classes: list[str]
    options: Preset


class Data(Struct):
    """The reviews that the runs were trained and tested on."""

    name: str
    train: int
    test: int
    vectors: str
    vocabulary: int
    classes: Annotated[list[str], Meta(min_length=1)]


class Check(Struct):
    """A parity check. It passes where the error is at most the bound, or, for a peer, PEER_BOUNDS
    times the bound."""

    models: Annotated[list[str], Meta(min_length=2, max_length=2)]
    check: str
    dtype: str
    error: float
    bound: float
    ulp: float
    passed: bool
    peer: bool = False
    """Whether another library's layer is checked. The bounds hold this project's implementations;
    the rounding of a peer is reported, and only a gross error of a peer is a failure."""

    @classmethod
    def of(
        cls,
        models: list[str],
        check: str,
        dtype: str,
        error: float,
        bound: float,
        ulp: float,
        peer: bool = False,
    ) -> "Check":
        """ulp: a unit in the last place of what is compared; 0 where that is all zeros."""
        largest = sys.float_info.max  # JSON knows no infinity, and no NaN
        error = float(error) if error < math.inf else largest
        units = min(error / ulp, largest) if ulp else error
        passed = error <= (PEER_BOUNDS if peer else 1) * bound < math.inf
        return cls(models, check, dtype, error, float(bound), float(units), bool(passed), peer)

    @property
    def strain(self) -> float:
        """The error as a multiple of its bound."""
        if self.bound == 0:  # of a tensor of zeros: its error is 0 or infinite
            return self.error
        return self.error / self.bound

    @property
    def is_excess(self) -> bool:
        """Whether the error exceeds its bound, and the check passes nevertheless."""
        return self.passed and self.error > self.bound


class Task(Struct, frozen=True):
    """A batch of B reviews of at most T words through a GRU of H hidden units."""

    B: int
    T: int
    H: int
    bidirectional: bool = False
    backward: bool = True
    """Forward and backward (all gradients but that of the frozen vectors), or forward only."""
    training: bool = False
    """A whole training step of the classifier, with Adam."""
    input_size: int = 300
    """D, the dimension of the word vectors."""
    bfloat16: bool = False
    """Whether what products multiply is bfloat16."""

    @property
    def name(self) -> str:
        """What it is called in figures and tables."""
        directions = " · bidirectional" if self.bidirectional else ""
        directions += " · bfloat16" if self.bfloat16 else ""
        kind = "forward and backward" if self.backward else "forward only"
        return f"B {self.B}, T {self.T}, H {self.H} · {kind}{directions}"


class Timed(Task, frozen=True, kw_only=True):
    """An implementation on a task: medians, and the first and the third quartile."""

    contender: str
    tokens_per_second: Positive
    quartiles: Interval
    ratio: Positive
    """How many times as fast as REFERENCE."""
    peak_fraction: float
    """Share of the speed of a large matrix product."""

    @property
    def step_microseconds(self) -> float:
        """Of a time step of the whole batch, of which each row takes part in each."""
        return 1e6 * self.B / self.tokens_per_second

    @property
    def ratios(self) -> Interval:
        """The ratio at the quartiles."""
        low, high = self.quartiles
        return (
            self.ratio * low / self.tokens_per_second,
            self.ratio * high / self.tokens_per_second,
        )


class Latency(Task, frozen=True, kw_only=True):
    """Seconds of a call of an implementation, forward only: the median and the 99th percentile."""

    contender: str
    p50: Positive
    p99: Positive
    tokens_per_second: Positive
    """At p50."""
    ratio: Positive
    """How many times as fast as BUILT_IN, at p50."""

    @property
    def name(self) -> str:
        """What the task is called in figures and tables."""
        return f"Inference: B {self.B}, T {self.T}, H {self.H}"

    @property
    def ratios(self) -> Interval:
        """The ratio at p99 and at p50."""
        return self.ratio * self.p50 / self.p99, self.ratio

    @property
    def microseconds(self) -> tuple[float, float]:
        """p50 and p99."""
        return 1e6 * self.p50, 1e6 * self.p99


class Length(Struct):
    """What a token costs the kernel alone in reviews of T words."""

    contender: str
    T: int
    nanoseconds_per_token: float


class Recipe(Struct):
    """An implementation on the homework's recipe."""

    contender: str
    reviews_per_second: float
    projected_seconds: float


class Speed(Struct):
    """What `compare.py speed` measured."""

    rows: Annotated[list[Timed], Meta(min_length=1)]
    lengths: list[Length]
    recipe: list[Recipe]
    peak_flops: float | None = None
    inference: list[Latency] = []
    calls: list[Latency] = []
    """Of a task with next to nothing to compute."""


class Trial(Struct):
    """A set of options, tried on the validation reviews."""

    number: int
    state: Literal["complete", "pruned", "failed"]
    """Pruned: given up after an epoch. Failed: a number was not finite."""
    options: dict[str, int | float]
    losses: list[float]
    """On the validation reviews, after each epoch."""
    seconds: float
    accuracy: Share | None = None
    """On them, where the loss is lowest."""
    error: str = ""
    given: bool = False
    """Whether the options are those that the search began with."""

    @property
    def loss(self) -> float:
        """The lowest of the losses."""
        return min(self.losses, default=math.inf)


class Tuning(Struct):
    """What `compare.py tune` tried."""

    study: str
    command: str
    """That trains with the best options; empty, where no trial was completed."""
    trials: Annotated[list[Trial], Meta(min_length=1)]

    def __post_init__(self) -> None:
        for number, trial in enumerate(self.trials):
            if trial.options.keys() != self.trials[0].options.keys():
                raise ValueError(f"trials[{number}].options: not those of trials[0]")

    @property
    def best(self) -> Trial | None:
        """The completed trial with the lowest loss."""
        complete = [trial for trial in self.trials if trial.state == "complete"]
        return min(complete, key=lambda trial: trial.loss, default=None)


class Series(Struct):
    """The norm of the gradient at each distance: quartiles over the reviews."""

    name: str
    median: list[float]
    low: list[float]
    high: list[float]


class Vanishing(Struct):
    """How far back gradients reach."""

    reviews: int
    distances: Annotated[list[int], Meta(min_length=1)]
    series: Annotated[list[Series], Meta(min_length=1)]
    conclusion: str

    def __post_init__(self) -> None:
        for each in self.series:
            if {len(each.median), len(each.low), len(each.high)} != {len(self.distances)}:
                raise ValueError(f"series: {each.name}: not a number for each distance")


class Group(Struct):
    """What the gates do at one group of words: means over the words and the models."""

    group: str
    n: int
    z: float
    z_interval: Interval
    change: float
    change_interval: Interval
    distinct: int | None = None
    """How many different words."""


class Effect(Struct):
    """How far two groups of words are apart; the mean over the seeds."""

    pair: tuple[str, str]
    quantity: str
    cohens_d: float
    interval: Interval
    by_seed: list[float] = []


class Gates(Struct):
    """What the gates do at irrelevant words."""

    groups: list[Group]
    effects: list[Effect]
    conclusion: str
    effects_untrained: list[Effect] = []

    @property
    def seeds(self) -> int:
        """Of how many models these are the means."""
        return max((len(effect.by_seed) for effect in self.effects), default=0)


class Part(Struct):
    """How far two models are apart on some of the reviews."""

    n: int
    difference: float
    interval: Interval


class OfLength(Part):
    """On those of so many words; `to` is the first number that is too many."""

    start: int = field(name="from")
    to: int


class OfCategory(Part):
    """On those of a category."""

    category: str


class Pair(Struct, kw_only=True):
    """Two models on the same reviews: b against a."""

    title: str
    a: str
    b: str
    seeds: int
    accuracy_a: float
    accuracy_b: float
    difference: float
    interval: Interval
    difference_by_seed: list[float]
    mcnemar_p: float
    mcnemar_p_by_seed: list[float] = []
    by_length: list[OfLength]
    by_category: list[OfCategory] = []
    seconds_a: float
    seconds_b: float
    conclusion: str


class Questions(Struct):
    """What `compare.py questions` measured."""

    comparisons: list[Pair] = []
    vanishing: Vanishing | UnsetType = UNSET
    gates: Gates | UnsetType = UNSET
    commands: list[str] = []


class Directions(Struct):
    """A number a word, of each direction of a bidirectional model."""

    forward: list[float]
    backward: list[float]


class Explained(Struct):
    """A review as one model reads it; a number a word, but for the first two."""

    predicted: str
    probability: float
    z: list[float] | Directions
    r: list[float] | Directions
    change: list[float] | Directions
    gradient: list[float]
    leave_out: list[float]
    running: list[float]


class Review(Struct):
    """A review of the gate explorer; text is what the tokenizer made of it."""

    text: str
    words: Annotated[list[str], Meta(min_length=1)]
    true: str
    models: Annotated[dict[str, Explained], Meta(min_length=1)]

    def __post_init__(self) -> None:
        for model, found in self.models.items():
            for name in ("z", "r", "change", "gradient", "leave_out", "running"):
                values = getattr(found, name)
                both = [values.forward, values.backward] if isinstance(values, Directions) else []
                if any(len(each) != len(self.words) for each in both or [values]):
                    raise ValueError(f"models.{model}.{name}: not a number for each word")


class Explorer(Struct):
    """The gate explorer."""

    classes: Annotated[list[str], Meta(min_length=1)]
    reviews: Annotated[list[Review], Meta(min_length=1)]


class Results(Struct):
    """All of results.json."""

    environment: dict[str, str | int]
    """The command, and what else the numbers depend on besides the code."""
    runs: list[Run] = []
    parity: list[Check] = []
    data: Data | UnsetType = UNSET
    speed: Speed | UnsetType = UNSET
    questions: Questions | UnsetType = UNSET
    explorer: Explorer | UnsetType = UNSET
    tuning: Tuning | UnsetType = UNSET
    schema: Literal[1] = 1

    def __post_init__(self) -> None:
        if "command" not in self.environment:
            raise ValueError("environment: has no command")
        if self.runs and not self.data:
            raise ValueError("Object missing required field `data`")
        for number, run in enumerate(self.runs):
            place = f"runs[{number}]"
            if self.data and (problem := run.problem(self.data.classes)):
                raise ValueError(f"{place}.{problem}")
            if run.categories.keys() != self.runs[0].categories.keys():
                raise ValueError(f"{place}.categories: not those of runs[0]")


def convert(found: Any, kind: type[T], path: Path) -> T:
    """What came from a JSON file as one of the structs above.

    Raises InputError naming the file and the place in it where something is missing or wrong.
    """
    try:
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is no text
        return msgspec.convert(found, kind)
    except ValueError as error:
        raise InputError(f"{path}: cannot be shown: {error}") from None


def read(path: Path) -> Results:
    """Read results.json. Raises InputError where there is none, or it cannot be shown."""
    return convert(files.read_json(path), Results, path)


def write(path: Path, results: Results) -> None:
    """Write results.json, whole or not at all. Raises InputError where that fails."""
    # The hook is for NumPy's numbers.
    files.write_json(path, msgspec.to_builtins(results, enc_hook=lambda value: value.item()))
