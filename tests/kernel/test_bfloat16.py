"""Products in bfloat16: the kernel, both twins and the command line."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import jax_impl.bfloat16
import jax_impl.fused
import jax_impl.gru
import jax_impl.learner
import torch_impl.bfloat16
import torch_impl.fused
import torch_impl.gru
import torch_impl.learner
from common import kernels
from common.data.batches import Inputs
from common.inference import prediction
from common.inference.model import Model
from common.kernels import build
from common.params import DIRECTIONS, PRODUCT_DTYPES, ModelConfig, init
from common.training import loop, run_directory
from tests import cases
from tests.cases import (
    MOST,
    Array,
    Arrays,
    Case,
    apart,
    call_kernel,
    instruction_sets,
    reference,
)
from tools import emulation
from tools.rounding_oracle import product, rounding_oracle

each_reset = pytest.mark.parametrize("reset_after", [False, True])
instruction_set = instruction_sets("amx", "avx512bf16", "avx512", "avx2", "baseline", "emulated")
# T, B, D, H, K. Without K there are no tokens, of an odd B there are resets, of an even D two
# directions.
SIZES = [
    (1, 1, 1, 1, 0),
    (1, 2, 4, 3, 2),
    (2, 5, 7, 9, 0),
    (3, 6, 34, 17, 11),
    (4, 19, 20, 40, 0),
    (5, 33, 41, 33, 101),
    (9, 8, 10, 64, 150),
    (2, 9, 66, 70, 0),
    (1, 3, 801, 6, 0),
]
needs_kernel = pytest.mark.skipif(not kernels.available(), reason="the kernel has not been built")
FUSED = {"torch": torch_impl.fused, "jax": jax_impl.fused}
FRAMEWORKS = {"torch": torch_impl.learner, "jax": jax_impl.learner}
HERE = [name for name, fused in FUSED.items() if fused.available("cpu", "bfloat16")]


@pytest.fixture(scope="module")
def emulated_library(emulated_kernel: Path) -> ctypes.CDLL:
    """The kernel with an emulated matrix unit, which it selects by default."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "PATH", emulated_kernel)
        return kernels.library.__wrapped__()


@pytest.fixture
def amx(emulated_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """The kernel in use is the emulated one, which uses the tiles."""
    monkeypatch.setattr(kernels, "library", lambda: emulated_library)
    assert emulated_library.gru_instruction_set(b"amx") == b"amx"
    products = emulated_library.emulated_tiles_products()
    yield emulated_library
    assert emulated_library.emulated_tiles_products() > products


def draw(T: int, B: int, D: int, H: int, K: int, seed: int = 0, cell: str = "gru") -> Case:
    sides = DIRECTIONS[: 2 - D % 2]
    return cases.draw(T, B, D, H, K, sides=sides, dtype=np.float32, seed=seed, cell=cell)


def references(drawn: list[Case], reset_after: bool) -> tuple[list[Arrays], list[Arrays]]:
    """The oracle's results, with rounded products and with exact ones."""
    rounds = {"module": rounding_oracle(inputs=False), "times": product}
    exact = [reference(case, reset_after) for case in drawn]
    return [reference(case, reset_after, **rounds) for case in drawn], exact


def by_torch(case: Case, reset_after: bool, implementation: str) -> Arrays:
    """The results of PyTorch, with products in bfloat16."""
    arguments = case.arguments(lambda a: torch.tensor(a, requires_grad=a.dtype.kind == "f"))
    options = {"reset_after": reset_after, "implementation": implementation, "bfloat16": True}
    outputs, h_last = torch_impl.gru.gru(**arguments, **options)
    cotangents = torch.tensor(case.d_outputs), torch.tensor(case.d_h_last)
    torch.autograd.backward((outputs, h_last), cotangents)
    leaves = {f"d_{n}": arguments[n] for n in ("x", "h0", "h_reset") if n in arguments}
    gradients = {name: each.grad for name, each in (leaves | arguments["parameters"]).items()}
    result = {"outputs": outputs, "h_last": h_last} | gradients
    return {name: value.detach().numpy() for name, value in result.items()}


@partial(jax.jit, static_argnames=("reset_after", "implementation"))
def pulled(floats: dict, others: dict, cotangents: tuple, **how: bool | str) -> dict:
    """Compiled once for all draws of a size."""
    results, pull = jax.vjp(
        lambda floats: jax_impl.gru.gru(**floats, **others, **how, bfloat16=True), floats
    )
    return {"outputs": results[0], "h_last": results[1]} | pull(cotangents)[0]


def by_jax(case: Case, reset_after: bool, implementation: str) -> Arrays:
    """The results of JAX, with products in bfloat16."""
    arguments = case.arguments(np.asarray)
    others = {
        name: arguments.pop(name) for name in ("lengths", "tokens", "resets") if name in arguments
    }
    options = {"reset_after": reset_after, "implementation": implementation}
    result = pulled(arguments, others, (case.d_outputs, case.d_h_last), **options)
    result |= result.pop("parameters") | {
        f"d_{n}": result.pop(n) for n in arguments if n != "parameters"
    }
    return {name: np.asarray(value) for name, value in result.items()}


TWINS = {"torch": by_torch, "jax": by_jax}


def kernel(case: Case, reset_after: bool, threads: int = 1) -> Arrays:
    results = call_kernel(case, reset_after, threads=threads, shared=True, bfloat16=True)
    assert emulation.fault(kernels.library()) is None
    return results


@needs_kernel
@each_reset
@pytest.mark.parametrize("size", SIZES)
def test_kernel(size: tuple, reset_after: bool, instruction_set: None) -> None:
    drawn = [draw(*size, seed=seed) for seed in range(8)]
    expected, exact = references(drawn, reset_after)
    result = apart([kernel(case, reset_after) for case in drawn], expected, exact)
    assert max(result.values()) < MOST, result


@needs_kernel
@pytest.mark.parametrize("size", SIZES)
def test_kernel_of_the_tanh_rnn(size: tuple, instruction_set: None) -> None:
    drawn = [draw(*size, seed=seed, cell="rnn") for seed in range(8)]
    expected, exact = references(drawn, False)
    result = apart([kernel(case, False) for case in drawn], expected, exact)
    assert max(result.values()) < MOST, result


@needs_kernel
def test_one_step_is_exact(instruction_set: None) -> None:
    """Forward, with the reset after the product, all that is rounded is an input: so nothing rounds
    to a neighbour, and what is left are the sums of D + H exact products, and the activations. Half
    of the inputs are halfway between two bfloat16 numbers."""
    case = draw(1, 7, 23, 45, 0)
    rng = np.random.default_rng(0)
    case.x = (1 + rng.integers(0, 256, case.x.shape) / 256).astype(np.float32)
    case.x *= rng.choice(np.float32([-1, 1]), case.x.shape)
    expected = references([case], True)[0][0]["outputs"]
    W, U, b, c = map(np.abs, case.weights[0])
    states = np.maximum(np.abs(case.h0[0]), np.abs(case.h_reset[0]))
    terms = (np.abs(case.x[0]) @ W.T + states @ U.T + b + c).max()
    error = np.abs(kernel(case, True)["outputs"] - expected).max()
    assert error < (23 + 45 + 8) * 2**-24 * terms < 2**-12


@needs_kernel
def test_the_instruction_rounds_as_its_emulation_does() -> None:
    lib = kernels.library()
    best = lib.gru_instruction_set(None)
    if not lib.gru_instruction_set(b"avx512bf16"):
        pytest.skip("this processor lacks it")
    for size in SIZES:
        result = []
        for name in (b"avx512bf16", b"avx512"):
            lib.gru_instruction_set(name)
            result.append(kernel(draw(*size), False))
        lib.gru_instruction_set(best)
        assert all(np.array_equal(result[0][name], result[1][name]) for name in result[0])


@needs_kernel
def test_threads_do_not_matter() -> None:
    case = draw(20, 33, 64, 64, 600)
    one, two = (kernel(case, False, threads=threads) for threads in (1, 2))
    assert all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("size", [(0, 3, 2, 4, 2), (3, 0, 2, 4, 2), (2, 3, 0, 4, 0)])
def test_sizes_of_zero_on_the_matrix_unit(size: tuple, amx: ctypes.CDLL) -> None:
    results = kernel(draw(*size), False) | kernel(draw(2, 1, 1, 1, 0), False)
    assert all(np.isfinite(result).all() for result in results.values())


def test_the_tiles_of_another_library(amx: ctypes.CDLL) -> None:
    """Another library's tile configuration and values are in place before each product."""
    case = draw(6, 53, 44, 40, 0)
    alone = kernel(case, True, threads=2)
    amx.emulated_tiles_have_other_user(True)
    beside = kernel(case, True, threads=2)
    amx.emulated_tiles_have_other_user(False)
    assert all(np.array_equal(alone[name], beside[name]) for name in alone)
    one = kernel(case, True, threads=1)
    assert all(np.array_equal(alone[name], one[name]) for name in alone)


def test_an_inference_releases_the_tiles_of_every_thread(amx: ctypes.CDLL) -> None:
    """The second thread multiplies inputs only: the recurrence is too short to be shared."""
    call_kernel(draw(10, 40, 800, 4, 0), False, threads=2, backward=False, bfloat16=True)
    assert emulation.fault(amx) is None


def test_the_matrix_unit_after_a_fork(amx: ctypes.CDLL) -> None:
    case = draw(6, 53, 44, 40, 0)
    expected = kernel(case, True)
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # kills the child if it hangs
        actual = kernel(case, True, threads=2)
        differ = any(not np.array_equal(actual[name], expected[name]) for name in expected)
        os._exit(differ or emulation.fault(amx) is not None)
    assert os.waitpid(child, 0)[1] == 0


def test_floats_on_the_matrix_unit_are_those_of_avx512(amx: ctypes.CDLL) -> None:
    for dtype in (np.float32, np.float64):
        case, result = cases.draw(4, 19, 20, 40, 0, dtype=dtype), []
        for name in (b"amx", b"avx512"):
            amx.gru_instruction_set(name)
            result.append(call_kernel(case, False))
        assert all(np.array_equal(result[0][name], result[1][name]) for name in result[0])
    kernel(draw(1, 1, 1, 1, 0), False)
    amx.gru_instruction_set(b"amx")
    kernel(draw(1, 1, 1, 1, 0), False)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("refused", [False, True])
def test_the_matrix_unit_is_chosen_where_linux_grants_it(
    refused: bool, alone: bool, emulated_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Linux refuses the tiles, the next instruction set is chosen, and bfloat16 works. alone:
    of a processor without AVX-512 BF16, whose tiles alone multiply bfloat16."""
    for name, is_set in {"REFUSED": refused, "ALONE": alone}.items():
        if is_set:
            monkeypatch.setenv(f"EMULATED_TILES_{name}", "1")
    code = """if True:
        import sys
        from pathlib import Path
        from common import kernels
        from tests.cases import call_kernel, draw
        kernels.PATH = Path(sys.argv[1])
        library = kernels.library()
        print(library.gru_instruction_set(None).decode(), library.gru_instruction_set(b"amx"))
        call_kernel(draw(3, 6, 34, 17, dtype="float32"), False, bfloat16=True)
        print(library.emulated_tiles_products() > 0, kernels.bfloat16())
    """
    command = [sys.executable, "-c", code, emulated_library._name]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    has_other = not alone and emulated_library.gru_instruction_set(b"avx512bf16")
    next_set = "avx512bf16" if has_other else "avx512"
    expected = [next_set, "None", "False"] if refused else ["amx", "b'amx'", "True"]
    assert ran.stdout.split() == [*expected, str(bool(not refused or has_other))]


def test_a_compiler_that_does_not_know_the_matrix_unit(tmp_path: Path) -> None:
    """Without support in the compiler, the kernel is built without this instruction set."""
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\ncase $* in *-mamx*) exit 1; esac\n")
    compiler.chmod(0o755)
    assert build.amx_flags(str(compiler)) == []
    sources = str(build.kernel_sources([]))
    assert "avx512bf16" in sources
    assert "amx" not in sources.lower()


@needs_kernel
def test_nan_stays_nan(instruction_set: None) -> None:
    """A NaN whose bits would become -0 by rounding up remains a NaN."""
    case = draw(3, 4, 5, 6, 0)
    case.lengths[:] = 3
    case.x[0, 1] = np.uint32(0x7FFFFFFF).view(np.float32)
    outputs = kernel(case, False)["outputs"]
    assert np.isnan(outputs[:, 1]).all()
    assert np.isfinite(outputs[:, [0, 2, 3]]).all()


@needs_kernel
def test_inference_does_not_use_weights_packed_for_another() -> None:
    case, arrays = draw(2, 3, 8, 8, 0), {}
    arguments = case.arguments(torch.tensor)
    if not HERE:
        pytest.skip("fused needs the instruction")
    for bfloat16 in (False, True, False, True):
        outputs, _ = torch_impl.gru.gru(**arguments, implementation="fused", bfloat16=bfloat16)
        assert torch.equal(arrays.setdefault(bfloat16, outputs), outputs)
    assert not torch.equal(arrays[False], arrays[True])


@pytest.mark.parametrize(
    ("size", "reset_after"),
    [
        (SIZES[4], True),
        (SIZES[5], False),
        pytest.param(SIZES[2], True, marks=pytest.mark.long),
        pytest.param(SIZES[3], False, marks=pytest.mark.long),
        pytest.param(SIZES[6], True, marks=pytest.mark.long),
    ],
)
def test_twins(size: tuple, reset_after: bool) -> None:
    """scan and fused of both frameworks agree with the oracle that rounds."""
    drawn = [draw(*size, seed=seed) for seed in range(3)]
    expected, exact = references(drawn, reset_after)
    for name, twin in TWINS.items():
        for implementation in ("scan", "fused")[: 1 + (name in HERE)]:
            actual = [twin(case, reset_after, implementation) for case in drawn]
            result = apart(actual, expected, exact)
            assert max(result.values()) < MOST, (name, implementation, result)


def test_both_twins_round_every_number_to_the_nearest_bfloat16() -> None:
    """From the smallest normal number to the largest, and what a gradient is rounded to, too."""
    rng = np.random.default_rng(0)
    mantissas = np.append(rng.uniform(1, 2, 1000), [1, 1 + 2**-8, 1 + 3 * 2**-8, 2 - 2**-7])
    sizes = np.ldexp(mantissas.astype(np.float32), np.arange(-126, 127)[:, None])
    x = np.append(sizes * rng.choice([-1, 1], sizes.shape), [0, np.inf, -np.inf, 1e30])
    x = x.astype(np.float32)
    wanted_result = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    ones = np.ones_like(x)
    for rounded, back, to_rows in (
        (torch_impl.bfloat16.rounded, torch_impl.bfloat16.rounded_back, torch_rows),
        (jax_impl.bfloat16.rounded, jax_impl.bfloat16.rounded_back, jax_rows),
    ):
        for result, expected in zip(to_rows(rounded, x, x), (wanted_result, x), strict=True):
            np.testing.assert_array_equal(result, expected)
        for result, expected in zip(to_rows(back, ones, x), (ones, wanted_result), strict=True):
            np.testing.assert_array_equal(result, expected)


def torch_rows(function: Callable, x: Array, gradient: Array) -> tuple[Array, Array]:
    """What a function of torch_impl returns, and the gradient that it passes on."""
    leaf = torch.tensor(x, requires_grad=True)
    result = function(leaf)
    result.backward(torch.tensor(gradient))
    assert leaf.grad is not None
    return result.detach().numpy(), leaf.grad.numpy()


def jax_rows(function: Callable, x: Array, gradient: Array) -> tuple[Array, Array]:
    """What a function of jax_impl returns, and the gradient that it passes on."""
    result, pull = jax.vjp(jax.jit(function), x)
    return np.asarray(result), np.asarray(pull(gradient)[0])


@pytest.mark.parametrize("implementation", [pytest.param("scan", marks=pytest.mark.long), "fused"])
def test_further_derivatives(implementation: str) -> None:
    """Forward mode, and the gradient's gradient, differ from those in float32 by bfloat16's 2^-8,
    give or take a factor for the way there; and PyTorch compiles them."""
    if implementation == "fused" and len(HERE) < 2:
        pytest.skip("fused needs the instruction")
    case = draw(2, 3, 5, 6, 0)
    lengths, along = case.lengths, np.ones_like(case.x)
    parameters = {name: torch.tensor(value) for name, value in case.parameters.items()}

    def by_torch(x: torch.Tensor, bfloat16: bool) -> torch.Tensor:
        options = {"implementation": implementation, "bfloat16": bfloat16}
        return torch_impl.gru.gru(parameters, x, torch.tensor(lengths), **options)[0].sin().sum()

    def by_jax(x: jax.Array, bfloat16: bool) -> jax.Array:
        options = {"implementation": implementation, "bfloat16": bfloat16}
        return jnp.sin(jax_impl.gru.gru(case.parameters, x, lengths, **options)[0]).sum()

    def derivatives(bfloat16: bool) -> list[Array]:
        x, push = torch.tensor(case.x, requires_grad=True), torch.tensor(along)
        f, g = partial(by_torch, bfloat16=bfloat16), partial(by_jax, bfloat16=bfloat16)
        compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
        return [
            torch.func.jvp(f, (x.detach(),), (push,))[1].numpy(),
            torch.autograd.functional.hvp(f, x, push)[1].numpy(),
            torch.autograd.grad(compiled(x), x)[0].numpy(),
            torch.func.vmap(torch.func.grad(f))(torch.stack([x, x]))[1].detach().numpy(),
            *jax.jit(
                lambda x: (
                    jax.jvp(g, (x,), (along,))[1],
                    jax.jvp(jax.grad(g), (x,), (along,))[1],
                    jax.grad(lambda x: (jax.grad(g)(x) * along).sum())(x),
                    jax.vmap(jax.grad(g))(jnp.stack([x, x]))[1],
                )
            )(case.x),
        ]

    for actual, expected in zip(derivatives(True), derivatives(False), strict=True):
        error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
        assert 0 < error < 4 * 2**-8


@pytest.mark.parametrize("implementation", ["auto", "scan"])
def test_float64_is_refused(implementation: str) -> None:
    case = draw(2, 2, 2, 2, 0)
    options = {"implementation": implementation, "bfloat16": True}
    doubles = {name: torch.tensor(value).double() for name, value in case.parameters.items()}
    with pytest.raises(TypeError, match="requires float32 arrays"):
        torch_impl.gru.gru(doubles, torch.tensor(case.x).double(), torch.tensor([2, 2]), **options)
    with jax.enable_x64(True), pytest.raises(TypeError, match="requires float32 arrays"):
        wide = {name: jnp.asarray(value, float) for name, value in case.parameters.items()}
        jax_impl.gru.gru(wide, jnp.asarray(case.x, float), case.lengths, **options)


def test_arrays_in_bfloat16_differ_from_products_in_bfloat16() -> None:
    """Arrays in bfloat16 are converted to float32; only bfloat16=True rounds the products."""
    case = draw(3, 2, 4, 5, 0)
    parameters = {name: torch.tensor(value).bfloat16() for name, value in case.parameters.items()}
    arguments = (parameters, torch.tensor(case.x).bfloat16(), torch.tensor(case.lengths))
    plain, low = (torch_impl.gru.gru(*arguments, bfloat16=rounds)[0] for rounds in (False, True))
    assert plain.dtype == low.dtype == torch.bfloat16
    floats = {name: value.float() for name, value in parameters.items()}
    assert torch.equal(
        plain, torch_impl.gru.gru(floats, arguments[1].float(), arguments[2])[0].bfloat16()
    )
    assert not torch.equal(plain, low)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux")
@needs_kernel
def test_processor_support_is_detected() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    has_avx512 = {"avx512dq", "avx512vl"} <= set(flags)
    assert kernels.bfloat16() == (has_avx512 and bool({"avx512_bf16", "amx_bf16"} & set(flags)))
    for fused in FUSED.values():
        assert fused.available("cpu", "bfloat16") == (fused.available() and kernels.bfloat16())


def main_of(framework: ModuleType, tool: ModuleType = loop) -> Callable[[], None]:
    return partial(tool.main, framework)


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("torch", True),
        ("jax", False),
        pytest.param("torch", False, marks=pytest.mark.long),
        pytest.param("jax", True, marks=pytest.mark.long),
    ],
)
def test_run_with_products_in_bfloat16(
    name: str,
    there: bool,
    command: Callable[..., tuple[int, str, str]],
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Training and prediction in both frameworks, with and without the bfloat16 instruction."""
    if there and name not in HERE:
        pytest.skip("fused needs the instruction")
    if not there:
        for fused in FUSED.values():
            monkeypatch.setattr(fused, "DTYPES", kernels.DTYPES)
    few = ("--train-size", 64, "--test-size", 32)  # XLA compiles for each shape of a batch
    arguments = [*small, *few, "--model", "bigru", "--epochs", 1, "--dtype", "bfloat16"]
    status, output, error = command(main_of(FRAMEWORKS[name]), *arguments, "--out", tmp_path)
    assert (status, error) == (0, "")
    assert f"bigru ({'fused' if there else 'scan'}, bfloat16)" in output
    assert ("computed by scan" in output) != there

    config = json.loads((tmp_path / "config.json").read_text())
    assert config["options"]["dtype"] == config["model"]["dtype"] == "bfloat16"
    texts = ["a moving and wonderful film", "dull , tired and boring"]
    answers = [command(main_of(each, prediction), tmp_path, *texts) for each in FRAMEWORKS.values()]
    assert [(answer[0], answer[2]) for answer in answers] == [(0, "")] * 2
    # Two answers may be apart by what rounding changes: 2^-8, and less of a probability.
    assert np.ptp([float(answer[1].split("\t")[1]) for answer in answers]) < 2**-8

    run = run_directory.load_run(tmp_path)
    plain = dataclasses.replace(run, model=dataclasses.replace(run.model, dtype="float32"))
    logits, others = (Model(FRAMEWORKS[name], each).logits(texts) for each in (run, plain))
    assert 0 < np.abs(logits - others).max() < 2**-5


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_the_models_dtype_is_the_product_dtype_of_each_call(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's dtype reaches each call; another name is refused."""
    gru = {"torch": torch_impl.gru, "jax": jax_impl.gru}[name]
    observed: list[str] = []
    for implementation, recurrence in gru.RECURRENCES.items():

        def compute(call: Any, then: Any = recurrence.compute) -> Any:
            observed.append(call.product_dtype)
            return then(call)

        changed = dataclasses.replace(recurrence, compute=compute, try_inference_kernel=None)
        monkeypatch.setitem(gru.RECURRENCES, implementation, changed)
    inputs = Inputs(np.zeros(1, np.int32), np.zeros((2, 1), np.int32), np.array([2], np.int32))
    vectors = np.zeros((1, 3), np.float32)
    for dtype in PRODUCT_DTYPES:
        config = ModelConfig(3, 4, vocabulary_size=1, dtype=dtype)
        FRAMEWORKS[name].Predictor(config, init(config, 0, vectors), vectors).logits(inputs)
    assert observed == [*PRODUCT_DTYPES]
    config = ModelConfig(3, 4, vocabulary_size=1, dtype="bf16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="product_dtype: expected float32 or bfloat16, found 'bf1"):
        FRAMEWORKS[name].Predictor(config, init(config, 0, vectors), vectors).logits(inputs)


@pytest.mark.parametrize("model", ["rnn", "nn.gru"])
def test_models_without_bfloat16(
    model: str, command: Callable[..., tuple[int, str, str]], small: list[str]
) -> None:
    arguments = [*small, "--model", model, "--dtype", "bfloat16"]
    status, _, error = command(main_of(torch_impl.learner), *arguments)
    assert status != 0
    assert f"--model {model}: has no --dtype bfloat16" in error


@pytest.mark.parametrize("wrong", ["float32", 1, None, np.True_])
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_bfloat16_must_be_a_bool(name: str, wrong: object) -> None:
    convert = {"torch": torch.from_numpy, "jax": jnp.asarray}[name]
    gru = {"torch": torch_impl.gru.gru, "jax": jax_impl.gru.gru}[name]
    config = ModelConfig(3, 4)
    values = init(config, 0, np.zeros(0)).items()
    parameters = {n: convert(v.astype(np.float32)) for n, v in values if n.startswith("gru.")}
    x, lengths = convert(np.zeros((2, 1, 3), np.float32)), convert(np.array([2], np.int32))
    with pytest.raises(TypeError, match="bfloat16: expected True or False"):
        gru(parameters, x, lengths, bfloat16=wrong)


@contextlib.contextmanager
def lowered(name: str, precision: str) -> Iterator[None]:
    """The framework's own switch: PyTorch's "medium", JAX's "bfloat16", "highest" in both."""
    if name == "jax":
        with jax.default_matmul_precision(precision):
            yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_backward_may_have_other_products_than_forward(precision: str) -> None:
    """The gradients are precise if the switch changes in between. JAX reads the switch once."""
    if "torch" not in HERE:
        pytest.skip("fused needs the instruction")
    case, gradients = draw(6, 53, 44, 40, 0), []
    for between in (precision, "medium" if precision == "highest" else "highest"):
        arguments = case.arguments(torch.tensor)
        x = arguments["x"].requires_grad_()
        with lowered("torch", precision):
            h_last = torch_impl.gru.gru(**arguments, implementation="fused")[1]
        with lowered("torch", between):
            h_last.sum().backward()
        gradients.append(x.grad.numpy())
    expected, mixed = gradients
    assert 0 < np.linalg.norm(mixed - expected) < 2**-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", TWINS)
def test_the_switch_of_the_framework(name: str) -> None:
    """The switch has the effect of bfloat16=True on float32 arrays, forward and backward."""
    if name not in HERE:
        pytest.skip("fused needs the instruction")
    case, switch = draw(5, 6, 20, 17, 9), {"torch": "medium", "jax": "bfloat16"}[name]
    compute = {"torch": torch_impl.gru.gru, "jax": jax_impl.gru.gru}[name]
    convert = {"torch": torch.tensor, "jax": jnp.asarray}[name]

    def gradient(bfloat16: bool) -> Array:
        arguments = case.arguments(convert)
        options = {"implementation": "fused", "bfloat16": bfloat16}
        if name == "torch":
            arguments["x"].requires_grad_()
            compute(**arguments, **options)[1].sum().backward()
            return arguments["x"].grad.numpy()
        x = arguments.pop("x")
        return np.asarray(jax.grad(lambda x: compute(x=x, **arguments, **options)[1].sum())(x))

    def inference(bfloat16: bool) -> Array:
        options = {"implementation": "fused", "bfloat16": bfloat16}
        return np.asarray(compute(**case.arguments(convert), **options)[1])

    for function in (gradient, inference):
        plain, rounded = function(False), function(True)
        for precision, expected in (("highest", plain), (switch, rounded)):
            with lowered(name, precision):
                np.testing.assert_array_equal(function(False), expected)
        assert not np.array_equal(plain, rounded)
