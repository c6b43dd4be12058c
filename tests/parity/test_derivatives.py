"""First and second derivatives by finite differences, and the frameworks' transformations."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.test_util import check_grads
from torch.autograd import gradcheck, gradgradcheck

import jax_impl
import torch_impl
from common.kernels import cuda
from comparison.parity import Size, draw
from jax_impl.gru import CELL as JAX_GRU
from tests.cases import combinations
from torch_impl.gru import CELL as TORCH_GRU

SIZE = Size("small", 3, 2, 2, 1, 2, [1, 3, 0])
TORCH, JAX = TORCH_GRU.implementations(), JAX_GRU.implementations()
# The kernel of the emulated GPU (tests/gpu/small.py) has no float64.
DTYPE, BOUND = (np.float32, 1e-4) if cuda.rehearsed else (np.float64, 1e-10)


def quickly(every: Iterable, *few: object) -> list:
    """Parameters of which all but a few are long."""
    return [each if each in few else pytest.param(each, marks=pytest.mark.long) for each in every]


each_reset = pytest.mark.parametrize("reset_after", [False, True])
# If compilation takes long, only the default implementation; test_parity.py covers all.
each_compiled = pytest.mark.parametrize("implementation", quickly(JAX, JAX[-1]))


def small(
    reset_after: bool, size: Size = SIZE, seed: int = 0
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The arguments to differentiate by (GRU parameters, x, h0), and the lengths.

    With the reset gate after the product also h_reset, and sequences begin within rows.
    """
    case = draw(replace(size, resets=reset_after), reset_after, seed).astype(DTYPE)
    leaves = {name: p for name, p in case.parameters.items() if name.startswith("gru.")}
    leaves |= {"x": case.x, "h0": case.h0}
    return leaves | ({"h_reset": case.h_reset} if reset_after else {}), case.lengths


def resets_of(leaves):
    """Random resets, at about a third of the steps."""
    if "h_reset" not in leaves:
        return None
    T, B = leaves["x"].shape[:2]
    return (np.arange(T)[:, None] + 2 * np.arange(B)) % 3 == 1


def torch_function(names, lengths, reset_after, implementation):
    def function(*values):
        leaves = dict(zip(names, values, strict=True))
        return torch_impl.gru.gru(
            leaves,
            leaves["x"],
            torch.tensor(lengths),
            leaves["h0"],
            resets=None if (resets := resets_of(leaves)) is None else torch.tensor(resets),
            h_reset=leaves.get("h_reset"),
            reset_after=reset_after,
            implementation=implementation,
        )

    return function


def jax_function(lengths, reset_after, implementation):
    def function(leaves):
        return jax_impl.gru.gru(
            leaves,
            leaves["x"],
            jnp.asarray(lengths),
            leaves["h0"],
            resets=resets_of(leaves),
            h_reset=leaves.get("h_reset"),
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
@pytest.mark.parametrize("implementation", quickly(TORCH, "scan", "fused"))
def test_torch_gradcheck(implementation, reset_after):
    leaves, lengths = small(reset_after)
    values = [torch.tensor(value, requires_grad=True) for value in leaves.values()]
    function = torch_function(leaves, lengths, reset_after, implementation)
    assert gradcheck(function, values, check_forward_ad=True, check_batched_grad=True)


@each_reset
@pytest.mark.parametrize("implementation", quickly(TORCH, TORCH[-1]))
def test_torch_gradgradcheck(implementation, reset_after):
    leaves, lengths = small(reset_after)
    values = [torch.tensor(value, requires_grad=True) for value in leaves.values()]
    assert gradgradcheck(torch_function(leaves, lengths, reset_after, implementation), values)


@each_reset
@each_compiled
def test_jax_check_grads(implementation, reset_after, x64):
    leaves, lengths = small(reset_after)
    function = jax_function(lengths, reset_after, implementation)
    check_grads(jax.jit(function), (leaves,), order=1, modes=("rev",))


@pytest.mark.long  # other tests check PyTorch, and compare both frameworks
@each_reset
@pytest.mark.parametrize("implementation", JAX)
def test_jax_check_grads_of_second_order(implementation, reset_after, x64):
    leaves, lengths = small(reset_after)
    function = jax_function(lengths, reset_after, implementation)
    check_grads(jax.jit(function), (leaves,), order=2, modes=("fwd", "rev"))


def of_state(h0, others, scalar):
    """`scalar` as a function of only h0, and h0."""
    return (lambda h0: scalar(others | {"h0": h0})), h0


# Derivatives of the function of all leaves, and of the function of only h0.
IN_TORCH = {
    "grad": lambda f, leaves: torch.func.grad(f)(leaves),
    "vjp": lambda f, leaves: torch.func.vjp(f, leaves)[1](torch.tensor(2, dtype=leaves["x"].dtype)),
    "jvp": lambda f, leaves: torch.func.jvp(f, (leaves,), (leaves,)),
    "vmap": lambda f, leaves: torch.func.vmap(f)(stacked(leaves, torch.stack)),
    "vmap of grad": lambda f, leaves: torch.func.vmap(torch.func.grad(f))(
        stacked(leaves, torch.stack)
    ),
    "grad of vmap": lambda f, leaves: torch.func.grad(lambda each: torch.func.vmap(f)(each).sum())(
        stacked(leaves, torch.stack)
    ),
    "linearize": lambda f, leaves: torch.func.linearize(f, leaves)[1](leaves),
}
BY_STATE_IN_TORCH = {
    "hessian": torch.func.hessian,
    "jacrev of jacrev": lambda f: torch.func.jacrev(torch.func.jacrev(f)),
    "jacfwd of jacfwd": lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
    "jacrev of jacfwd": lambda f: torch.func.jacrev(torch.func.jacfwd(f)),
    "vectorized jacobian": lambda f: (
        lambda h0: torch.autograd.functional.jacobian(f, h0, vectorize=True)
    ),
    "third": lambda f: torch.func.grad(
        lambda h0: torch.func.grad(lambda h0: torch.func.grad(f)(h0).square().sum())(h0).sum()
    ),
}
IN_JAX = {
    "grad": lambda f, leaves: jax.grad(f)(leaves),
    "jvp": lambda f, leaves: jax.jvp(f, (leaves,), (leaves,)),
    "linearize": lambda f, leaves: jax.linearize(f, leaves)[1](leaves),
    "vmap": lambda f, leaves: jax.vmap(f)(stacked(leaves, jnp.stack)),
    "vmap of grad": lambda f, leaves: jax.vmap(jax.grad(f))(stacked(leaves, jnp.stack)),
    "grad of vmap": lambda f, leaves: jax.grad(lambda each: jax.vmap(f)(each).sum())(
        stacked(leaves, jnp.stack)
    ),
}
BY_STATE_IN_JAX = {
    "hessian": jax.hessian,
    "jacrev of jacrev": lambda f: jax.jacrev(jax.jacrev(f)),
    "jacfwd of jacfwd": lambda f: jax.jacfwd(jax.jacfwd(f)),
    "jacrev of jacfwd": lambda f: jax.jacrev(jax.jacfwd(f)),
    "third": lambda f: jax.grad(
        lambda h0: jax.grad(lambda h0: (jax.grad(f)(h0) ** 2).sum())(h0).sum()
    ),
}


def stacked(leaves, stack):
    """Three different draws of the leaves, stacked along a new axis."""
    return {name: stack([value, value + 0.1, 2 * value]) for name, value in leaves.items()}


@each_reset
@pytest.mark.parametrize("transformation", [*IN_TORCH, *BY_STATE_IN_TORCH])
def test_torch_func_of_the_kernel_is_that_of_scan(transformation, reset_after):
    leaves, lengths = small(reset_after)
    tensors = {name: torch.tensor(value) for name, value in leaves.items()}

    def result(implementation):
        def scalar(leaves):
            function = torch_function(leaves, lengths, reset_after, implementation)
            outputs, h_last = function(*leaves.values())
            return outputs.square().sum() + h_last.sin().sum()

        if transformation in IN_TORCH:
            return IN_TORCH[transformation](scalar, tensors)
        function, h0 = of_state(tensors["h0"], tensors, scalar)
        return BY_STATE_IN_TORCH[transformation](function)(h0)

    actual, expected = result("auto"), result("scan")
    torch.testing.assert_close(actual, expected, rtol=BOUND, atol=BOUND)


@pytest.mark.parametrize("transformation", quickly([*IN_JAX, *BY_STATE_IN_JAX], *IN_JAX, "hessian"))
def test_jax_transformations_of_the_kernel_are_those_of_scan(transformation, x64):
    leaves, lengths = small(False)
    arrays = {name: jnp.asarray(value) for name, value in leaves.items()}

    def result(implementation):
        def scalar(leaves):
            outputs, h_last = jax_function(lengths, False, implementation)(leaves)
            return (outputs**2).sum() + jnp.sin(h_last).sum()

        def transformed(arrays):
            if transformation in IN_JAX:
                return IN_JAX[transformation](scalar, arrays)
            function, h0 = of_state(arrays["h0"], arrays, scalar)
            return BY_STATE_IN_JAX[transformation](function)(h0)

        return jax.jit(transformed)(arrays)

    assert close(result("auto"), result("scan"), BOUND)


@each_reset
@pytest.mark.parametrize("tokens", [False, True])
def test_torch_gradient_of_a_gradient_reaches_every_parameter(tokens, reset_after):
    """The second derivative is that of autograd.grad(create_graph=True) followed by backward."""
    size = Size("small", 3, 2, 2, 2, 2, [1, 3, 0], distinct=4 if tokens else None)
    case = draw(size, reset_after, 0).astype(DTYPE)
    result = []
    for implementation in ("scan", "auto"):
        leaves = {
            name: torch.tensor(value, requires_grad=True)
            for name, value in [*case.parameters.items(), ("x", case.x), ("h0", case.h0)]
            if not name.startswith("head.")
        }
        outputs, h_last = torch_impl.gru.gru(
            leaves,
            leaves["x"],
            torch.tensor(case.lengths),
            leaves["h0"],
            tokens=torch.tensor(case.tokens) if tokens else None,
            reset_after=reset_after,
            implementation=implementation,
        )
        (slope,) = torch.autograd.grad(
            outputs.sum() + h_last.square().sum(), leaves["x"], create_graph=True
        )
        result.append(torch.autograd.grad(slope.square().sum(), list(leaves.values())))
    torch.testing.assert_close(*result, rtol=BOUND, atol=BOUND)


@each_reset
def test_torch_gradient_of_a_gradient_inside_autocast(reset_after):
    leaves, lengths = small(reset_after)
    result = []
    for implementation in ("scan", "auto"):
        values = [
            torch.tensor(value, dtype=torch.float32, requires_grad=True)
            for value in leaves.values()
        ]
        with torch.autocast("cpu", torch.bfloat16):
            function = torch_function(leaves, lengths, reset_after, implementation)
            outputs, _ = function(*values)
        loss = outputs.float().square().sum()
        (slope,) = torch.autograd.grad(loss, values[-1:], create_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            result.append(torch.autograd.grad(slope.square().sum(), values[-1:]))
    # Both round to bfloat16 several times, each time by 2^-9 of the largest value.
    scale = result[0][0].abs().max().item()
    torch.testing.assert_close(result[1], result[0], rtol=0, atol=2**-6 * scale)


SHARDED = """
import numpy as np, jax, jax.numpy as jnp, jax_impl
from jax.sharding import Mesh, PartitionSpec as P
from common.params import init_gru
parameters = {name: jnp.asarray(p, jnp.float32) for name, p in init_gru(3, 4, 1, True, 0).items()}
x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 3)), jnp.float32)
lengths = jnp.array([5, 3, 0, 2])

def total(implementation, parameters, x, lengths):
    outputs, h_last = jax_impl.gru.gru(parameters, x, lengths, implementation=implementation)
    return (outputs**2).sum() + jnp.sin(h_last).sum()

def shared(parameters, x, lengths):
    return jax.lax.psum(total("auto", parameters, x, lengths), "rows")

mesh = Mesh(np.array(jax.devices()), ("rows",))
specs = (P(), P(None, "rows"), P("rows"))
scan = jax.value_and_grad(lambda *given: total("scan", *given), (0, 1))
want = jax.jit(scan)(parameters, x, lengths)
for check in (True, False):
    run = jax.shard_map(shared, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check)
    got = jax.jit(jax.value_and_grad(run, (0, 1)))(parameters, x, lengths)
    along = jax.jit(lambda p: jax.jvp(lambda p: run(p, x, lengths), (p,), (p,)))(parameters)
    slope = sum((want[1][0][name] * p).sum() for name, p in parameters.items())
    for a, b in zip(jax.tree.leaves((got, along)), jax.tree.leaves((want, (want[0], slope)))):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
assert len(jax.devices()) == 2
"""


def test_jax_shard_map_over_two_devices():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags}
    subprocess.run([sys.executable, "-c", SHARDED], check=True, env=environment)


@pytest.mark.skipif("fused" not in JAX, reason="no kernel for JAX")
def test_jax_export_of_the_kernel_says_what_can_be_exported():
    leaves, lengths = small(False)
    leaves = {name: jnp.asarray(value, jnp.float32) for name, value in leaves.items()}
    fused, scan = (
        jax.jit(jax_function(lengths, False, implementation))
        for implementation in ("fused", "scan")
    )
    with (
        pytest.warns(UserWarning, match='implementation="scan"'),
        pytest.raises(ValueError, match="custom calls"),
    ):
        jax.export.export(fused)(leaves)
    exported = jax.export.export(scan)(leaves)
    assert close(exported.call(leaves), fused(leaves), 1e-6)


@each_reset
@pytest.mark.parametrize("implementation", quickly(["scan", "auto"], "auto"))
def test_second_derivatives_of_the_twins_agree(implementation, reset_after, x64):
    """Hessian times vector: reverse over reverse in PyTorch, forward over reverse in JAX."""
    leaves, lengths = small(reset_after, Size("two layers", 5, 3, 4, 2, 2, [2, 5, 0, 3]))
    rng = np.random.default_rng(1)
    pull = rng.standard_normal((5, 4, 8))
    along = {name: rng.standard_normal(value.shape) for name, value in leaves.items()}

    values = [torch.tensor(value, requires_grad=True) for value in leaves.values()]
    outputs, _ = torch_function(leaves, lengths, reset_after, implementation)(*values)
    gradients = torch.autograd.grad((outputs * torch.tensor(pull)).sum(), values, create_graph=True)
    product = sum(
        (g * torch.tensor(v)).sum() for g, v in zip(gradients, along.values(), strict=True)
    )
    in_torch = dict(zip(leaves, torch.autograd.grad(product, values), strict=True))

    function = jax_function(lengths, reset_after, implementation)
    gradient = jax.grad(lambda leaves: (function(leaves)[0] * pull).sum())
    _, in_jax = jax.jit(lambda: jax.jvp(gradient, (leaves,), (along,)))()
    assert close({name: g.numpy() for name, g in in_torch.items()}, in_jax, 1e-11)


@combinations(
    "010 121", backend=("aot_eager", "inductor"), implementation=TORCH, reset_after=(False, True)
)
def test_torch_compile(backend, implementation, reset_after):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("needs a C++ compiler")
    torch.manual_seed(0)
    options = {"bidirectional": True, "reset_after": reset_after, "implementation": implementation}
    layer = torch_impl.GRU(3, 4, batch_first=True, **options).double()
    x = torch.randn(5, 3, 3, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([2, 3, 0, 1, 3])

    def run(layer):
        outputs, h_last = layer(x, lengths=lengths)
        leaves = [x, *layer.parameters()]
        gradients = torch.autograd.grad(outputs.square().sum() + h_last.sum(), leaves)
        return [value.detach().numpy() for value in (outputs, h_last, *gradients)]

    torch.compiler.reset()
    assert close(run(torch.compile(layer, fullgraph=True, backend=backend)), run(layer))


@pytest.mark.parametrize("reset_after", quickly([False, True], True))
@each_compiled
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
@each_compiled
def test_jax_vmap(implementation, reset_after, x64):
    """vmap over a new axis of all arguments: an ensemble of layers with separate inputs."""
    members = [small(reset_after, seed=seed) for seed in range(3)]
    lengths = members[0][1]
    function = jax_function(lengths, reset_after, implementation)
    stacked = jax.tree.map(lambda *values: np.stack(values), *(leaves for leaves, _ in members))
    one_by_one = [function(leaves) for leaves, _ in members]
    assert close(jax.vmap(function)(stacked), jax.tree.map(lambda *v: np.stack(v), *one_by_one))
