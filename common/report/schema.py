"""The schema of results.json, which comparison/ writes and the report reads.

Files are validated when they are read, so that the report never shows a damaged file.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, field

from common import files
from common.errors import InputError
from common.metrics import MOST_DRAWN

T = TypeVar("T")
Interval = tuple[float, float]
Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Index = Annotated[int, Meta(ge=0)]
REFERENCE = "nn.GRU padded"  # the baseline of speeds
BUILT_IN = "nn.GRU"  # the baseline of latencies, which are measured without padding
PEER_BOUNDS = 4  # a check of another library's layer fails above this multiple of the bound
FEWEST_SEEDS = 5  # with fewer seeds, the report claims no difference between models or words


class Accuracy(Struct, kw_only=True):
    """The accuracy of a run on all test reviews or on a category, with its 95 % interval."""

    accuracy: Share
    accuracy_interval: Interval


class Category(Accuracy):
    """The accuracy of a run on the test reviews of one category."""

    support: int


class Score(Struct):
    """The scores of a run on one class."""

    precision: Share
    recall: Share
    support: int | float
    """A float in results of earlier versions if no prediction was correct."""


class Bin(Struct):
    """Predictions of similar probability: their number, mean probability and accuracy."""

    count: int
    confidence: Share
    accuracy: Share


class Run(Accuracy):
    """One trained model, with a part of its metrics.json."""

    framework: str
    model: str
    implementation: str
    train_seconds: float
    tokens_per_second: float
    peak_memory_bytes: float
    categories: dict[str, Category]
    cores: int
    confusion: list[list[int]] = []
    """With more than metrics.MOST_DRAWN classes, only in results of earlier versions."""
    mistakes: list[tuple[Index, Index, Index]] = []
    """metrics.mistakes, if there is no confusion matrix."""
    classes: dict[str, Score] = {}
    """Not in results of earlier versions."""
    losses: list[float] = []
    """Empty for a model that is not trained step by step."""
    loss_epochs: list[Positive] = []
    first_step_seconds: float | None = None
    roc_auc: float | None = None
    calibration_error: float | None = None
    temperature: float | None = None
    """The divisor of the logits."""
    reliability: list[Bin] = []
    parameters: int | None = None
    compilations: int | None = None
    run_dir: str = ""

    def __post_init__(self) -> None:
        if len(self.losses) != len(self.loss_epochs):
            raise ValueError("losses and loss_epochs: different lengths")

    def problem(self, classes: Sequence[str]) -> str:
        """The mismatch with these classes; empty if there is none."""
        count = len(classes)
        if self.confusion or count <= MOST_DRAWN:
            matches = [len(row) for row in self.confusion] == [count] * count
            return "" if matches else f"confusion: expected {count} x {count} numbers"
        if [*self.classes] != [*classes]:
            return "classes: not those of the data"
        exist = all(max(true, predicted) < count for true, predicted, _ in self.mistakes)
        return "" if exist else f"mistakes: expected numbers of {count} classes"

    @property
    def name(self) -> str:
        """The name in figures and tables, such as torch gru."""
        return f"{self.framework} {self.model}"

    @property
    def most_mistaken(self) -> list[tuple[int, int, int]]:
        """The most frequent mistakes: true class, predicted class, number of reviews."""
        if not self.confusion:
            return self.mistakes
        cells = ((t, p, n) for t, row in enumerate(self.confusion) for p, n in enumerate(row))
        mistakes = [(true, predicted, n) for true, predicted, n in cells if n and true != predicted]
        return sorted(mistakes, key=lambda mistake: -mistake[2])[:MOST_DRAWN]

    @property
    def recalls(self) -> list[tuple[int, float]]:
        """The number of reviews and the recall of each class."""
        if not self.confusion:
            return [(int(each.support), each.recall) for each in self.classes.values()]
        supports = [sum(row) for row in self.confusion]
        return [(n, self.confusion[c][c] / max(n, 1)) for c, n in enumerate(supports)]

    @property
    def by_size(self) -> list[int]:
        """The indices of the classes, by descending number of test reviews."""
        recalls = self.recalls
        return sorted(range(len(recalls)), key=lambda at: -recalls[at][0])

    @property
    def miscalibration(self) -> str:
        """The expected calibration error, in points."""
        return "" if self.calibration_error is None else f"{100 * self.calibration_error:.1f}"


class Named(Struct):
    """The name of the data set of a run."""

    name: str


class Metrics(Run, kw_only=True):
    """The part of metrics.json that the figures of a run show."""

    data: Named


class Preset(Struct):
    """The options that the figures of a run need."""

    preset: str


class Config(Struct):
    """The part of config.json that the figures of a run need."""

    classes: list[str]
    options: Preset


class Data(Named):
    """The data set of the runs."""

    train: int
    test: int
    vectors: str
    vocabulary: int
    classes: Annotated[list[str], Meta(min_length=1)]


class Check(Struct):
    """A parity check. It passes if the error is at most the bound (for a peer, PEER_BOUNDS times
    the bound)."""

    models: Annotated[list[str], Meta(min_length=2, max_length=2)]
    check: str
    dtype: str
    error: float
    bound: float
    ulp: float
    passed: bool
    peer: bool = False
    """Whether the layer of another library is checked. The bounds apply to this project; for peers,
    larger rounding errors are reported, and only gross errors fail."""

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
        """ulp: the unit in the last place of the largest value; 0 for a tensor of zeros."""
        largest = sys.float_info.max  # JSON has neither infinity nor NaN
        error = float(error) if error < math.inf else largest
        units = min(error / ulp, largest) if ulp else error
        passed = error <= (PEER_BOUNDS if peer else 1) * bound < math.inf
        return cls(models, check, dtype, error, float(bound), float(units), bool(passed), peer)

    @property
    def strain(self) -> float:
        """The error as a multiple of its bound."""
        return self.error / (self.bound or 1)  # the error of a tensor of zeros is 0 or infinite

    @property
    def is_excess(self) -> bool:
        """Whether the check passes although the error exceeds the bound."""
        return self.passed and self.error > self.bound


class Task(Struct, frozen=True):
    """A batch of B reviews of at most T words through a GRU of H hidden units."""

    B: int
    T: int
    H: int
    bidirectional: bool = False
    backward: bool = True
    """Whether all gradients, except of the frozen vectors, are computed too."""
    training: bool = False
    """Whether the task is a training step of the classifier with Adam."""
    input_size: int = 300
    """D, the dimension of the word vectors."""
    bfloat16: bool = False
    """Whether the factors of products are bfloat16."""

    @property
    def name(self) -> str:
        """The name of the task in figures and tables."""
        passes = " · forward and backward" if self.backward else " · forward only"
        directions = " · bidirectional" if self.bidirectional else ""
        dtype = " · bfloat16" if self.bfloat16 else ""
        return f"B {self.B}, T {self.T}, H {self.H}{passes}{directions}{dtype}"


class Timed(Task, frozen=True, kw_only=True):
    """The speed of an implementation on a task: median, first and third quartile."""

    contender: str
    tokens_per_second: Positive
    quartiles: Interval
    ratio: Positive
    """The speed relative to REFERENCE."""
    peak_fraction: float
    """The speed relative to that of a large matrix product."""

    @property
    def ratios(self) -> Interval:
        """`ratio` at the quartiles."""
        low, high = (self.ratio * speed / self.tokens_per_second for speed in self.quartiles)
        return low, high


class Latency(Task, frozen=True, kw_only=True):
    """Seconds of a forward call of an implementation: median and 99th percentile."""

    contender: str
    p50: Positive
    p99: Positive
    tokens_per_second: Positive
    """At p50."""
    ratio: Positive
    """The speed at p50 relative to BUILT_IN."""

    @property
    def name(self) -> str:
        return f"Inference: B {self.B}, T {self.T}, H {self.H}"

    @property
    def ratios(self) -> Interval:
        """`ratio` at p99 and at p50."""
        return self.ratio * self.p50 / self.p99, self.ratio


class Length(Struct):
    """The time of the kernel alone per token, in reviews of T words."""

    contender: str
    T: int
    nanoseconds_per_token: float


class Recipe(Struct):
    """The speed of an implementation on the homework's recipe."""

    contender: str
    reviews_per_second: float
    projected_seconds: float


class Speed(Struct):
    """The results of `compare.py speed`."""

    rows: Annotated[list[Timed], Meta(min_length=1)]
    lengths: list[Length]
    recipe: list[Recipe]
    peak_flops: float | None = None
    inference: list[Latency] = []
    calls: list[Latency] = []
    """The overhead of a call, on a minimal task."""


class Trial(Struct):
    """A set of options, evaluated on the validation reviews."""

    number: int
    state: Literal["complete", "pruned", "failed"]
    """pruned: stopped early by Optuna. failed: a loss or gradient was not finite."""
    options: dict[str, int | float]
    losses: list[float]
    """The validation loss after each epoch."""
    seconds: float
    accuracy: Share | None = None
    """The validation accuracy at the lowest loss."""
    error: str = ""
    given: bool = False
    """Whether these are the initial options of the search."""

    @property
    def loss(self) -> float:
        """The lowest validation loss."""
        return min(self.losses, default=math.inf)


class Tuning(Struct):
    """The results of `compare.py tune`."""

    study: str
    command: str
    """The command that trains with the best options; empty if no trial was completed."""
    trials: Annotated[list[Trial], Meta(min_length=1)]

    def __post_init__(self) -> None:
        for number, trial in enumerate(self.trials):
            if trial.options.keys() != self.trials[0].options.keys():
                raise ValueError(f"trials[{number}].options: differ from trials[0]")

    @property
    def best(self) -> Trial | None:
        """The completed trial with the lowest loss."""
        complete = [trial for trial in self.trials if trial.state == "complete"]
        return min(complete, key=lambda trial: trial.loss, default=None)


class Series(Struct):
    """Quartiles over the reviews of the gradient norm at each distance."""

    name: str
    median: list[float]
    low: list[float]
    high: list[float]


class Vanishing(Struct):
    """The gradient norm by the distance to the end of a review."""

    reviews: int
    distances: Annotated[list[int], Meta(min_length=1)]
    series: Annotated[list[Series], Meta(min_length=1)]
    conclusion: str

    def __post_init__(self) -> None:
        for each in self.series:
            if {len(each.median), len(each.low), len(each.high)} != {len(self.distances)}:
                raise ValueError(f"series: {each.name}: expected one number for each distance")


class Group(Struct):
    """The gates at one group of words: means over the words and the models."""

    group: str
    n: int
    z: float
    z_interval: Interval
    change: float
    change_interval: Interval
    distinct: int | None = None
    """The number of distinct words."""


class Effect(Struct):
    """The effect size between two groups of words; the mean over the seeds."""

    pair: tuple[str, str]
    quantity: str
    cohens_d: float
    interval: Interval
    by_seed: list[float] = []


class Gates(Struct):
    """The gates by groups of words."""

    groups: list[Group]
    effects: list[Effect]
    conclusion: str
    effects_untrained: list[Effect] = []

    @property
    def seeds(self) -> int:
        """The number of models."""
        return max((len(effect.by_seed) for effect in self.effects), default=0)


class Part(Struct):
    """The difference of two models on a part of the reviews."""

    n: int
    difference: float
    interval: Interval


class OfLength(Part):
    """The difference on reviews with start <= words < to."""

    start: int = field(name="from")
    to: int

    @property
    def name(self) -> str:
        return f"{self.start:,} to {self.to - 1:,} words"


class OfCategory(Part):
    """The difference on the reviews of a category."""

    name: str = field(name="category")


class Pair(Struct, kw_only=True):
    """The comparison of model b with model a on the same reviews."""

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
    """The results of `compare.py questions`."""

    comparisons: list[Pair] = []
    vanishing: Vanishing | UnsetType = UNSET
    gates: Gates | UnsetType = UNSET
    commands: list[str] = []


class Directions(Struct):
    """A number per word, for each direction of a bidirectional model."""

    forward: list[float]
    backward: list[float]


class Explained(Struct):
    """One model's values for a review. All fields except the first two have a value per word."""

    predicted: str
    probability: float
    z: list[float] | Directions
    r: list[float] | Directions
    change: list[float] | Directions
    gradient: list[float]
    leave_out: list[float]
    running: list[float]


class Review(Struct):
    """A review of the gate explorer; `text` is its tokens, joined by spaces."""

    text: str
    words: Annotated[list[str], Meta(min_length=1)]
    true: str
    models: Annotated[dict[str, Explained], Meta(min_length=1)]

    def __post_init__(self) -> None:
        for model, explained in self.models.items():
            for name in ("z", "r", "change", "gradient", "leave_out", "running"):
                values = getattr(explained, name)
                both = [values.forward, values.backward] if isinstance(values, Directions) else []
                if any(len(each) != len(self.words) for each in both or [values]):
                    raise ValueError(f"models.{model}.{name}: expected one number for each word")


class Explorer(Struct):
    """The gate explorer."""

    classes: Annotated[list[str], Meta(min_length=1)]
    reviews: Annotated[list[Review], Meta(min_length=1)]


class Results(Struct):
    """The content of results.json."""

    environment: dict[str, str | int]
    """The command and, except the code, everything that the numbers depend on."""
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
            raise ValueError("environment: command is missing")
        if self.runs and not self.data:
            raise ValueError("Object missing required field `data`")
        for number, run in enumerate(self.runs):
            place = f"runs[{number}]"
            if self.data and (problem := run.problem(self.data.classes)):
                raise ValueError(f"{place}.{problem}")
            if run.categories.keys() != self.runs[0].categories.keys():
                raise ValueError(f"{place}.categories: differ from runs[0]")


def convert(value: Any, kind: type[T], path: Path) -> T:
    """Convert the value of a JSON file to one of the structs above.

    Raises InputError naming the file and the position of a missing or wrong value.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()  # refuses lone surrogates
        return msgspec.convert(value, kind)
    except ValueError as error:
        raise InputError(f"{path}: cannot be shown: {error}") from None


def read(path: Path) -> Results:
    """Read results.json. Raises InputError if it is missing or invalid."""
    return convert(files.read_json(path), Results, path)


def write(path: Path, results: Results) -> None:
    """Write results.json atomically. Raises InputError if that fails."""
    # The hook converts NumPy scalars.
    files.write_json(path, msgspec.to_builtins(results, enc_hook=lambda value: value.item()))
