"""Random problems of one layer, and their results by the oracle and by the CPU kernel.

Results and gradients are dicts of arrays: outputs, h_last, d_x, d_h0, d_h_reset, and each
parameter's gradient under the name of the parameter. This module imports no framework.
"""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray

from common import kernels, oracle
from common.params import CELLS, DIRECTIONS, GRU_PARAMETERS

Array = NDArray[np.floating]
Arrays = dict[str, Array]
BEHIND = 64  # elements behind each array that the kernel must neither read nor write


@dataclass
class Case:
    """Arguments of one GRU layer, and the gradients of its results; None is NULL in gru.h."""

    parameters: Arrays
    """Under their canonical names, of the forward direction, the backward direction or both."""
    x: Array
    """[T, B, D], or with tokens [K, D]."""
    tokens: NDArray[np.int32] | None
    lengths: NDArray[np.int32] | None
    h0: Array | None
    resets: NDArray[np.bool_] | None
    h_reset: Array | None
    d_outputs: Array | None
    d_h_last: Array | None

    @property
    def cell(self) -> str:
        return next(iter(self.parameters)).partition(".")[0]

    @property
    def sides(self) -> tuple[str, ...]:
        names = {name.split(".")[2] for name in self.parameters}
        return tuple(side for side in DIRECTIONS if side in names)

    @property
    def weights(self) -> list[list[Array]]:
        """The parameters of each direction, in the order of GRU_PARAMETERS."""
        names = [[f"{self.cell}.0.{side}.{name}" for name in GRU_PARAMETERS] for side in self.sides]
        return [[self.parameters[name] for name in own] for own in names]

    @property
    def size(self) -> tuple[int, int, int, int, int]:
        """T, B, R, H, D."""
        T, B = (self.x if self.tokens is None else self.tokens).shape[:2]
        return T, B, len(self.sides), self.weights[0][1].shape[1], self.x.shape[-1]

    @property
    def rows(self) -> Array:
        """x as a matrix: [T * B, D], or with tokens [K, D]."""
        T, B, _, _, D = self.size
        return self.x.reshape(T * B, D) if self.tokens is None else self.x

    @property
    def places(self) -> NDArray[np.integer]:
        """[T, B]: the row of x that each step reads."""
        T, B, *_ = self.size
        return np.arange(T * B).reshape(T, B) if self.tokens is None else self.tokens

    @property
    def live(self) -> NDArray[np.bool_]:
        """[T, B]: the steps that are no padding."""
        T, B, *_ = self.size
        return np.arange(T)[:, None] < (np.full(B, T) if self.lengths is None else self.lengths)

    def arguments(self, convert: Callable[[Array], Any]) -> dict[str, Any]:
        """Arguments of `gru`, each array converted."""
        parameters = {name: convert(value) for name, value in self.parameters.items()}
        names = ("x", "lengths", "h0", "tokens", "resets", "h_reset")
        arrays = {name: getattr(self, name) for name in names}
        inputs = {name: convert(value) for name, value in arrays.items() if value is not None}
        return {"parameters": parameters, **inputs}

    def operands(self, convert: Callable[[Array], Any]) -> list[Any]:
        """Positional arguments of `recurrence`, each array converted."""
        arguments = self.arguments(convert)
        del arguments["parameters"]
        weights = [[convert(each) for each in own] for own in self.weights]
        first = [
            arguments["x"],
            arguments.get("tokens"),
            weights,
            arguments["lengths"],
            arguments["h0"],
        ]
        return first + [arguments[name] for name in ("resets", "h_reset") if name in arguments]


def draw(
    T: int,
    B: int,
    D: int,
    H: int,
    K: int = 0,
    *,
    sides: tuple[str, ...] = DIRECTIONS[:1],
    resets: bool | None = None,
    dtype: DTypeLike = np.float64,
    seed: int = 0,
    cell: str = "gru",
) -> Case:
    """A random case. K > 0: x has K rows, which tokens select. By default, an odd B has resets."""
    rng, R = np.random.default_rng([T, B, D, H, K, seed]), len(sides)
    lengths = rng.integers(0, T + 1, B)
    lengths[: B // 2] = np.maximum(lengths[: B // 2], T // 2)
    lengths[: min(B, 1)] = T
    rng.shuffle(lengths)
    shapes = CELLS[cell].shapes(D, H)
    has_resets = B % 2 == 1 if resets is None else resets

    def normal(*shape: int) -> Array:
        return rng.normal(size=shape).astype(dtype)

    return Case(
        parameters={
            f"{cell}.0.{side}.{name}": normal(*shape) / max(shape[-1], 1) ** 0.5
            for side in sides
            for name, shape in shapes.items()
        },
        x=normal(K, D) if K else normal(T, B, D),
        tokens=rng.integers(0, K, (T, B)).astype(np.int32) if K else None,
        lengths=lengths.astype(np.int32),
        h0=normal(R, B, H),
        resets=rng.random((T, B)) < 1 / 4 if has_resets else None,
        h_reset=normal(R, B, H) if has_resets else None,
        d_outputs=normal(T, B, R * H),
        d_h_last=normal(R, B, H),
    )


class Identity(np.ndarray):
    """An identity matrix; the product with it is the other factor, even if that is not finite."""

    def __rmatmul__(self, other: Array) -> Array:
        return other


class Unused(np.ndarray):
    """Inputs whose products with a gradient are not computed, because no test reads them."""

    def __rmatmul__(self, other: Array) -> float:
        return 0.0


@dataclass(frozen=True)
class Key:
    """A case that is compared by its contents, so that equal cases share a reference."""

    contents: bytes
    case: Case = field(compare=False, repr=False)


def reference(
    case: Case,
    reset_after: bool,
    dtype: DTypeLike = np.float64,
    module: ModuleType = oracle,
    times: Callable[[Array, Array], Array] = np.matmul,
) -> Arrays:
    """The results and gradients of the oracle, or of a module with its text.

    The last results are kept, because each instruction set is compared with the same ones; the
    caller must not change them. As in the kernel, the input product is computed of the rows of x,
    and so are its gradients: the oracle receives the product as its input, and the identity for
    its weights.
    """
    contents = hashlib.sha256(pickle.dumps(case)).digest()
    return computed_reference(Key(contents, case), reset_after, dtype, module, times)


@lru_cache(maxsize=256)
def computed_reference(
    key: Key,
    reset_after: bool,
    dtype: DTypeLike,
    module: ModuleType,
    times: Callable[[Array, Array], Array],
) -> Arrays:
    case = key.case
    T, B, R, H, _ = case.size
    x, live = case.rows.astype(dtype), case.live[..., None]
    begins = live & (np.False_ if case.resets is None else case.resets[..., None])
    zeros = np.zeros((R, B, H), dtype)
    h0, h_reset, d_h_last = (
        zeros if each is None else each.astype(dtype)
        for each in (case.h0, case.h_reset, case.d_h_last)
    )
    d_outputs = np.zeros((T, B, R * H)) if case.d_outputs is None else case.d_outputs
    d_outputs = np.split(d_outputs.astype(dtype), R, axis=-1)
    result: dict[str, list[Array]] = {}
    gradients: Arrays = {}
    for i, (side, weights) in enumerate(zip(case.sides, case.weights, strict=True)):
        name = f"{case.cell}.0.{side}"
        W, U, b, c = (each.astype(dtype) for each in weights)
        own = (np.zeros((len(W), len(W)), dtype).view(Identity), U, np.zeros_like(b), c)
        named = {f"{name}.{part}": each for part, each in zip(GRU_PARAMETERS, own, strict=True)}
        inputs = np.where(live, (times(x, W.T) + b)[case.places], 0)
        direction, outputs, h_last = module._forward_direction(
            named, name, inputs, live, begins, h0[i], h_reset[i], reset_after=reset_after
        )
        direction = replace(direction, x=direction.x.view(Unused))
        run = module.Forward(None, None, named, live, begins, [], reset_after)
        d_inputs, d_h0, d_h_reset = module._backward_direction(
            run, direction, d_outputs[i], d_h_last[i], gradients
        )
        d_rows = np.zeros((len(x), len(W)), dtype)
        np.add.at(d_rows, case.places, d_inputs)
        gradients |= {f"{name}.weight_ih": times(d_rows.T, x), f"{name}.bias_ih": d_rows.sum(0)}
        states = {"outputs": outputs, "h_last": h_last, "d_h0": d_h0, "d_h_reset": d_h_reset}
        for part, value in (states | {"d_x": times(d_rows, W)}).items():
            result.setdefault(part, []).append(value)
    if case.resets is None:
        del result["d_h_reset"]
    outputs, d_x = np.concatenate(result.pop("outputs"), -1), sum(result.pop("d_x"))
    joined = {name: np.stack(values) for name, values in result.items()}
    return {"outputs": outputs, "d_x": d_x.reshape(case.x.shape), **joined, **gradients}


MOST = 1 / 4
"""How far two results may be apart, in what rounding to bfloat16 changes.

Both round the same numbers but for their last bits in float32, relatively about 2^-23. So one in
2^14 rounds to the neighbour, 2^-8 away: that is sqrt(12 * 2^-14) = 3 % of what all roundings
change, at random, and in a gradient with some large entries several times that. Without one of the
roundings it is all that this one changes. Several draws together keep one neighbour from deciding.
"""


def apart(got: list[Arrays], want: list[Arrays], exact: list[Arrays]) -> dict[str, float]:
    """The distance of all draws together, for each quantity, as in MOST."""

    def norm(draws: list[Arrays], others: list[Arrays], name: str) -> float:
        pairs = zip(draws, others, strict=True)
        return sum(float(np.square(a[name].astype(float) - b[name]).sum()) for a, b in pairs) ** 0.5

    zeros = [dict.fromkeys(each, 0.0) for each in want]
    assert got[0].keys() == want[0].keys() == exact[0].keys()
    return {
        # The second term: where nothing was rounded, or little, as in a layer of one number.
        name: norm(got, want, name) / (norm(want, exact, name) + 2**-18 * norm(want, zeros, name))
        for name in want[0]
        if norm(want, zeros, name)
    }


def each_part(case: Case, results: Arrays) -> Iterator[tuple[str, Array]]:
    """The arrays of each direction, separately."""
    for name, array in results.items():
        common = name == "d_x" or "." in name
        axis = -1 if name == "outputs" else 0
        parts = [array] if common else np.split(array, len(case.sides), axis)
        yield from ((f"{name} {i}", part) for i, part in enumerate(parts))


def combinations(few: str, **values: Sequence) -> Any:
    """A parametrization by all combinations; those outside of `few` are long.

    Each word of `few` has a digit for each name: the index into its values.
    """
    digits = product(*(range(len(each)) for each in values.values()))
    default = [tuple(map(int, word)) for word in few.split()]
    return pytest.mark.parametrize(
        tuple(values),
        [
            pytest.param(
                *(each[i] for each, i in zip(values.values(), combination, strict=True)),
                marks=() if combination in default else pytest.mark.long,
            )
            for combination in digits
        ],
    )


def instruction_sets(*names: str) -> Any:
    """A fixture that selects each of these instruction sets, and skips if the processor lacks it.

    "emulated" stands for the fixture `amx` of the module.
    """

    @pytest.fixture(params=names)
    def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
        if request.param == "emulated":
            return (yield request.getfixturevalue("amx"))
        choose = kernels.library().gru_instruction_set
        best = choose(None)
        if choose(request.param.encode()) is None:
            pytest.skip(f"this processor lacks {request.param}")
        yield
        choose(best)

    return instruction_set


def address(array: NDArray | None) -> int | None:
    return None if array is None else array.ctypes.data


def call_kernel(
    case: Case,
    reset_after: bool,
    *,
    threads: int = 2,
    outputs: bool = True,
    backward: bool = True,
    d_x: bool = True,
    shared: bool = False,
    **options: bool,
) -> Arrays:
    """The results of the kernel; options are further fields of gru_problem.

    All memory that the kernel has to write is NaN before the call. So are rows of x that no step
    reads and the memory behind each array, which must be NaN afterwards, too. With `shared`, the
    directions' outputs are parts of one matrix, a column between them.
    """
    T, B, R, H, D = case.size
    dtype = case.x.dtype
    untouched = []

    def new(*shape: int) -> Array:
        whole = np.full(math.prod(shape) + BEHIND, np.nan, dtype)
        untouched.append(whole[-BEHIND:])
        return whole[:-BEHIND].reshape(shape)

    def matrices() -> list[Array]:
        if not shared:
            return [new(T * B, H) for _ in range(R)]
        whole = new(T * B, R, H + 1)
        untouched.append(whole[..., -1])
        return [whole[:, i, :-1] for i in range(R)]

    is_read = np.isin(np.arange(len(case.rows)), case.places[case.live])
    x = np.where(is_read[:, None], case.rows, dtype.type(np.nan))
    gradient, of_outputs, d_outputs = new(*x.shape), matrices(), matrices()
    if case.d_outputs is not None:
        for part, values in zip(d_outputs, np.split(case.d_outputs, R, -1), strict=True):
            part[:] = values.reshape(T * B, H)
    saved = [new(kernels.saved_size(T, B, H, reset_after, case.cell)) for _ in range(R)]
    states = ("h_last", "d_h0", "d_h_reset")[: 2 if case.resets is None else 3]
    written = [
        {name: new(B, H) for name in states}
        | {f"d_{name}": new(*each.shape) for name, each in zip(GRU_PARAMETERS, own, strict=True)}
        for own in case.weights
    ]
    directions = (kernels.Direction * R)()
    for i, (side, own) in enumerate(zip(case.sides, case.weights, strict=True)):
        fields = dict(zip(GRU_PARAMETERS, own, strict=True)) | written[i]
        for name in ("h0", "h_reset", "d_h_last"):
            whole = getattr(case, name)
            fields[name] = None if whole is None else whole[i]
        fields["outputs"] = of_outputs[i] if outputs else None
        fields["saved"] = saved[i] if backward else None
        fields["d_outputs"] = None if case.d_outputs is None else d_outputs[i]
        directions[i] = kernels.Direction(
            reverse=side == "backward",
            ld_outputs=(H + 1) * R if shared else H,
            **{name: address(array) for name, array in fields.items()},
        )
    problem = kernels.Problem(
        steps=T,
        batch=B,
        inputs=D,
        hidden=H,
        distinct=len(x),
        x=address(x),
        tokens=address(case.tokens),
        lengths=address(case.lengths),
        resets=address(case.resets),
        is_double=dtype == np.float64,
        reset_after=reset_after,
        cell=kernels.cell_index(case.cell),
        directions=R,
        threads=threads,
        d_x=address(gradient) if d_x else None,
        **options,
    )
    kernels.forward(problem, directions)
    if backward:
        kernels.backward(problem, directions)
        assert not d_x or (gradient[~is_read] == 0).all()
    assert all(np.isnan(array).all() for array in untouched)
    results = {name: np.stack([each[name] for each in written]) for name in states}
    results |= {"d_x": gradient.reshape(case.x.shape)} if d_x else {}
    for side, each in zip(case.sides, written, strict=True):
        results |= {f"{case.cell}.0.{side}.{name}": each[f"d_{name}"] for name in GRU_PARAMETERS}
    results = results if backward else {"h_last": results["h_last"]}
    if outputs:
        results["outputs"] = np.concatenate([part.reshape(T, B, H) for part in of_outputs], -1)
    return results
