"""The bindings of the CPU kernel to PyTorch and JAX, against each framework's scan."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_impl.fused
import jax_impl.gru
import jax_impl.layers
import jax_impl.rnn
import jax_impl.scan
import torch_impl.fused
import torch_impl.gru
import torch_impl.layers
import torch_impl.rnn
import torch_impl.scan
from common.cells import LayerCall
from common.params import DIRECTIONS, GRU_PARAMETERS, init_gru
from tests import cases
from torch_impl.inference import try_inference_kernel

pytestmark = pytest.mark.usefixtures("x64")
needs_torch = pytest.mark.skipif(not torch_impl.fused.available(), reason="no kernel")
needs_jax = pytest.mark.skipif(not jax_impl.fused.available(), reason="no kernel for JAX")
with_tokens = pytest.mark.parametrize("K", [0, 7])
both = pytest.mark.parametrize("reset_after", [False, True])
each_layer = cases.combinations(
    "000 011 101 110", K=(0, 7), directions=(1, 2), reset_after=(False, True)
)
each_number = pytest.mark.parametrize("directions", [1, 2])
T, B, D, H = 6, 4, 3, 5
CORES = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 0
HOW = {"reset_after": False, "return_sequences": True}


def layer(recurrence: Callable[[LayerCall], tuple]) -> Callable[..., tuple]:
    """A function that passes its arguments to a recurrence as a LayerCall."""
    return lambda *fields, **flags: recurrence(LayerCall(*fields, **flags))


torch_fused, torch_scan = layer(torch_impl.fused.recurrence), layer(torch_impl.scan.scan)
jax_fused, jax_scan = layer(jax_impl.fused.recurrence), layer(jax_impl.scan.scan)


def draw(
    K: int, directions: int = 1, *, H: int = H, full: bool = False, resets: bool = False
) -> dict:
    """Arguments of a recurrence, in its order; `full` makes all rows as long as the batch."""
    case = cases.draw(T, B, D, H, K, sides=DIRECTIONS[:directions], resets=resets)
    lengths = np.array([T] * B if full else [3, 6, 0, 5], np.int32)
    names = ("x", "tokens", "weights", "lengths", "h0", *("resets", "h_reset") * resets)
    return {name: lengths if name == "lengths" else getattr(case, name) for name in names}


def tensors(arguments: dict) -> list:
    """The arguments as tensors; the floating-point ones require gradients."""

    def tensor(each: np.ndarray) -> torch.Tensor:
        return torch.tensor(each, requires_grad=each.dtype == np.float64)

    return [jax.tree.map(tensor, each) for each in arguments.values()]


def arrays(arguments: dict) -> list:
    return [jax.tree.map(jnp.array, each) for each in arguments.values()]


def differentiable(arguments: list) -> list[torch.Tensor]:
    return [each for each in jax.tree.leaves(arguments) if each.dtype == torch.float64]


WITHOUT_LIBRARY = """
import sys
from pathlib import Path
from common import kernels

kernels.PATH = Path("absent.so")

import jax.numpy, jax_impl.gru, numpy as np, torch, torch_impl.gru
from common.params import init_gru
from torch_impl import inference

assert inference.COMPUTE is None
drawn, rng = init_gru(3, 5, 1, True, seed=0), np.random.default_rng(0)
x, lengths = rng.normal(size=(6, 4, 3)).astype(np.float32), np.array([3, 6, 0, 5], np.int32)

def outputs(gru, array, implementation):
    weights = {name: array(each.astype(np.float32)) for name, each in drawn.items()}
    return np.asarray(gru(weights, array(x), array(lengths), implementation=implementation)[0])

want = outputs(torch_impl.gru.gru, torch.tensor, "loop")
for implementation in ("auto", "scan"):
    found = outputs(torch_impl.gru.gru, torch.tensor, implementation)
    np.testing.assert_allclose(found, want, atol=1e-6)
    found = outputs(jax_impl.gru.gru, jax.numpy.array, implementation)
    np.testing.assert_allclose(found, want, atol=1e-6)
"""


def test_both_twins_compute_without_the_library() -> None:
    """Without a compiler, no library is built, and both frameworks compute with scan."""
    subprocess.run([sys.executable, "-c", WITHOUT_LIBRARY], check=True)


@needs_torch
@each_layer
def test_torch_gradients(K, directions, reset_after):
    arguments = tensors(draw(K, directions))
    options = {**HOW, "reset_after": reset_after}
    actual = torch_fused(*arguments, **options)
    torch.testing.assert_close(actual, torch_scan(*arguments, **options), rtol=0, atol=1e-12)
    tree = jax.tree.structure(arguments)
    inputs = jax.tree.leaves(arguments)

    def function(*floats):
        floats = iter(floats)
        leaves = [next(floats) if each.dtype == torch.float64 else each for each in inputs]
        return torch_fused(*jax.tree.unflatten(tree, leaves), **options)

    assert torch.autograd.gradcheck(function, differentiable(arguments))


def operands(arguments: list, directions: int = 1) -> list:
    """The arrays of the operator, as leaves that require gradients."""
    x, _, weights, _, *states = arguments
    states = [torch.cat([state] * directions) for state in states[::2]]  # h0, h_reset
    inputs = [x, *weights[0] * directions, *states]
    return [each.detach().requires_grad_() for each in inputs]


@needs_torch
@cases.combinations(
    "0000 0111 1011 1101 1110",
    resets=(False, True),
    return_sequences=(False, True),
    K=(0, 7),
    reset_after=(False, True),
)
def test_torch_operator(resets, return_sequences, K, reset_after):
    """The schema, the shapes without data and the dispatch under torch.compile are right."""
    arguments = tensors(draw(K, full=True, resets=resets))
    places = (arguments[1], arguments[3], arguments[5] if resets else None)
    flags = [reset_after, return_sequences, False]
    inputs = (operands(arguments, 2), *places, flags, True)
    torch.library.opcheck(torch_impl.fused.forward_operator, inputs)


class Recur(torch.nn.Module):
    def forward(self, *arguments):
        return torch_fused(*arguments, **HOW)


@needs_torch
def test_torch_compile_and_export():
    arguments = tensors(draw(7))
    wanted_result = Recur()(*arguments)
    compiled = torch.compile(Recur(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Recur(), tuple(arguments)).module()
    for each in (compiled, exported):
        actual = each(*arguments)
        torch.testing.assert_close(actual, wanted_result, rtol=0, atol=0)
        gradients = torch.autograd.grad(sum(x.sum() for x in actual), differentiable(arguments))
        expected = torch.autograd.grad(
            sum(x.sum() for x in wanted_result), differentiable(arguments), retain_graph=True
        )
        torch.testing.assert_close(gradients, expected, rtol=0, atol=0)


@needs_torch
@with_tokens
@pytest.mark.parametrize("wanted", [0, 1])
def test_torch_gradient_of_one_result_alone(wanted, K):
    """If only outputs or only h_last has a gradient, backward receives None for the other one."""
    arguments = tensors(draw(K))
    actual, expected = Recur()(*arguments), torch_scan(*arguments, **HOW)
    gradients = [
        torch.autograd.grad(result[wanted].sum(), differentiable(arguments))
        for result in (actual, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@needs_torch
@pytest.mark.parametrize("create_graph", [False, True])
def test_torch_operator_refuses_a_second_derivative(create_graph):
    """The operator called by name raises; only the layer has a second derivative."""
    arguments = tensors(draw(7))
    inputs = operands(arguments)
    options = (arguments[1], arguments[3], None, [False, True, False], True)
    _, h_last, _ = torch.ops.gru.forward(inputs, *options)
    (gradient,) = torch.autograd.grad((h_last**2).sum(), inputs[0], create_graph=create_graph)
    assert gradient.requires_grad == create_graph
    if create_graph:
        with pytest.raises(RuntimeError, match='implementation="scan"'):
            gradient.sum().backward()


@needs_torch
def test_torch_operator_refuses_forward_mode():
    arguments = tensors(draw(7))
    *inputs, h0 = operands(arguments)

    def last(h0):
        options = (arguments[1], arguments[3], None, [False, True, False], False)
        return torch.ops.gru.forward([*inputs, h0], *options)[1]

    with pytest.raises(RuntimeError, match='implementation="scan"'):
        torch.func.jvp(last, (h0.detach(),), (h0.detach(),))


@needs_torch
def test_torch_backward_allocates_no_zero_gradient_of_saved():
    """Writing such zeros would take as long as the whole forward pass."""
    arguments = tensors(draw(0))
    _, h_last = Recur()(*arguments)
    with torch.profiler.profile(record_shapes=True) as profile:
        h_last.sum().backward()
    filled = [
        e.input_shapes[0] for e in profile.events() if e.name in ("aten::fill_", "aten::zero_")
    ]
    assert max(map(np.prod, filled)) < T * B * H


@needs_torch
def test_torch_takes_any_layout_and_refuses_other_types():
    arguments = tensors(draw(7))
    expected = torch_fused(*arguments, **HOW)

    def strided(each):
        return each if each.dim() < 2 else each.detach().mT.contiguous().mT

    odd = jax.tree.map(strided, arguments)
    odd[1] = odd[1].long()
    torch.testing.assert_close(torch_fused(*odd, **HOW), expected, rtol=0, atol=1e-15)
    with pytest.raises(TypeError, match="float16"):
        half = jax.tree.map(lambda x: x.half() if x.is_floating_point() else x, arguments)
        torch_fused(*half, **HOW)
    with pytest.raises(ValueError, match="tokens"):
        torch_fused(arguments[0], arguments[1] + 7, *arguments[2:], **HOW)


@needs_jax
@cases.combinations("00 11", K=(0, 7), reset_after=(False, True))
def test_jax_gradients(K, reset_after):
    x, tokens, weights, lengths, h0 = arrays(draw(K, 2))

    def loss(recurrence, x, weights, h0):
        options = {**HOW, "reset_after": reset_after}
        outputs, h_last = recurrence(x, tokens, weights, lengths, h0, **options)
        return (outputs * jnp.cos(jnp.arange(outputs.size).reshape(outputs.shape))).sum() + (
            h_last**2
        ).sum(), (outputs, h_last)

    actual, expected = (
        jax.jit(jax.value_and_grad(loss, (1, 2, 3), has_aux=True), static_argnums=0)(
            recurrence, x, weights, h0
        )
        for recurrence in (jax_fused, jax_scan)
    )
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11)


@needs_torch
@needs_jax
@each_layer
def test_gradients_are_the_same_without_that_of_x(K, directions, reset_after):
    drawn = draw(K, directions)
    options = {**HOW, "reset_after": reset_after}

    def torch_gradients(of_x: bool) -> list[torch.Tensor]:
        x, tokens, weights, lengths, h0 = tensors(drawn)
        x.requires_grad_(of_x)
        results = torch_fused(x, tokens, weights, lengths, h0, **options)
        loss = sum((result**2).sum() for result in results)
        return list(torch.autograd.grad(loss, jax.tree.leaves((weights, h0))))

    def jax_gradients(of_x: bool) -> list[jax.Array]:
        x, tokens, weights, lengths, h0 = arrays(drawn)

        def loss(weights, h0, x):
            results = jax_fused(x, tokens, weights, lengths, h0, **options)
            return sum((result**2).sum() for result in results)

        gradients = jax.grad(loss, (0, 1, 2) if of_x else (0, 1))(weights, h0, x)
        return jax.tree.leaves(gradients[:2])

    for gradients in (torch_gradients, jax_gradients):
        for actual, expected in zip(gradients(False), gradients(True), strict=True):
            np.testing.assert_array_equal(actual, expected)


@needs_jax
def test_jax_vmap():
    *others, h0 = arrays(draw(7))
    options = {**HOW, "reset_after": True}
    states = jnp.stack([h0, h0 + 1])

    def recur(h0):
        return jax_fused(*others, h0, **options)

    def gradient(h0):
        return jax.grad(lambda h0: recur(h0)[1].sum())(h0)

    actual, slopes = jax.vmap(recur)(states), jax.vmap(gradient)(states)
    for i, first in enumerate(states):
        expected = jax_scan(*others, first, **options)
        np.testing.assert_allclose(actual[0][i], expected[0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(actual[1][i], expected[1], rtol=0, atol=1e-12)
        np.testing.assert_array_equal(slopes[i], gradient(first))


@needs_jax
def test_jax_refuses_bad_input():
    x, tokens, *others = arrays(draw(7))
    results = jax_fused(x, tokens + 7, *others, **HOW)
    assert all(jnp.isnan(result).all() for result in results)
    call = LayerCall(x, tokens, *others)
    results = jax_impl.fused.forward(call, True)
    gradients = jax_impl.fused.backward(call._replace(tokens=tokens + 7), *results, True)
    assert all(jnp.isnan(result).all() for result in gradients)
    with pytest.raises(Exception, match=r"expected shape \[6, 4, 5\], found \[6, 4, 4\]"):
        jax_impl.fused.forward(call._replace(h0=others[-1][..., :-1]), True)
    with pytest.raises(TypeError, match="float16"):
        jax_fused(x, tokens, *others[:-1], others[-1].astype(jnp.float16), **HOW)


@needs_torch
@needs_jax
@both
@with_tokens
def test_bidirectional_layer_equals_its_directions(K, reset_after):
    """Both directions of one call equal two calls, in both frameworks, with and without outputs."""
    drawn, results = draw(K, 2, full=True), []
    options = {"reset_after": reset_after, "return_sequences": True}
    turned = {name: drawn[name][::-1].copy() for name in ("x" if not K else "tokens",)}
    for fused, convert in ((torch_fused, tensors), (jax_fused, arrays)):
        x, tokens, weights, lengths, h0 = convert(drawn)
        outputs, h_last = fused(x, tokens, weights, lengths, h0, **options)
        forward = fused(x, tokens, weights[:1], lengths, h0[:1], **options)
        x, tokens, *_ = convert(drawn | turned)  # full rows in reverse order
        backward = fused(x, tokens, weights[1:], lengths, h0[1:], **options)
        x, tokens, *_ = convert(drawn)
        none, again = fused(
            x, tokens, weights, lengths, h0, reset_after=reset_after, return_sequences=False
        )
        outputs, h_last, none, again, *alone = (
            np.asarray(each.detach() if isinstance(each, torch.Tensor) else each)
            for each in (outputs, h_last, none, again, *forward, *backward)
        )
        np.testing.assert_array_equal(h_last, np.concatenate([alone[1], alone[3]]))
        np.testing.assert_array_equal(outputs, np.concatenate([alone[0], alone[2][::-1]], -1))
        np.testing.assert_array_equal(again, h_last)
        assert none.shape == (0, B, 2 * H)
        results.append(h_last)
    np.testing.assert_allclose(*results, rtol=0, atol=1e-14)


@needs_torch
@needs_jax
def test_both_frameworks_at_once():
    """The frameworks share the kernel's threads; concurrent calls wait and give right results."""
    drawn = draw(7, H=200)  # large enough for several threads
    torch_arguments, jax_arguments = tensors(drawn), arrays(drawn)
    wrong = []

    def repeat(recurrence, arguments):
        with torch.no_grad():
            expected = np.asarray(recurrence(*arguments, **HOW)[1])
            wrong.extend(
                i
                for i in range(50)
                if not np.array_equal(recurrence(*arguments, **HOW)[1], expected)
            )

    other = threading.Thread(target=repeat, args=(torch_fused, torch_arguments))
    other.start()
    repeat(jax_fused, jax_arguments)
    other.join()
    assert not wrong


def stack(K: int, directions: int) -> tuple[list[list[torch.Tensor]], dict[str, torch.Tensor]]:
    """All arguments of try_inference_kernel: the weights of two layers, and arrays by name."""
    drawn, states = draw(K, directions, resets=True), np.random.default_rng(1)
    first = [torch.tensor(each) for each in jax.tree.leaves(drawn.pop("weights"))]
    second = [torch.tensor(states.normal(size=(3 * H, directions * H))), *first[1:4]] * directions
    for name in ("h0", "h_reset"):
        drawn[name] = states.normal(size=(2 * directions, B, H))
    arguments = {name: torch.tensor(each) for name, each in drawn.items() if each is not None}
    return [first, second], arguments


@needs_torch
@both
@each_number
@with_tokens
@pytest.mark.parametrize("batch_first", [False, True])
def test_inference_kernel_in_torch_equals_scan(K, directions, reset_after, batch_first):
    layers, arguments = stack(K, directions)
    parameters = {
        f"gru.{i}.{side}.{name}": layers[i][4 * j + k]
        for i in range(2)
        for j, side in enumerate(DIRECTIONS[:directions])
        for k, name in enumerate(GRU_PARAMETERS)
    }
    expected = torch_impl.gru.gru(
        parameters, **arguments, reset_after=reset_after, implementation="scan"
    )
    if batch_first and not K:
        arguments["x"] = arguments["x"].transpose(0, 1).contiguous().transpose(0, 1)
    for sequences in (True, False):
        options = {"reset_after": reset_after, "return_sequences": sequences}
        result = try_inference_kernel(layers, LayerCall(**arguments, **options))
        assert result is not None
        outputs, h_last = result
        torch.testing.assert_close(outputs, expected[0] if sequences else expected[0][:0])
        torch.testing.assert_close(h_last, expected[1])
    few = {name: each for name, each in arguments.items() if name in ("x", "tokens")}
    lengths = torch.full((B,), T)
    expected = torch_impl.gru.gru(
        parameters, **few, lengths=lengths, reset_after=reset_after, implementation="scan"
    )
    result = try_inference_kernel(layers, LayerCall(**few, reset_after=reset_after))
    torch.testing.assert_close(result, expected)


OPENMP = """
import os, signal, sys, threading, time, torch

before = {*os.listdir("/proc/self/task")}
torch.set_num_threads(2)
torch.rand(2_000_000).sum()
theirs = {*os.listdir("/proc/self/task")} - before  # PyTorch's threads
if sys.argv[1] == "import in a child":
    if child := os.fork():
        sys.exit(os.waitpid(child, 0)[1])
    signal.alarm(30)
from common.cells import LayerCall
from torch_impl import GRU, fused, inference

inference.SPINNING = fused.SPINNING = True
layers = [[torch.zeros(192, n) for n in (20, 64)] + [torch.zeros(192)] * 2]
# So few that PyTorch takes one thread: it would hang in a child forked before the import.
x = torch.zeros(20, 64, 20)

def call():
    with torch.no_grad():
        assert inference.try_inference_kernel(layers, LayerCall(x))

def call_elsewhere():
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    time.sleep(0.1)  # until the system knows that it has ended

def works():
    with open("/proc/self/stat") as about:
        core = int(about.read().rpartition(")")[2].split()[36])
    for each in theirs:  # on a busy machine, the system may leave them where this one is
        os.sched_setaffinity(int(each), os.sched_getaffinity(0) - {core})
    before = time.clock_gettime(clock)
    (call if sys.argv[1] == "first" else call_elsewhere)()
    for _ in range(200):  # on a busy machine it may come late
        time.sleep(0.001)
        if time.clock_gettime(clock) > before:
            return True
    return False

if "child" in sys.argv[1]:
    if sys.argv[1] == "first call in a child" and (child := os.fork()):
        sys.exit(os.waitpid(child, 0)[1])
    signal.alarm(30)
    for _ in range(3):
        call()
    if sys.argv[1] == "first call in a child":
        GRU(20, 64)(x)[1].sum().backward()
    os._exit(0)
before = {*os.listdir("/proc/self/task")}
call_elsewhere()
(own,) = {*os.listdir("/proc/self/task")} - before
clock = ~int(own) << 3 | 6  # of a thread of the kernel's
call()
time.sleep(0.1)
print(all(works() for _ in range(int(sys.argv[2]))))
"""
OMP = {"OMP_NUM_THREADS": "2"}


@needs_torch
@pytest.mark.skipif(CORES < 2, reason="needs two cores, and Linux's /proc")
@pytest.mark.parametrize(
    ("thread", "policy", "own"),
    [
        ("other", "active", True),
        pytest.param("first", "active", False, marks=pytest.mark.long),
        pytest.param("first", "passive", True, marks=pytest.mark.long),
    ],
)
def test_inference_kernel_uses_openmp_threads_while_they_spin(
    thread: str, policy: str, own: bool
) -> None:
    """In all other cases, and in other threads, as in a server, the kernel uses its own threads."""
    environment = os.environ | OMP | {"OMP_WAIT_POLICY": policy}
    command = [sys.executable, "-c", OPENMP, thread, "20" if own else "1000"]
    assert subprocess.check_output(command, env=environment, text=True) == f"{own}\n"


@needs_torch
@pytest.mark.skipif(CORES < 2, reason="needs two cores, and Linux's /proc")
@pytest.mark.parametrize(
    "options", ["first call in a child", pytest.param("import in a child", marks=pytest.mark.long)]
)
def test_inference_kernel_in_a_child_of_a_process_with_openmp_threads(options: str) -> None:
    """The child uses other threads, because an OpenMP runtime does not survive a fork."""
    subprocess.run([sys.executable, "-c", OPENMP, options], env=os.environ | OMP, check=True)


FORK = """
import multiprocessing, torch
from torch_impl import GRU

torch.set_num_threads(2)
torch.manual_seed(0)
x, target = torch.randn(32, 20, 100), torch.randn(32, 8)  # rows first: the layer copies x
layers = [GRU(100, 256, batch_first=True, reset_after=after) for after in (True, False)]
heads = [torch.nn.Linear(256, 8) for _ in layers]
parameters = [p for module in (*layers, *heads) for p in module.parameters()]

def train():
    logits = [head(layer(x)[1][0]) for layer, head in zip(layers, heads)]
    loss = sum((each - target).square().mean() for each in logits)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
            parameter -= 0.1 * gradient
        return [layer(x)[0].mean().item() for layer in layers]

train()
for _ in range(2):  # the parent, too, goes on
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply_async(train).get(30)
    torch.testing.assert_close(found, train())
"""


@needs_torch
@pytest.mark.skipif(CORES < 2, reason="needs two cores, and Linux's OpenMP")
def test_torch_trains_in_a_fork_of_a_process_that_has_trained():
    """The step is large enough that PyTorch's own operations use several threads."""
    subprocess.run([sys.executable, "-c", FORK], env=os.environ | OMP, check=True)


UNREADABLE = {
    "shorter": lambda a: a[..., :-1].clone(),
    "of one dimension more": lambda a: a[None],
    "apart in memory": lambda a: torch.stack([a, a], -1)[..., 0],
    "of another dtype": lambda a: a.to(torch.float32 if a.is_floating_point() else torch.int64),
    "elsewhere": lambda a: a.to("meta"),
    "empty": lambda a: a[:0],
    "sparse": lambda a: a.to_sparse(),
    "negated when read": torch._neg_view,
    "no tensor": lambda a: a.numpy(),
    "of a class of its own": lambda a: a.as_subclass(Own),
    "absent": lambda _: None,
}


class Own(torch.Tensor):
    pass


@needs_torch
@pytest.mark.parametrize("wrong", UNREADABLE)
@with_tokens
def test_inference_kernel_leaves_unreadable_arrays_to_the_general_path(K, wrong):
    """The kernel does not validate addresses, so such arrays must not reach it."""
    layers, inputs = stack(K, 2)
    tried = 0
    for i, array in enumerate((*inputs.values(), *(each for layer in layers for each in layer))):
        optional, floats = 0 < i < len(inputs), array.dtype == torch.float64
        fine = {"absent": optional, "negated when read": not floats, "apart in memory": i == 0}
        if fine.get(wrong):
            continue
        spoilt = UNREADABLE[wrong](array)
        names, flat = list(inputs), [*inputs.values(), *layers[0], *layers[1]]
        flat[i] = spoilt
        arguments, weights = flat[: len(inputs)], flat[len(inputs) :]
        stacked = weights[: len(layers[0])], weights[len(layers[0]) :]
        result = try_inference_kernel(
            stacked, LayerCall(**dict(zip(names, arguments, strict=True)))
        )
        assert result is None, i
        tried += 1
    assert tried >= 16


HALF = """
import torch
from common.cells import LayerCall
from torch_impl.inference import try_inference_kernel

half = {"dtype": torch.float16}
weights = [[torch.zeros(192, n, **half) for n in (20, 64)] + [torch.zeros(192, **half)] * 2]
with torch.no_grad():
    assert try_inference_kernel(weights, LayerCall(torch.zeros(20, 64, 20, **half))) is None
"""


@needs_torch
def test_inference_kernel_leaves_float16_to_the_general_path() -> None:
    """The kernel would write beyond the end of float16 arrays, so a child process runs this."""
    subprocess.run([sys.executable, "-c", HALF], check=True)


@needs_torch
@both
def test_torch_results_do_not_depend_on_the_threads(reset_after):
    """These threads are those of PyTorch's OpenMP runtime, not of the kernel's own pool."""
    case = cases.draw(50, 64, 20, 32, 40, dtype=np.float32)

    def results(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        leaves = case.operands(lambda a: torch.tensor(a, requires_grad=a.dtype == np.float32))
        options = {"reset_after": reset_after, "return_sequences": True}
        outputs, h_last = torch_fused(*leaves, **options)
        (outputs.sum() + (h_last**2).sum()).backward()
        gradients = [leaf.grad for leaf in jax.tree.leaves(leaves) if leaf.requires_grad]
        return [outputs, h_last, *gradients]

    one = results(1)
    for threads in (2, 3):
        for actual, expected in zip(results(threads), one, strict=True):
            assert torch.equal(actual, expected)


@needs_jax
def test_jax_uses_the_cpu_kernel_on_a_machine_with_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    drawn = init_gru(3, 4, 1, False, seed=0)
    parameters = {name: jnp.asarray(value) for name, value in drawn.items()}
    x, lengths = jnp.ones((5, 2, 3)), jnp.array([5, 2])
    fused = jax_impl.gru.gru(parameters, x, lengths, implementation="fused")
    auto = jax_impl.gru.gru(parameters, x, lengths)  # selects scan on a GPU
    for actual, expected in zip(fused, auto, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


def rnn_by_torch(case: cases.Case) -> cases.Arrays:
    arguments = case.arguments(lambda a: torch.tensor(a, requires_grad=a.dtype.kind == "f"))
    own, arrays = arguments["parameters"], {n: a for n, a in arguments.items() if n != "parameters"}
    call = LayerCall(**arrays)
    results = torch_impl.layers.run(torch_impl.rnn.CELL, own, call, implementation="fused")
    torch.autograd.backward(results, (torch.tensor(case.d_outputs), torch.tensor(case.d_h_last)))
    result = {name: parameter.grad for name, parameter in arguments["parameters"].items()}
    result |= {"outputs": results[0].detach(), "h_last": results[1].detach()}
    result |= {
        f"d_{name}": arguments[name].grad for name in ("x", "h0", "h_reset") if name in arguments
    }
    return {name: array.numpy() for name, array in result.items()}


def rnn_by_jax(case: cases.Case) -> cases.Arrays:
    arguments = case.arguments(np.asarray)
    others = {
        name: arguments.pop(name) for name in ("lengths", "tokens", "resets") if name in arguments
    }

    def run(arguments: dict) -> tuple:
        call = LayerCall(
            **others, **{n: each for n, each in arguments.items() if n != "parameters"}
        )
        cell = jax_impl.rnn.CELL
        return jax_impl.layers.run(cell, arguments["parameters"], call, implementation="fused")

    results, pull = jax.vjp(run, arguments)
    result = pull((case.d_outputs, case.d_h_last))[0]
    result |= result.pop("parameters") | {
        f"d_{name}": result.pop(name) for name in arguments if name != "parameters"
    }
    return {
        n: np.asarray(a) for n, a in (result | dict(outputs=results[0], h_last=results[1])).items()
    }


@needs_torch
@needs_jax
@pytest.mark.parametrize("sides", [cases.DIRECTIONS[:1], cases.DIRECTIONS], ids=len)
@pytest.mark.parametrize("size", [(5, 7, 4, 9, 0), (4, 6, 3, 20, 5), (3, 9, 5, 17, 11)], ids=str)
def test_tanh_rnn_in_both_twins(size, sides):
    """Against the oracle, with resets where the batch is odd."""
    case = cases.draw(*size, sides=sides, dtype=np.float32, cell="rnn")
    expected = cases.reference(case, False)
    for results in (rnn_by_torch(case), rnn_by_jax(case)):
        assert results.keys() == expected.keys()
        for name, array in expected.items():
            bound = 2e-6 * np.abs(array).max()
            np.testing.assert_allclose(results[name], array, 0, bound, err_msg=name)


def test_operators_take_another_cell():
    case = cases.draw(4, 3, 5, 6, sides=cases.DIRECTIONS[:1], dtype=np.float32, cell="rnn")
    arguments = case.arguments(torch.tensor)

    def run(parameters: dict, **arrays: torch.Tensor) -> tuple:
        call, options = LayerCall(**arrays), {"implementation": "fused"}
        return torch_impl.layers.run(torch_impl.rnn.CELL, parameters, call, **options)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    arguments["x"].requires_grad_()
    for function in (run, compiled):
        outputs, _ = function(**arguments)
        (gradient,) = torch.autograd.grad(outputs.sum(), arguments["x"])
        if function is run:
            expected = outputs, gradient
    torch.testing.assert_close((outputs, gradient), expected, rtol=0, atol=0)
