"""What results.json has to hold, so that nothing is drawn from one that was damaged or edited.

Only what the report shows is described here; the file holds more.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, field

from common.errors import InputError

Interval = tuple[float, float]
Numbers = Annotated[list[float], Meta(min_length=1)]
Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]


def check(results: Any, path: Path) -> None:
    """Raises InputError naming the file and the place in it where something is missing or wrong."""
    kind = Trained if isinstance(results, dict) and results.get("runs") else Results
    try:
        msgspec.convert(results, kind)
        json.dumps(results, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except ValueError as error:
        raise InputError(f"{path}: cannot be shown: {error}") from None


class Category(Struct):
    """How well a run does on the test reviews of one category."""

    accuracy: Share
    accuracy_interval: Interval
    support: int


class Run(Struct):
    """One trained model."""

    framework: str
    model: str
    implementation: str
    accuracy: Share
    accuracy_interval: Interval
    confusion: list[list[int]]
    losses: Numbers
    loss_epochs: Annotated[list[Positive], Meta(min_length=1)]
    train_seconds: float
    tokens_per_second: float
    first_step_seconds: float
    peak_memory_bytes: float
    categories: dict[str, Category]
    cores: int | UnsetType = UNSET

    def __post_init__(self) -> None:
        if len(self.losses) != len(self.loss_epochs):
            raise ValueError("losses and loss_epochs: not as many")


class Data(Struct):
    """The reviews that the runs were trained and tested on."""

    name: str
    train: int
    test: int
    vectors: str
    vocabulary: int
    classes: Annotated[list[str], Meta(min_length=1)]


class Check(TypedDict):
    """A parity check."""

    models: Annotated[list[str], Meta(min_length=2, max_length=2)]
    check: str
    dtype: str
    error: float
    bound: float
    ulp: float
    passed: bool


class Timed(Struct):
    """An implementation on a task of `compare.py speed`."""

    B: int
    T: int
    H: int
    bidirectional: bool
    backward: bool
    contender: str
    tokens_per_second: Positive
    quartiles: Interval
    ratio: Positive
    peak_fraction: float


class Length(Struct):
    """What a token costs in reviews of T words."""

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

    rows: list[Timed]
    lengths: list[Length]
    recipe: list[Recipe]

    def __post_init__(self) -> None:
        if not any(row.ratio == 1 for row in self.rows):
            raise ValueError("rows: none has the ratio 1, that of what all are compared with")


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
    """What the gates do at one group of words."""

    group: str
    n: int
    z: float
    z_interval: Interval
    change: float
    change_interval: Interval


class Effect(Struct):
    """How far two groups of words are apart."""

    pair: tuple[str, str]
    quantity: str
    cohens_d: float
    interval: Interval


class Gates(Struct):
    """What the gates do at irrelevant words."""

    groups: list[Group]
    effects: list[Effect]
    conclusion: str


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


class Pair(Struct):
    """Two models on the same reviews."""

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
    by_length: list[OfLength]
    seconds_a: float
    seconds_b: float
    conclusion: str
    by_category: list[OfCategory] = []


class Questions(Struct):
    """What `compare.py questions` measured."""

    comparisons: list[Pair] | UnsetType = UNSET
    vanishing: Vanishing | UnsetType = UNSET
    gates: Gates | UnsetType = UNSET
    commands: list[str] | UnsetType = UNSET


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
    """A review of the gate explorer."""

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


class Environment(Struct):
    """What the numbers depend on besides the code; all else here is shown as it is."""

    command: str


class Results(Struct, kw_only=True):
    """All of results.json."""

    schema: Literal[1]
    environment: Environment
    runs: list[Run]
    parity: list[Check]
    speed: Speed | UnsetType = UNSET
    questions: Questions | UnsetType = UNSET
    explorer: Explorer | UnsetType = UNSET


class Trained(Results):
    """The same where there are runs."""

    data: Data

    def __post_init__(self) -> None:
        classes = len(self.data.classes)
        for number, run in enumerate(self.runs):
            if [len(row) for row in run.confusion] != [classes] * classes:
                raise ValueError(
                    f"runs[{number}].confusion: expected {classes} x {classes} numbers"
                )
            if run.categories.keys() != self.runs[0].categories.keys():
                raise ValueError(f"runs[{number}].categories: not those of runs[0]")
