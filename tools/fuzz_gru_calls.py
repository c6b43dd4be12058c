"""Draws the calls of tools/fuzz_gru.py: valid calls, and changes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.random import Generator, default_rng

from common import kernels
from common.params import DIRECTIONS, GRU_PARAMETERS, gru_shapes

if TYPE_CHECKING:
    from tools.fuzz_gru_frameworks import Framework

OPERATORS = ("forward", "backward")  # torch.ops.gru.forward, gru_forward in XLA, and so on
LISTS = GRU_PARAMETERS  # the arguments of operators that have an entry for each direction
FLOATS = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
SAME = {"torch": 1, "jax": 25}  # consecutive calls of the same sizes, for which JAX compiles once
VOCABULARY, CLASSES = 9, 3

Array = np.ndarray
Change = tuple[str, str, dict[str, Any]]
"""The description of an invalid argument, the kind of the error, and the changed fields of Call."""


@dataclass
class Call:
    """A call and its expected outcome."""

    entry: str
    dtype: str
    T: int
    B: int
    D: int
    H: int
    L: int
    R: int
    K: int | None
    gradients: bool
    jit: bool
    options: dict[str, Any]
    """The arguments that are not arrays."""
    arrays: dict[str, Any]
    """The arguments that are arrays: parameters by their canonical names, entry i of a list as
    name.i. NumPy arrays, which the framework converts, or the values that a change has set."""
    reference: dict[str, Array]
    """The valid arrays and the gradients of the results, for the expected results."""
    holes: bool = False
    """Whether the rows that no word reads are infinite or NaN."""
    frozen: set[str] = field(default_factory=set)
    """The arrays that do not require gradients."""
    changes: list[tuple[str, str]] = field(default_factory=list)
    """The changed arguments and the description of each change."""
    expect: str = "valid"
    """The expected outcome: valid results, raise, fake (valid shapes and dtypes), anything (but a
    crash), or NaN (in one row or everywhere)."""
    row: int | None = None
    names: set[str] = field(default_factory=set)
    """The arguments one of which the error must name."""
    before: Call | None = None
    """The call without its invalid changes."""

    @property
    def operator(self) -> bool:
        return self.entry in OPERATORS

    def __str__(self) -> str:
        words = [f"{name}={getattr(self, name)}" for name in "TBDHLRK"]
        words += [f"{name}={value}" for name, value in self.options.items() if name != "results"]
        words += (
            ["gradients"] * self.gradients + ["jit"] * self.jit + ["h0"] * ("h0" in self.reference)
        )
        words += ["resets"] * ("resets" in self.reference) + ["h_reset"] * (
            "h_reset" in self.reference
        )
        words += ["holes"] * self.holes
        changes = "; ".join(f"{name}: {text}" for name, text in self.changes)
        return f"{self.entry} {self.dtype} {' '.join(words)} | {changes or 'unchanged'}"


class Raw:
    """An argument that is passed without conversion."""

    def __init__(self, value: Any) -> None:
        self.value = value


def is_float(value: Any) -> bool:
    return isinstance(value, Array) and value.dtype in FLOATS.values()


def result_names(call: Call) -> list[str]:
    if call.entry == "backward":
        others = ["d_x", "d_h0"] + ["d_h_reset"] * ("resets" in call.reference)
        return [f"d_{name}.{i}" for name in LISTS for i in range(call.R)] + others
    if call.entry == "classify":
        return ["logits"]
    return ["outputs", "h_last"] + ["saved"] * (call.entry == "forward")


def draw(framework: Framework, seed: int, number: int) -> Call:
    """Draw a valid call and change it."""
    rng = default_rng([seed, number // SAME[framework.name]])
    entry = str(rng.choice(["gru", "GRU", "classify", *OPERATORS], p=[0.4, 0.15, 0.15, 0.15, 0.15]))
    operator = entry in OPERATORS
    shares = [0.5, 0.5, 0, 0] if operator else [0.4, 0.35, 0.15, 0.1]
    dtype = str(rng.choice(list(FLOATS), p=shares))
    T, B = int(rng.integers(10)), int(rng.choice([0, 1, 2, 3, 3, 4, 5, 20, 31, 70]))
    if framework.name == "jax" and operator:
        B = max(B, 1)  # XLA removes calls whose results are all empty
    if framework.name == "torch" and entry == "GRU":
        T = max(T, 1)  # like nn.GRU, the module rejects sequences without steps
    D, H = int(rng.choice([1, 5])), int(rng.choice([1, 3, 8, 17]))
    if rng.random() < 0.05:
        T, B, H = 9, 70, 40  # enough work for several threads
    R, L = int(rng.integers(1, 3)), 1 if operator else int(rng.integers(1, 3))
    tokens = entry == "classify" or (entry != "GRU" and rng.random() < 0.4)
    K = int(rng.integers(T * B > 0, 8)) if tokens else None
    rows = (T, B) if K is None else (K,)
    options: dict[str, Any] = {"reset_after": bool(rng.integers(2))}
    return_sequences = True
    if entry in ("gru", *OPERATORS):
        options["return_sequences"] = return_sequences = bool(rng.integers(2))
    names: Sequence[str] = framework.implementations
    if entry != "GRU":  # the module computes in the dtype of its arrays
        options["bfloat16"] = dtype == "float32" and kernels.bfloat16() and bool(rng.integers(2))
        names = [each for each in names if each != "loop" or not options["bfloat16"]]
        # With tokens, tools/fuzz_gru.py reproduces the rounding of a single layer.
        L = 1 if options["bfloat16"] and tokens else L
    if operator:
        sides = rng.integers(0, 2, R) if framework.name == "jax" else range(R)
        options["reverse"] = [bool(each) for each in sides]  # PyTorch's are forward, backward
        options |= {"save": bool(rng.integers(2)), "threads": int(rng.choice([-1, 0, 1, 2]))}
        options["of_x"] = bool(rng.integers(2))
    else:
        options["implementation"] = str(rng.choice(names))
    gradients = bool(rng.random() < 1 / 3) and options.get("save", True) and entry != "backward"
    has_h0, jit = operator or (entry != "classify" and rng.random() < 0.5), False
    resets = entry != "classify" and bool(rng.random() < 0.3)
    has_h_reset = resets and (operator or bool(rng.random() < 0.5))
    # The bindings validate int64 indices; the kernel validates int32 indices.
    index = np.int32 if operator or rng.random() < 0.5 else np.int64
    if framework.name == "jax" and not operator:
        # Without jit, gradients and scans take seconds to compile.
        jit = bool(rng.random() < 0.5) or options["implementation"] == "scan"
        jit = jit or (gradients and rng.random() < 0.7)
        L = 1 if gradients and options["implementation"] == "scan" else L
    elif framework.name == "jax":
        gradients = False
    # The following values do not cause a compilation in JAX.
    rng = default_rng([seed, number, 1])

    def normal(*shape: int, scale: float = 1.0) -> Array:
        return (scale * rng.standard_normal(shape)).astype(FLOATS[dtype])

    def integers(limit: int, *shape: int) -> Array:
        return rng.integers(0, max(limit, 1), shape, index)

    arrays = {"lengths": integers(T + 1, B)}
    results = {
        "d_outputs": normal(T if return_sequences else 0, B, R * H),
        "d_h_last": normal(L * R, B, H),
    }
    if K is not None:
        arrays["tokens"] = integers(K, T, B)
    if has_h0:
        arrays["h0"] = normal(L * R, B, H)
    if resets:
        arrays["resets"] = rng.random((B, T) if entry == "GRU" else (T, B)) < 0.3
    if has_h_reset:
        arrays["h_reset"] = normal(L * R, B, H)
    for name, shape in gru_shapes(D, H, L, R == 2).items():
        _, _, direction, own = name.split(".")
        entry_of_list = f"{own}.{DIRECTIONS.index(direction)}"
        arrays[entry_of_list if operator else name] = normal(*shape, scale=H**-0.5)
    if entry in ("gru", *OPERATORS):
        arrays["x"] = normal(*rows, D)
    elif entry == "GRU":
        arrays["x"] = normal(B, T, D)
        results["d_outputs"] = results["d_outputs"].swapaxes(0, 1)
        if rng.random() < 0.2:
            arrays["lengths"] = np.full(B, T, index)
    elif entry == "classify":
        arrays |= {"vectors": normal(VOCABULARY, D), "distinct": integers(VOCABULARY, K or 0)}
        arrays |= {"head.weight": normal(CLASSES, R * H), "head.bias": normal(CLASSES)}
        results = {"d_logits": normal(B, CLASSES)}
    reference = arrays | results
    holes = rng.choice([0, 0, 0, np.nan, np.inf, -np.inf])
    if entry == "GRU" and (arrays["lengths"] == T).all() and rng.random() < 0.5:
        del arrays["lengths"]
    call = Call(entry, dtype, T, B, D, H, L, R, K, gradients, jit, options, arrays, reference)
    if holes:
        call.holes = True
        name = "vectors" if entry == "classify" else "x"
        arrays[name][unread(call, name)] = holes
    if entry == "backward":
        forward = replace(call, entry="forward", options=options | {"save": True})
        forward.options["results"] = operator_results(forward)
        unused = ("bias_ih", "bias_hh", "h0", "h_reset")
        call.arrays = {n: value for n, value in arrays.items() if not n.startswith(unused)}
        call.arrays |= results | {"saved": framework.run(forward)["saved"]}
        if framework.name == "torch" and not return_sequences:
            del call.arrays["d_outputs"]
    elif framework.name == "torch" and rng.random() < 0.3:
        call.frozen = {name for name in arrays if rng.random() < 0.5}
    if operator:
        options["results"] = operator_results(call)
    change(call, framework, rng)
    return call


def operator_results(call: Call) -> list[tuple[tuple[int, ...], np.dtype]]:
    """The shapes and dtypes of an operator's results, which a caller of XLA declares."""
    T, B, H, R, dtype = call.T, call.B, call.H, call.R, FLOATS[call.dtype]
    if call.entry == "forward":
        saved = kernels.saved_size(T, B, H, call.options["reset_after"]) * call.options["save"]
        shapes = [(T * call.options["return_sequences"], B, R * H), (R, B, H), (R, saved)]
    else:
        each: list[tuple[int, ...]] = [(3 * H, call.D), (3 * H, H), (3 * H,), (3 * H,)]
        shapes = [shape for shape in each for _ in range(R)]
        shapes.append(call.reference["x"].shape if call.options["of_x"] else (0,))
        shapes += [(R, B, H), (R, B, H) if "resets" in call.reference else (0,)]
    return [(shape, dtype) for shape in shapes]


def change(call: Call, framework: Framework, rng: Generator) -> None:
    """Make up to two changes; three of five calls become invalid."""
    plans = [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)]
    valid, invalid = plans[rng.choice(5, p=[0.2, 0.2, 0.4, 0.1, 0.1])]
    call.before = snapshot(call)
    if valid:
        vary(call, framework, rng)
    if call.expect == "valid":
        call.before = snapshot(call)
    kinds: set[str] = set()
    for _ in range(invalid):
        invalidate(call, framework, rng, kinds, alone=valid + invalid == 1)


def snapshot(call: Call) -> Call:
    copies = {name: getattr(call, name).copy() for name in ("arrays", "reference", "options")}
    return replace(call, **copies, changes=call.changes.copy(), before=None)


def target(names: list[str], rng: Generator) -> str:
    """Draw a name. All parameters together count as two names; indices count twice."""
    parameters = [name for name in names if name.startswith(("gru.", "head."))]
    others = [name for name in names if name not in parameters]
    indices = [name for name in names if name in ("lengths", "tokens")]
    chosen = others + indices + [str(name) for name in rng.permutation(parameters)[:2]]
    return chosen[rng.integers(len(chosen))]


def vary(call: Call, framework: Framework, rng: Generator) -> None:
    """Pass the same numbers in another form, or other valid numbers."""
    name = target(list(call.arrays), rng)
    array = call.arrays[name]
    changes = list(framework.layouts(call, name))
    if array.dtype.kind in "iu" and not (call.operator or call.jit):
        fitting = [each for each in INTEGERS if array.max(initial=0) <= np.iinfo(each).max]
        changes += [(f"in {dtype}", array.astype(dtype)) for dtype in fitting]
    if is_float(array) and call.entry != "backward":
        constant = np.repeat(array[..., :1], array.shape[-1], -1)
        changes.append(("expanded", framework.expanded(constant)))
    if call.entry == "GRU" and framework.name == "jax" and "." in name:
        return  # a parameter of a module is always a JAX array
    text, value = changes[rng.integers(len(changes))]
    call.changes.append((name, text))
    call.arrays[name] = value
    if text == "expanded":
        call.reference[name] = constant
    if framework.name == "torch" and call.operator:
        call.expect = "valid" if framework.array(value).is_contiguous() else "raise"


def unread(call: Call, name: str) -> Array:
    """The mask of the rows of an array of inputs that no word reads."""
    padding = np.arange(call.T)[:, None] >= call.reference["lengths"]
    if call.K is None:
        return padding.T if call.entry == "GRU" else padding
    read = call.reference["tokens"][~padding]
    if call.entry == "classify":
        read = call.reference["distinct"][read]
    return ~np.isin(np.arange(len(call.reference[name])), read)


def invalidate(
    call: Call, framework: Framework, rng: Generator, kinds: set[str], *, alone: bool
) -> None:
    """Make a call invalid.

    The argument and the kind of the error differ from those of previous changes, so that the errors
    cannot compensate for each other.
    """
    done = {name for name, _ in call.changes}
    names = [name for name in call.arrays if name not in done]
    if call.entry == "GRU":  # its parameters are attributes
        names = [name for name in names if "." not in name]
    if call.operator:
        names += ["lists", *(["reverse", "results"] if framework.name == "jax" else [])]
    else:
        names += ["implementation"] + ["parameters"] * (call.entry != "GRU")
    if call.entry != "GRU" and call.dtype == "float64":
        names.append("bfloat16")
    if framework.name == "torch" and alone and rng.random() < 0.25:  # fake tensors are slow
        names.append("everything")
    name = target([each for each in names if each not in done], rng)
    if name in call.arrays:
        changes, row = invalid_arrays(call, framework, name, rng)
    else:
        changes, row = invalid_arguments(call, framework, name, rng), None
    unusual = ("anything", "fake")
    excluded = kinds if alone else kinds.union(unusual)
    changes = [each for each in changes if each[1] not in excluded]
    if not changes:
        return
    text, kind, fields = changes[rng.integers(len(changes))]
    kinds.add(kind)
    call.changes.append((name, text))
    call.names |= {"shape": set(call.reference) | {name}, "missing": set()}.get(kind, {name})
    for field_name, value in fields.items():
        setattr(call, field_name, value)
    call.jit = call.jit and not isinstance(call.arrays.get(name), Raw)
    if kind in unusual:
        call.expect = kind
    elif kind != "value" or framework.name == "torch" or not (call.jit or call.operator):
        call.expect = "raise"
    elif call.expect == "valid":
        # Only the kernel knows the value.
        call.expect, call.gradients = "NaN", False
        call.row = None if call.entry == "backward" else row


def invalid_arrays(
    call: Call, framework: Framework, name: str, rng: Generator
) -> tuple[list[Change], int | None]:
    """The invalid values of an array, and the row of the batch with an invalid index."""
    array, torch = call.arrays[name], framework.name == "torch"
    values: list[tuple[str, str, Any]] = []
    if torch or not call.operator:
        values.append(("a string", "type", Raw("words")))
        if name not in optional(call):
            values.append(("None", "shape" if name == "tokens" else "type", Raw(None)))
    if torch and (call.entry, name) != ("GRU", "lengths"):
        values += [("a list", "type", Raw(array.tolist())), ("NumPy", "type", Raw(array))]
    if torch:
        values.append(("on meta", "anything", Raw(framework.array(array).to("meta"))))
        values.append(("sparse", "type", Raw(framework.array(array).to_sparse())))
    others = ["complex64", "bool", "int64" if call.operator or is_float(array) else "float64"]
    others += list(FLOATS) if is_float(array) else ["float32"]
    for dtype in others:
        if FLOATS.get(dtype, np.dtype(dtype)) != array.dtype:
            values.append((f"as {dtype}", "type", array.astype(FLOATS.get(dtype, dtype))))

    for axis in pinned(call, name):
        first = array.swapaxes(0, axis)
        size = len(first)
        for other in {1, size - 1, size + 1} - {size, -1}:
            resized = np.resize(first, (other, *first.shape[1:])).swapaxes(0, axis)
            if (name, axis, other) != ("d_outputs", 0, 0):  # the value of an absent d_outputs
                values.append((f"axis {axis} of size {other}", "shape", resized))
    any_batch = (call.entry, name) == ("GRU", "x")  # accepts fewer or, in JAX, more dimensions
    if not any_batch:
        values.append(("an axis more", "shape", array[None]))
    if array.ndim > 1:
        values.append(("flat", "shape", array.flatten()))
        if array.shape != array.swapaxes(0, -1).shape:
            values.append(("transposed shape", "shape", array.swapaxes(0, -1)))
    if len(array) and not any_batch:
        values.append(("an axis less", "shape", array[0]))

    row = None
    limit = {"lengths": call.T + 1, "tokens": call.K, "distinct": VOCABULARY}.get(name)
    if limit is not None and array.size and not (name == "distinct" and call.jit):
        place = tuple(int(rng.integers(size)) for size in array.shape)
        row, valid = place[-1], int(array[place])
        invalid = [limit, -1, 2**31 - 1, -(2**31)]
        if array.dtype == np.int64:
            invalid += [2**31, 2**32 + valid, -(2**32) + valid, -(2**63), 2**63 - 1]
        for value in invalid:
            changed = array.copy()
            changed[place] = value
            values += [(f"value {value}", "value", changed)] * 4
    if call.entry == "backward" and name in ("saved", "lengths", "tokens", "resets"):
        # Values of another forward pass give wrong results, but must not cause a crash.
        values.append(("of another call", "anything", rng.permuted(array)))
    return [(text, kind, {"arrays": call.arrays | {name: v}}) for text, kind, v in values], row


def optional(call: Call) -> set[str]:
    """The arrays that may be None."""
    if call.operator:
        return {"tokens", "d_outputs", "resets", "h_reset"}
    return {"h0", "resets", "h_reset"} | ({"lengths"} if call.entry == "GRU" else set())


def pinned(call: Call, name: str) -> tuple[int, ...]:
    """The axes of an array whose size another array determines."""
    match name.partition(".")[0]:
        case "x" if call.entry == "GRU":
            return (0, 2) if {"lengths", "h0"} & set(call.arrays) else (2,)
        case "x" if call.entry == "backward" and call.K is None and call.B:
            return (0, 1, 2)  # saved has the same number of steps
        case "x":
            return (1, 2) if call.K is None else (1,)
        case "vectors" | "tokens":
            return (1,)
        case "distinct":
            return ()
    return tuple(range(call.arrays[name].ndim))


def invalid_arguments(call: Call, framework: Framework, name: str, rng: Generator) -> list[Change]:
    """The invalid values of an argument that is not an array, or of all arrays."""
    arrays, options, R = call.arrays, call.options, call.R

    def option(text: str, kind: str, **changed: Any) -> Change:
        return text, kind, {"options": options | changed}

    match name:
        case "implementation":
            return [option(f"{each!r}", "type", implementation=each) for each in ("quick", None, 3)]
        case "bfloat16":
            return [option("products of float64", "type", bfloat16=True)]
        case "parameters":
            parameters = [each for each in arrays if each.startswith(("gru.", "head."))]
            missing = str(rng.choice(parameters))
            rest = {each: value for each, value in arrays.items() if each != missing}
            without = {"arrays": rest, "names": call.names | {missing}}
            none = {each: value for each, value in arrays.items() if each not in parameters}
            return [
                *[(f"without {missing}", "missing", without)] * 3,
                ("none", "type", {"arrays": none}),
                ("None", "type", {"arrays": none | {"parameters": Raw(None)}}),
                ("a list", "type", {"arrays": none | {"parameters": Raw([arrays[missing]])}}),
            ]
        case "lists":
            base = str(rng.choice([each for each in LISTS if f"{each}.0" in arrays]))
            fewer = {each: value for each, value in arrays.items() if each != f"{base}.{R - 1}"}
            more = arrays | {f"{base}.{R}": arrays[f"{base}.0"]}
            return [
                (f"fewer {base}", "shape", {"arrays": fewer}),
                (f"more {base}", "shape", {"arrays": more}),
            ]
        case "reverse":
            reverse = options["reverse"]
            changes = [
                option("more directions", "shape", reverse=[*reverse, True]),
                option("fewer directions", "shape", reverse=reverse[1:]),
            ]
            # The values differ, because JAX identifies equal attributes of different types.
            attributes: list[tuple[str, Any]] = [
                ("reverse", np.array(reverse, np.int32) + 2),
                ("threads", np.int64(3)),
                ("reset_after", np.int32(2)),
                ("cell", np.int32(2)),  # the kernel has two
                ("cell", None),
                ("threads", None),
                ("reset_after", None),
            ]
            for key, value in attributes:
                text = f"{key} is {'missing' if value is None else value.dtype}"
                changes.append(option(text, "type", attributes={key: value}))
            return changes
        case "results":
            return invalid_results(call, rng)
    fake = "fake tensors", "fake", {"expect": "fake"}
    if call.operator:
        half = {n: v.astype(FLOATS["bfloat16"]) if is_float(v) else v for n, v in arrays.items()}
        return [fake, ("as bfloat16", "type", {"arrays": half})]
    meta = {each: Raw(framework.array(value).to("meta")) for each, value in arrays.items()}
    return [fake, ("on meta", "anything", {"arrays": meta})]


def invalid_results(call: Call, rng: Generator) -> list[Change]:
    """Invalid declarations of the results in JAX."""
    results = call.options["results"]
    place = int(rng.integers(len(result_names(call))))
    shape, dtype = results[place]
    name = result_names(call)[place]
    others = [((1, *shape), dtype, "an axis more"), (shape, np.dtype(np.int32), "int32")]
    other = FLOATS["float64" if call.dtype == "float32" else "float32"]
    others += [(shape, other, "another dtype"), (shape, FLOATS["bfloat16"], "bfloat16")]
    for axis, size in enumerate(shape):
        if (name, axis, size + 1) != ("outputs", 0, call.T):
            longer = (*shape[:axis], size + 1, *shape[axis + 1 :])
            others.append((longer, dtype, f"axis {axis} longer"))
    changed = [
        (f"{text} of {name}", [*results[:place], (shape, dtype), *results[place + 1 :]])
        for shape, dtype, text in others
    ]
    changed += [("one fewer", results[:-1]), ("one more", [*results, results[-1]])]
    return [(text, "shape", {"options": call.options | {"results": r}}) for text, r in changed]
