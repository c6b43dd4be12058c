"""The canonical parameters: one flat dict of NumPy arrays, the same for both frameworks.

    gru.{layer}.{forward|backward}.weight_ih  [3H, D]   weight_hh [3H, H]   bias_ih, bias_hh [3H]
    head.weight [C, F]                        head.bias [C]
    vectors.weight [V, D]                     only where the word vectors are trained

Another cell has its own name instead of gru and G * H rows instead of 3H, as declared in CELLS: the
tanh RNN has rnn.{layer}.… with H rows. A cell may declare further parameters.

The gates of a GRU are in the order z (update), r (reset), n (candidate). D is the dimension of the
word vectors (plus E log-count ratios of n-grams) in the first layer, and H * directions in later
layers. F is H * directions times the number of poolings.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np

from common.errors import InputError

DIRECTIONS = ("forward", "backward")
NO_LABEL = -1  # the label of a padding row, which the loss ignores
GRU_PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
ProductDtype = Literal["float32", "bfloat16"]
"""The dtype to which the factors of matrix products are rounded; "float32": they are not rounded,
not even in float64. From the options to the bindings of the kernels, it is passed on as it is."""
PRODUCT_DTYPES: tuple[ProductDtype, ...] = get_args(ProductDtype)
NO_MASKS: Mapping[str, Any] = MappingProxyType({})  # the masks without dropout
POOLING = ("last", "max", "mean")


@dataclass(frozen=True)
class Parameter:
    """A parameter of a cell beyond GRU_PARAMETERS, such as the gain of a layer normalization."""

    shape: Callable[[int, int], tuple[int, ...]]
    """The shape as a function of D and H."""
    initial: float | None = None
    """The initial value; None: uniform in ±1/sqrt(H)."""


@dataclass(frozen=True)
class CellSpec:
    """The properties of a cell that are common to both frameworks."""

    name: str
    blocks: int
    """G, the number of blocks of H rows in the weights: one for each pre-activation."""
    states: int = 1
    """S, the size of a state in units of H (an LSTM's: 2)."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    """The parameters beyond GRU_PARAMETERS, in order; `step` takes them after bias_hh."""
    gates: tuple[str, ...] = ()
    """The names of the gates that `step` returns; `explain` shows them."""
    reset_gate: bool = False
    """Whether `step` depends on reset_after."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters of one direction, in canonical order."""
        return *GRU_PARAMETERS, *self.parameters

    def shapes(self, D: int, H: int) -> dict[str, tuple[int, ...]]:
        """The shapes of these parameters for inputs of size D."""
        rows = self.blocks * H
        shapes = zip(GRU_PARAMETERS, ((rows, D), (rows, H), (rows,), (rows,)), strict=True)
        return dict(shapes) | {name: each.shape(D, H) for name, each in self.parameters.items()}

    def initial(self, name: str) -> float | None:
        """The initial value of a parameter by its canonical name; None: drawn."""
        declared = self.parameters.get(name.rpartition(".")[2])
        return None if declared is None else declared.initial


CELLS = {
    "gru": CellSpec("gru", blocks=3, gates=("z", "r"), reset_gate=True),
    "rnn": CellSpec("rnn", blocks=1),
}
"""The registry of cells; torch_impl/NAME.py and jax_impl/NAME.py implement the cell NAME."""


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a classifier; sizes are numbers of features."""

    input_size: int
    """D, the dimension of the word vectors."""
    hidden_size: int = 128
    """H."""
    num_layers: int = 1
    """L."""
    bidirectional: bool = False
    reset_after: bool = False
    """Apply the reset gate after the product with U_n (cuDNN, nn.GRU), not before (Cho 2014)."""
    classes: int = 2
    """C."""
    vocabulary_size: int = 0
    """V, required only if the word vectors are trained."""
    train_vectors: bool = False
    builtin: bool = False
    """Use the framework's own GRU layer (the baselines nn.gru and nn.bigru)."""
    pooling: str = "last"
    """The pooling of the outputs: some of last, max and mean, joined by "+"."""
    relu: bool = True
    """Apply ReLU to the pooled outputs."""
    ngrams: int = 0
    """N: the first layer also reads the log-count ratios of 1- to N-grams."""
    cell: str = "gru"
    """The cell, a key of CELLS."""
    implementation: str = "auto"
    dtype: ProductDtype = "float32"
    """The dtype of the factors of products in recurrent layers; all else is float32."""

    def __post_init__(self) -> None:
        if self.cell not in CELLS:
            raise InputError(f"cell {self.cell!r}: expected one of {', '.join(CELLS)}")

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def ratios(self) -> int:
        """E, the number of log-count ratios that the first layer reads at each word."""
        return self.ngrams * ratio_columns(self.classes)

    @property
    def features(self) -> int:
        """F, the input size of the head."""
        return self.hidden_size * self.directions * len(self.pooling.split("+"))


def ratio_columns(classes: int) -> int:
    """The number of ratios of an n-gram: one for the second of two classes, or one per class."""
    return 1 if classes == 2 else classes


def cell_shapes(
    cell: CellSpec, input_size: int, hidden_size: int, num_layers: int, bidirectional: bool
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a cell's layers, in canonical order."""
    directions = DIRECTIONS if bidirectional else DIRECTIONS[:1]
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(num_layers):
        size = input_size if layer == 0 else hidden_size * len(directions)
        for direction in directions:
            for name, shape in cell.shapes(size, hidden_size).items():
                shapes[f"{cell.name}.{layer}.{direction}.{name}"] = shape
    return shapes


def gru_shapes(
    input_size: int, hidden_size: int, num_layers: int, bidirectional: bool
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a GRU, in canonical order."""
    return cell_shapes(CELLS["gru"], input_size, hidden_size, num_layers, bidirectional)


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a classifier, in canonical order."""
    result = cell_shapes(
        CELLS[config.cell],
        config.input_size + config.ratios,
        config.hidden_size,
        config.num_layers,
        config.bidirectional,
    )
    result |= {"head.weight": (config.classes, config.features), "head.bias": (config.classes,)}
    if config.train_vectors:
        result["vectors.weight"] = (config.vocabulary_size, config.input_size)
    return result


def init_gru(
    input_size: int, hidden_size: int, num_layers: int, bidirectional: bool, seed: int
) -> dict[str, np.ndarray]:
    """Initial float64 values of a GRU: uniform in ±1/sqrt(H), as in torch.nn.GRU."""
    shapes = gru_shapes(input_size, hidden_size, num_layers, bidirectional)
    return _draw(shapes, np.random.default_rng(seed), hidden_size)


def init(config: ModelConfig, seed: int, vectors: np.ndarray) -> dict[str, np.ndarray]:
    """Initial float64 values of a classifier, identical for both frameworks.

    Recurrent layers: uniform in ±1/sqrt(H), or the value that the cell declares. Head: uniform in
    ±1/sqrt(features), as in torch.nn.Linear. Trained word vectors start at `vectors` [V, D].
    """
    all_shapes = shapes(config)
    all_shapes.pop("vectors.weight", None)
    rng = np.random.default_rng(seed)
    in_cell = {name: shape for name, shape in all_shapes.items() if not name.startswith("head.")}
    in_head = {name: shape for name, shape in all_shapes.items() if name.startswith("head.")}
    values = _draw(in_cell, rng, config.hidden_size, CELLS[config.cell].initial)
    values |= _draw(in_head, rng, config.features)
    if config.train_vectors:
        values["vectors.weight"] = vectors.astype(np.float64)
    return values


def _draw(
    shapes: dict[str, tuple[int, ...]],
    rng: np.random.Generator,
    fan_in: int,
    initial: Callable[[str], float | None] = lambda name: None,
) -> dict[str, np.ndarray]:
    bound, values = fan_in**-0.5, {}
    for name, shape in shapes.items():
        value = initial(name)
        values[name] = rng.uniform(-bound, bound, shape) if value is None else np.full(shape, value)
    return values


def structure(names: Collection[str], cell: str | None = None) -> tuple[int, tuple[str, ...]]:
    """The number of layers and the directions ("forward", or "forward", "backward") of a cell.

    cell: by default, cell_of(names). Raises ValueError if no name is a parameter of the cell.
    """
    cell = cell or cell_of(names)
    parts = [part for part in (name.split(".") for name in names) if part[0] == cell]
    parts = [part for part in parts if len(part) > 2]
    if not parts:
        raise ValueError(f"parameters: expected those of a GRU, found {', '.join(names) or 'none'}")
    layers = len({part[1] for part in parts})
    return layers, DIRECTIONS if any(part[2] == "backward" for part in parts) else DIRECTIONS[:1]


def cell_of(names: Iterable[str]) -> str:
    """The registered cell whose parameters have these names; the GRU if none does."""
    return next((cell for name in names if (cell := name.partition(".")[0]) in CELLS), "gru")
