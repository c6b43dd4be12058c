"""Makes the calls of tools/fuzz_gru.py in PyTorch and in JAX."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import numpy as np

from common.arguments import product_dtype
from tools.fuzz_gru_calls import FLOATS, LISTS, Array, Call, Raw, result_names


class Torch:
    name = "torch"
    implementations = ("auto", "fused", "scan", "loop")
    operator_errors: tuple[type[Exception], ...] = (ValueError, TypeError, RuntimeError)

    def __init__(self) -> None:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode

        from torch_impl.classifier import classify
        from torch_impl.gru import gru
        from torch_impl.modules import GRU

        self.torch, self.fake_mode = torch, FakeTensorMode
        self.entries, self.module = {"gru": gru, "classify": like_gru(classify)}, GRU

    def threads(self, number: int) -> None:
        self.torch.set_num_threads(number)

    def array(self, value: Any) -> Any:
        """A tensor with its own memory."""
        if not isinstance(value, Array):
            return value.value if isinstance(value, Raw) else value
        if value.dtype == FLOATS["bfloat16"]:
            return self.torch.tensor(value.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.tensor(value)

    def numpy(self, tensor: Any) -> Array:
        dtype = FLOATS[str(tensor.dtype).removeprefix("torch.")]
        if tensor.is_meta or isinstance(tensor, self.torch._subclasses.FakeTensor):
            return np.broadcast_to(np.zeros((), dtype), tensor.shape)  # it has no values
        array = tensor.view(self.torch.int16) if dtype == FLOATS["bfloat16"] else tensor
        return array.numpy(force=True).view(dtype)

    def layouts(self, call: Call, name: str) -> Iterator[tuple[str, Any]]:
        """Tensors of other layouts with the same numbers."""
        torch, tensor = self.torch, self.array(call.arrays[name])
        yield "transposed", tensor.transpose(0, -1).contiguous().transpose(0, -1)
        yield "every second number", torch.stack([tensor, tensor], -1)[..., 0]
        shifted = torch.cat([tensor.new_zeros(3), tensor.flatten()])[3:]
        yield "offset", shifted.view(tensor.shape)
        if tensor.is_floating_point():
            yield "non-leaf", tensor.clone().requires_grad_() * 1
        if tensor.dtype in (torch.float32, torch.float64) and not call.operator:
            yield "negative", torch.complex(torch.zeros_like(tensor), -tensor).conj().imag

    def expanded(self, value: Array) -> Any:
        """The array with a stride of 0 in the last dimension."""
        return self.array(value)[..., :1].expand(value.shape)

    def run(self, call: Call, shared: dict[str, Array] | None = None) -> dict[str, Array]:
        """The results, and the gradients of the floating-point arrays, by name.

        The tensors of `shared` share the memory of its arrays.
        """
        torch = self.torch
        arrays = {name: self.array(value) for name, value in call.arrays.items()}
        arrays |= {name: torch.from_numpy(value) for name, value in (shared or {}).items()}
        if call.entry == "GRU":
            options = {"bidirectional": call.R == 2, "batch_first": True, **call.options}
            module = self.module(call.D, call.H, call.L, **options)
        mode: Any = self.fake_mode() if call.expect == "fake" else nullcontext()
        if call.expect == "fake":
            arrays = {name: mode.from_tensor(value) for name, value in arrays.items()}
        floats = {
            name: value.requires_grad_()
            for name, value in arrays.items()
            if call.gradients and name not in call.frozen
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        }
        with mode:
            if call.operator:
                results = self.operate(call, arrays)
            elif call.entry == "GRU":
                parameters, rest = attributes(arrays), (arrays["x"], arrays.get("h0"))
                if call.options["reset_after"]:
                    parameters = {nn_name(n): self.nn_order(v) for n, v in parameters.items()}
                keywords = {n: arrays[n] for n in ("lengths", "resets", "h_reset") if n in arrays}
                results = torch.func.functional_call(module, parameters, rest, keywords)
            else:
                positional, named = arguments(call.entry, arrays)
                results = self.entries[call.entry](*positional, **named, **call.options)
            named_results = dict(zip(result_names(call), as_tuple(results), strict=True))
            sources = [
                name
                for name, value in named_results.items()
                if f"d_{name}" in call.reference and value.requires_grad
            ]
            if floats and sources:
                gradients = torch.autograd.grad(
                    [named_results[name] for name in sources],
                    list(floats.values()),
                    [self.array(call.reference[f"d_{name}"]) for name in sources],
                    allow_unused=True,
                    materialize_grads=True,
                )
            else:
                gradients = map(torch.zeros_like, floats.values())
            named_results |= {f"d_{n}": each for n, each in zip(floats, gradients, strict=True)}
        return {name: self.numpy(value) for name, value in named_results.items()}

    def nn_order(self, value: Any) -> Any:
        """A canonical parameter in the gate order and with the signs of nn.GRU."""
        z, r, n = value.chunk(3)
        return self.torch.cat([r, -z, n])

    def operate(self, call: Call, arrays: dict[str, Any]) -> Any:
        a, o, lists = arrays, call.options, [entries(arrays, name) for name in LISTS]
        states = [a["h0" if call.entry == "forward" else "d_h_last"]]
        if call.entry == "backward":  # without biases and states
            lists[2:] = [[self.torch.zeros(3 * call.H)] * call.R] * 2
            states *= 1 if a.get("resets") is None else 2
        elif a.get("h_reset") is not None:
            states.append(a["h_reset"])
        weights = [w for row in zip_longest(*lists) for w in row if w is not None]
        flags = [o["reset_after"], o["return_sequences"], o["bfloat16"]]
        shared = (
            [a["x"], *weights, *states],
            a.get("tokens"),
            a["lengths"],
            a.get("resets"),
            flags,
        )
        if call.entry == "forward":
            return self.torch.ops.gru.forward(*shared, o["save"])
        saved = (a.get("d_outputs"), a["d_h_last"], a["saved"], o["of_x"])
        d_x, *gradients = self.torch.ops.gru.backward(*shared, *saved)
        by_name = [each for i in range(4) for each in gradients[i : 4 * call.R : 4]]
        return [*by_name, d_x, *gradients[4 * call.R :]]


class Jax:
    name = "jax"
    implementations = ("auto", "fused", "fused", "fused", "scan")
    operator_errors: tuple[type[Exception], ...] = (Exception,)

    def __init__(self) -> None:
        import jax
        from flax import nnx

        from jax_impl.classifier import classify
        from jax_impl.gru import gru
        from jax_impl.modules import GRU

        jax.config.update("jax_enable_x64", True)
        self.jax, self.nnx = jax, nnx
        self.entries, self.gru = {"gru": gru, "classify": like_gru(classify)}, GRU
        self.module, self.function = lru_cache(8)(self.new_module), lru_cache(8)(self.new_function)

    def threads(self, number: int) -> None:
        os.environ["GRU_NUM_THREADS"] = str(number)

    def array(self, value: Any) -> Any:
        if isinstance(value, Array):
            return self.jax.numpy.asarray(value)
        return value.value if isinstance(value, Raw) else value

    def layouts(self, call: Call, name: str) -> Iterator[tuple[str, Any]]:
        """Objects with the same numbers that JAX accepts as arrays."""
        array = call.arrays[name]
        if call.entry == "GRU" and "." in name:
            return
        yield "NumPy", Raw(array)
        yield "NumPy, transposed", Raw(np.asfortranarray(array))
        yield "NumPy, backwards", Raw(np.ascontiguousarray(array[::-1])[::-1])
        # A list of numbers has one of these dtypes, and an empty list has no shape.
        if (
            array.size
            and array.dtype in (np.float64, np.int64)
            and not (call.operator or call.jit or call.gradients)
        ):
            yield "list", Raw(array.tolist())

    def expanded(self, value: Array) -> Any:
        """The array with a stride of 0 in the last dimension."""
        return Raw(np.broadcast_to(value[..., :1], value.shape))

    def new_module(self, D: int, H: int, L: int, R: int, options: tuple) -> Any:
        rngs = self.nnx.Rngs(0)
        return self.nnx.split(self.gru(D, H, L, bidirectional=R == 2, rngs=rngs, **dict(options)))

    def new_function(
        self, entry: str, sizes: tuple, options: tuple, gradients: bool, jit: bool
    ) -> Callable[[dict, dict, tuple], tuple[tuple, dict]]:
        """A function of floating-point arrays, other arrays and gradients of the results.

        It returns the results and the gradients of the floating-point arrays.
        """

        def results(floats: dict, others: dict) -> tuple:
            arrays = floats | others
            if entry == "GRU":
                definition, state = self.module(*sizes, options)
                values = {n: state[n].replace(each) for n, each in attributes(arrays).items()}
                module = self.nnx.merge(definition, self.nnx.State(values))
                named = {n: arrays[n] for n in ("resets", "h_reset") if n in arrays}
                return module(arrays["x"], arrays.get("lengths"), arrays.get("h0"), **named)
            positional, named = arguments(entry, arrays)
            return as_tuple(self.entries[entry](*positional, **named, **dict(options)))

        def function(floats: dict, others: dict, d_results: tuple) -> tuple[tuple, dict]:
            if not gradients:
                return results(floats, others), {}
            primals, pull = self.jax.vjp(lambda floats: results(floats, others), floats)
            return primals, pull(d_results)[0]

        return self.jax.jit(function) if jit else function

    def run(self, call: Call, shared: dict[str, Array] | None = None) -> dict[str, Array]:
        """The results, and the gradients of the floating-point arrays, by name.

        XLA reads the memory of `shared` in place.
        """
        arrays = {name: self.array(value) for name, value in call.arrays.items()}
        arrays |= shared or {}
        floats, others = {}, {}
        for name, value in arrays.items():
            is_array = isinstance(value, Array | self.jax.Array)
            (floats if is_array and value.dtype in FLOATS.values() else others)[name] = value
        if call.operator:
            results, gradients = self.operate(call, arrays), {}
        else:
            names = result_names(call) if call.gradients else []
            d_results = tuple(self.array(call.reference[f"d_{name}"]) for name in names)
            sizes, options = (call.D, call.H, call.L, call.R), tuple(call.options.items())
            function = self.function(call.entry, sizes, options, call.gradients, call.jit)
            results, gradients = function(floats, others, d_results)
        named_results = dict(zip(result_names(call), results, strict=True))
        named_results |= {f"d_{name}": value for name, value in gradients.items()}
        return {name: np.asarray(value) for name, value in named_results.items()}

    def operate(self, call: Call, arrays: dict[str, Any]) -> Any:
        a, o, lists = arrays, call.options, [entries(arrays, name) for name in LISTS]
        last = a.get("tokens", np.zeros(0, np.int32)), a["lengths"]
        last += (a.get("resets", np.zeros(0, bool)),)
        if call.entry == "forward":
            none = np.zeros(0, FLOATS[call.dtype])
            lists.append([a["x"], a["h0"], a.get("h_reset", none), *last])
        else:
            lists[2:] = [[a["x"], a["d_outputs"], a["d_h_last"], a["saved"], *last]]
        operands = [each for some in lists for each in some]
        attributes_ = {
            "reverse": np.array(o["reverse"], np.int64),
            "reset_after": np.bool_(o["reset_after"]),
            "bfloat16": np.bool_(o["bfloat16"]),
            "cell": np.int32(0),
            "threads": np.int32(o["threads"]),
        } | o.get("attributes", {})
        attributes_ = {name: value for name, value in attributes_.items() if value is not None}
        results = [self.jax.ShapeDtypeStruct(*each) for each in o["results"]]
        function = self.jax.ffi.ffi_call(f"gru_{call.entry}", results)
        return self.jax.block_until_ready(function(*operands, **attributes_))[
            : len(result_names(call))
        ]


Framework = Torch | Jax
FRAMEWORKS: dict[str, type[Framework]] = {"torch": Torch, "jax": Jax}


def entries(arrays: dict[str, Any], name: str) -> list[Any]:
    """The list of the arrays name.0, name.1, ..."""
    return [arrays[each] for each in sorted(arrays) if each.startswith(f"{name}.")]


def nn_name(name: str) -> str:
    """The name in nn.GRU of the attribute gru_LAYER_DIRECTION_NAME."""
    _, layer, direction, own = name.split("_", 3)
    return f"{own}_l{layer}{'_reverse' if direction == 'backward' else ''}"


def attributes(arrays: dict[str, Any]) -> dict[str, Any]:
    """The parameters by the names of their attributes in GRU."""
    own = {name: value for name, value in arrays.items() if name.startswith("gru.")}
    return {name.replace(".", "_"): value for name, value in own.items()}


def like_gru(classify: Callable[..., Any]) -> Callable[..., Any]:
    """classify with the argument bfloat16 of gru() in place of product_dtype."""

    def run(*arguments: Any, bfloat16: bool, **options: Any) -> Any:
        return classify(*arguments, product_dtype=product_dtype(bfloat16), **options)

    return run


def arguments(entry: str, arrays: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The positional and the keyword arguments of gru() or classify(), without the options."""
    own = {name: value for name, value in arrays.items() if name.startswith(("gru.", "head."))}
    parameters = arrays.get("parameters", own)
    if entry == "gru":
        named = {n: arrays[n] for n in ("tokens", "resets", "h_reset") if n in arrays}
        return [parameters, arrays["x"], arrays["lengths"], arrays.get("h0")], named
    return [parameters, *(arrays[n] for n in ("vectors", "distinct", "tokens", "lengths"))], {}


def as_tuple(results: Any) -> tuple:
    return tuple(results) if isinstance(results, tuple | list) else (results,)
