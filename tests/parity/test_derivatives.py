"""First and second derivatives by finite differences, and the frameworks' transformations."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.test_util import check_grads
from torch.autograd import gradcheck, gradgradcheck

import jax_impl
import torch_impl
from comparison.parity import Size, draw
from jax_impl.gru import IMPLEMENTATIONS as JAX_IMPLEMENTATIONS
from torch_impl.gru import IMPLEMENTATIONS as TORCH_IMPLEMENTATIONS

SIZE = Size("small", 3, 2, 2, 1, 2, [1, 3, 0])
each_reset = pytest.mark.parametrize("reset_after", [False, True])


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def small(
    reset_after: bool, size: Size = SIZE, seed: int = 0
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The arguments to differentiate by (GRU parameters, x, h0), and the lengths."""
    case = draw(size, reset_after, seed)
    leaves = {name: p for name, p in case.parameters.items() if name.startswith("gru.")}
    return leaves | {"x": case.x, "h0": case.h0}, case.lengths


def torch_function(names, lengths, reset_after, implementation):
    def function(*values):
        leaves = dict(zip(names, values, strict=True))
        return torch_impl.gru(
            leaves,
            leaves["x"],
            torch.tensor(lengths),
            leaves["h0"],
            reset_after=reset_after,
            implementation=implementation,
        )

    return function


def jax_function(lengths, reset_after, implementation):
    def function(leaves):
        return jax_impl.gru(
            leaves,
            leaves["x"],
            jnp.asarray(lengths),
            leaves["h0"],
            reset_after=reset_after,
            implementation=implementation,
        )

    return function


def close(actual, expected, bound=1e-12):
    """Whether two trees of arrays agree, relative to each array's largest value."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    return all(
        np.abs(np.asarray(a) - np.asarray(e)).max() <= bound * np.abs(np.asarray(e)).max()
        for a, e in zip(actual, expected, strict=True)
    )


@each_reset
@pytest.mark.parametrize("implementation", TORCH_IMPLEMENTATIONS)
def test_torch_gradcheck(implementation, reset_after):
    leaves, lengths = small(reset_after)
    values = [torch.tensor(value, requires_grad=True) for value in leaves.values()]
    assert gradcheck(torch_function(leaves, lengths, reset_after, implementation), values)


@each_reset
@pytest.mark.parametrize("implementation", ["loop", "scan"])
def test_torch_gradgradcheck(implementation, reset_after):
    leaves, lengths = small(reset_after)
    values = [torch.tensor(value, requires_grad=True) for value in leaves.values()]
    assert gradgradcheck(torch_function(leaves, lengths, reset_after, implementation), values)


@each_reset
@pytest.mark.parametrize("implementation", JAX_IMPLEMENTATIONS)
def test_jax_check_grads(implementation, reset_after, x64):
    leaves, lengths = small(reset_after)
    function = jax_function(lengths, reset_after, implementation)
    check_grads(jax.jit(function), (leaves,), order=1, modes=("rev",))


@each_reset
def test_jax_check_grads_of_second_order(reset_after, x64):
    leaves, lengths = small(reset_after)
    function = jax_function(lengths, reset_after, "scan")
    check_grads(jax.jit(function), (leaves,), order=2, modes=("fwd", "rev"))


@each_reset
def test_second_derivatives_of_the_twins_agree(reset_after, x64):
    """Hessian times vector: reverse over reverse in PyTorch, forward over reverse in JAX."""
    leaves, lengths = small(reset_after, Size("two layers", 5, 3, 4, 2, 2, [2, 5, 0, 3]))
    rng = np.random.default_rng(1)
    pull = rng.standard_normal((5, 4, 8))
    along = {name: rng.standard_normal(value.shape) for name, value in leaves.items()}

    values = [torch.tensor(value, requires_grad=True) for value in leaves.values()]
    outputs, _ = torch_function(leaves, lengths, reset_after, "scan")(*values)
    gradients = torch.autograd.grad((outputs * torch.tensor(pull)).sum(), values, create_graph=True)
    product = sum(
        (g * torch.tensor(v)).sum() for g, v in zip(gradients, along.values(), strict=True)
    )
    in_torch = dict(zip(leaves, torch.autograd.grad(product, values), strict=True))

    function = jax_function(lengths, reset_after, "scan")
    gradient = jax.grad(lambda leaves: (function(leaves)[0] * pull).sum())
    _, in_jax = jax.jit(lambda: jax.jvp(gradient, (leaves,), (along,)))()
    assert close({name: g.numpy() for name, g in in_torch.items()}, in_jax, 1e-11)


@each_reset
@pytest.mark.parametrize("implementation", TORCH_IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler"),
        ),
    ],
)
def test_torch_compile(backend, implementation, reset_after):
    torch.manual_seed(0)
    how = {"bidirectional": True, "reset_after": reset_after, "implementation": implementation}
    layer = torch_impl.GRU(3, 4, **how).double()
    x = torch.randn(5, 3, 3, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([2, 3, 0, 1, 3])

    def run(layer):
        outputs, h_last = layer(x, lengths)
        leaves = [x, *layer.parameters()]
        gradients = torch.autograd.grad(outputs.square().sum() + h_last.sum(), leaves)
        return [value.detach().numpy() for value in (outputs, h_last, *gradients)]

    torch.compiler.reset()
    assert close(run(torch.compile(layer, fullgraph=True, backend=backend)), run(layer))


@each_reset
@pytest.mark.parametrize("implementation", JAX_IMPLEMENTATIONS)
def test_jax_jit_and_checkpoint(implementation, reset_after, x64):
    leaves, lengths = small(reset_after)
    function = jax_function(lengths, reset_after, implementation)

    def gradients(function):
        return jax.grad(lambda leaves: sum(jnp.sum(v**2) for v in function(leaves)))(leaves)

    with jax.disable_jit():
        expected, expected_gradients = function(leaves), gradients(function)
    assert close(jax.jit(function)(leaves), expected)
    assert close(gradients(jax.jit(function)), expected_gradients)
    assert close(gradients(jax.checkpoint(function)), expected_gradients)


@each_reset
@pytest.mark.parametrize("implementation", JAX_IMPLEMENTATIONS)
def test_jax_vmap(implementation, reset_after, x64):
    """Over a new axis of everything: an ensemble of layers, each with inputs of its own."""
    members = [small(reset_after, seed=seed) for seed in range(3)]
    lengths = members[0][1]
    function = jax_function(lengths, reset_after, implementation)
    stacked = jax.tree.map(lambda *values: np.stack(values), *(leaves for leaves, _ in members))
    one_by_one = [function(leaves) for leaves, _ in members]
    assert close(jax.vmap(function)(stacked), jax.tree.map(lambda *v: np.stack(v), *one_by_one))
