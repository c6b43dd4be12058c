"""The bindings of the CPU kernel to PyTorch and JAX, against each framework's scan."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_impl
import jax_impl.fused
import torch_impl.fused
from common.params import init_gru
from jax_impl.gru import scan as jax_scan
from torch_impl.gru import scan as torch_scan

needs_torch = pytest.mark.skipif(not torch_impl.fused.available(), reason="no kernel")
needs_jax = pytest.mark.skipif(not jax_impl.fused.available(), reason="no kernel for JAX")
with_tokens = pytest.mark.parametrize("K", [0, 7])
both = pytest.mark.parametrize("reset_after", [False, True])
either_way = pytest.mark.parametrize("reverse", [False, True])


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def draw(K: int, *, full: bool = False) -> dict[str, np.ndarray | None]:
    """Arguments of recur(), in its order; `full` makes all rows as long as the batch."""
    T, B, H = 6, 4, 5
    rng = np.random.default_rng(K)
    return {
        "projections": rng.normal(size=(K, 3 * H) if K else (T, B, 3 * H)),
        "tokens": rng.integers(0, K, (T, B), dtype=np.int32) if K else None,
        "weight_hh": rng.normal(size=(3 * H, H)) / H**0.5,
        "bias_hh": rng.normal(size=3 * H),
        "lengths": np.array([6] * B if full else [3, 6, 0, 5], np.int32),
        "h0": rng.normal(size=(B, H)),
    }


def tensors(arguments: dict[str, np.ndarray | None]) -> list[torch.Tensor | None]:
    """The same as tensors; gradients are wanted of the floating-point ones."""
    return [
        None if each is None else torch.tensor(each, requires_grad=each.dtype == np.float64)
        for each in arguments.values()
    ]


def differentiable(arguments: list) -> list:
    return [each for each in arguments if each is not None and each.dtype == torch.float64]


@needs_torch
@both
@either_way
@with_tokens
def test_torch_gradients(K, reverse, reset_after):
    arguments = tensors(draw(K))
    how = {"reverse": reverse, "reset_after": reset_after}
    got, want = torch_impl.fused.recur(*arguments, **how), torch_scan(*arguments, **how)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)

    def function(projections, weight_hh, bias_hh, h0):
        _, tokens, _, _, lengths, _ = arguments
        return torch_impl.fused.recur(projections, tokens, weight_hh, bias_hh, lengths, h0, **how)

    assert torch.autograd.gradcheck(function, differentiable(arguments))


@needs_torch
@both
@with_tokens
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("every_step", [False, True])
def test_torch_operator(every_step, directions, K, reset_after):
    """The schema, the shapes without data and the dispatch under torch.compile are right."""
    projections, tokens, weight_hh, bias_hh, lengths, h0 = tensors(draw(K, full=True))
    torch.library.opcheck(
        torch_impl.fused.forward_operator,
        (
            [projections] * directions,
            [weight_hh] * directions,
            [bias_hh] * directions,
            torch.stack([h0] * directions).detach().requires_grad_(),
            tokens,
            lengths,
            [False, True][:directions],
            reset_after,
            every_step,
            True,
        ),
    )


class Recur(torch.nn.Module):
    def forward(self, *arguments):
        return torch_impl.fused.recur(*arguments, reverse=True, reset_after=False)


@needs_torch
def test_torch_compile_and_export():
    arguments = tensors(draw(7))
    want = Recur()(*arguments)
    compiled = torch.compile(Recur(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Recur(), tuple(arguments)).module()
    for each in (compiled, exported):
        got = each(*arguments)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        gradients = torch.autograd.grad(sum(x.sum() for x in got), differentiable(arguments))
        expected = torch.autograd.grad(
            sum(x.sum() for x in want), differentiable(arguments), retain_graph=True
        )
        torch.testing.assert_close(gradients, expected, rtol=0, atol=0)


@needs_torch
@with_tokens
@pytest.mark.parametrize("wanted", [0, 1])
def test_torch_gradient_of_one_result_alone(wanted, K):
    """Of outputs or of h_last: the other one has no gradient, and backward is given None for it."""
    arguments = tensors(draw(K))
    got, want = Recur()(*arguments), torch_scan(*arguments, reverse=True, reset_after=False)
    gradients = [
        torch.autograd.grad(result[wanted].sum(), differentiable(arguments))
        for result in (got, want)
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@needs_torch
@pytest.mark.parametrize("create_graph", [False, True])
def test_torch_operator_refuses_a_second_derivative(create_graph):
    """Called by name, it does not leave it out: only the layer has it."""
    projections, tokens, weight_hh, bias_hh, lengths, h0 = tensors(draw(7))
    lists = [[each] for each in (projections, weight_hh, bias_hh)]
    how = (tokens, lengths, [False], False, True, True)
    _, h_last, _ = torch.ops.gru.forward(*lists, h0[None], *how)
    (gradient,) = torch.autograd.grad((h_last**2).sum(), [projections], create_graph=create_graph)
    assert gradient.requires_grad == create_graph
    if create_graph:
        with pytest.raises(RuntimeError, match='implementation="scan"'):
            gradient.sum().backward()


@needs_torch
def test_torch_operator_refuses_forward_mode():
    projections, tokens, weight_hh, bias_hh, lengths, h0 = tensors(draw(7))

    def last(h0):
        how = (tokens, lengths, [False], False, True, False)
        return torch.ops.gru.forward([projections], [weight_hh], [bias_hh], h0, *how)[1]

    with pytest.raises(RuntimeError, match='implementation="scan"'):
        torch.func.jvp(last, (h0[None].detach(),), (h0[None].detach(),))


@needs_torch
def test_torch_backward_writes_no_zeros_as_large_as_what_was_saved():
    """They took as long as the whole forward."""
    arguments = tensors(draw(0))
    _, h_last = Recur()(*arguments)
    with torch.profiler.profile(record_shapes=True) as profile:
        h_last.sum().backward()
    filled = [
        e.input_shapes[0] for e in profile.events() if e.name in ("aten::fill_", "aten::zero_")
    ]
    T, B, H = 6, 4, 5
    assert max(map(np.prod, filled)) < T * B * H


@needs_torch
def test_torch_takes_any_layout_and_refuses_other_types():
    arguments = tensors(draw(7))
    how = {"reverse": False, "reset_after": False}
    want = torch_impl.fused.recur(*arguments, **how)
    strided = [
        x if x is None or x.dim() < 2 else x.detach().t().contiguous().t() for x in arguments
    ]
    strided[1] = strided[1].long()
    torch.testing.assert_close(torch_impl.fused.recur(*strided, **how), want, rtol=0, atol=0)
    with pytest.raises(TypeError, match="float16"):
        torch_impl.fused.recur(
            *(x.half() if x.is_floating_point() else x for x in arguments), **how
        )
    with pytest.raises(ValueError, match="tokens"):
        torch_impl.fused.recur(arguments[0], arguments[1] + 7, *arguments[2:], **how)


@needs_jax
@both
@either_way
@with_tokens
def test_jax_gradients(K, reverse, reset_after):
    arguments = draw(K)
    how = {"reverse": reverse, "reset_after": reset_after}

    def loss(recur, projections, weight_hh, bias_hh, h0):
        outputs, h_last = recur(
            projections, arguments["tokens"], weight_hh, bias_hh, arguments["lengths"], h0, **how
        )
        return (outputs * jnp.cos(jnp.arange(outputs.size).reshape(outputs.shape))).sum() + (
            h_last**2
        ).sum(), (outputs, h_last)

    where = tuple(
        jnp.array(arguments[name]) for name in ("projections", "weight_hh", "bias_hh", "h0")
    )
    got, want = (
        jax.jit(jax.value_and_grad(loss, (1, 2, 3, 4), has_aux=True), static_argnums=0)(
            recur, *where
        )
        for recur in (jax_impl.fused.recur, jax_scan)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11)


@needs_jax
def test_jax_vmap():
    arguments = [None if x is None else jnp.array(x) for x in draw(7).values()]
    how = {"reverse": False, "reset_after": True}
    h0 = jnp.stack([arguments[-1], arguments[-1] + 1])

    def gradient(h0):
        return jax.grad(lambda h0: jax_impl.fused.recur(*arguments[:-1], h0, **how)[1].sum())(h0)

    got, slopes = (
        jax.vmap(lambda h0: jax_impl.fused.recur(*arguments[:-1], h0, **how))(h0),
        (jax.vmap(gradient)(h0)),
    )
    for i, first in enumerate(h0):
        want = jax_scan(*arguments[:-1], first, **how)
        np.testing.assert_allclose(got[0][i], want[0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(got[1][i], want[1], rtol=0, atol=1e-12)
        np.testing.assert_array_equal(slopes[i], gradient(first))


@needs_jax
def test_jax_refuses_bad_input():
    arguments = [None if x is None else jnp.array(x) for x in draw(7).values()]
    how = {"reverse": False, "reset_after": True}
    results = jax_impl.fused.recur(arguments[0], arguments[1] + 7, *arguments[2:], **how)
    assert all(jnp.isnan(result).all() for result in results)
    with pytest.raises(TypeError, match="float16"):
        jax_impl.fused.recur(*arguments[:-1], arguments[-1].astype(jnp.float16), **how)


@needs_torch
@needs_jax
@both
@with_tokens
def test_both_directions_are_each_direction(K, reset_after):
    """In both frameworks, and bit by bit the same in both; without every_step, too."""
    first, second = draw(K), draw(K)
    second["weight_hh"] = -second["weight_hh"]
    results = []
    for fused, convert, stack in (
        (torch_impl.fused, torch.tensor, torch.stack),
        (jax_impl.fused, jnp.array, jnp.stack),
    ):
        one, two = (
            {name: None if x is None else convert(x) for name, x in each.items()}
            for each in (first, second)
        )
        alone = [
            fused.recur(*each.values(), reverse=reverse, reset_after=reset_after)
            for each, reverse in ((one, False), (two, True))
        ]
        for every_step in (True, False):
            outputs, h_last = fused.recur_all(
                [one["projections"], two["projections"]],
                one["tokens"],
                [one["weight_hh"], two["weight_hh"]],
                [one["bias_hh"], two["bias_hh"]],
                one["lengths"],
                stack([one["h0"], two["h0"]]),
                reverse=[False, True],
                reset_after=reset_after,
                every_step=every_step,
            )
            np.testing.assert_array_equal(h_last, np.stack([last for _, last in alone]))
            want = np.concatenate([np.asarray(states) for states, _ in alone], -1)
            np.testing.assert_array_equal(outputs, want if every_step else want[:0])
        results.append(np.asarray(h_last))
    np.testing.assert_array_equal(*results)


@needs_torch
@needs_jax
def test_both_frameworks_at_once():
    """They share the kernel's threads: calls wait for one another, and nothing is mixed up."""
    torch_arguments = [None if x is None else torch.tensor(x) for x in draw(7).values()]
    jax_arguments = [None if x is None else jnp.array(x) for x in draw(7).values()]
    how = {"reverse": False, "reset_after": False}
    want = torch_impl.fused.recur(*torch_arguments, **how)[1].numpy()
    wrong = []

    def repeat(recur, arguments):
        wrong.extend(i for i in range(50) if not np.array_equal(recur(*arguments, **how)[1], want))

    other = threading.Thread(target=repeat, args=(torch_impl.fused.recur, torch_arguments))
    other.start()
    repeat(jax_impl.fused.recur, jax_arguments)
    other.join()
    assert not wrong


@needs_torch
@both
def test_torch_results_do_not_depend_on_the_threads(reset_after):
    """They are those of PyTorch's OpenMP runtime, not of the kernel's own pool."""
    T, B, H, K = 50, 64, 32, 40
    rng = np.random.default_rng(0)
    arrays = (
        rng.normal(size=(K, 3 * H)).astype(np.float32),
        rng.integers(0, K, (T, B), dtype=np.int32),
        rng.normal(size=(3 * H, H)).astype(np.float32) / H**0.5,
        rng.normal(size=3 * H).astype(np.float32),
        rng.integers(0, T + 1, B).astype(np.int32),
        rng.normal(size=(B, H)).astype(np.float32),
    )

    def results(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        leaves = [torch.tensor(a, requires_grad=a.dtype == np.float32) for a in arrays]
        outputs, h_last = torch_impl.fused.recur(*leaves, reverse=False, reset_after=reset_after)
        (outputs.sum() + (h_last**2).sum()).backward()
        return [outputs, h_last, *(leaf.grad for leaf in leaves if leaf.requires_grad)]

    one = results(1)
    for threads in (2, 3):
        for got, want in zip(results(threads), one, strict=True):
            assert torch.equal(got, want)


@needs_jax
def test_jax_takes_the_kernel_on_the_cpu_of_a_machine_with_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    drawn = init_gru(3, 4, 1, False, seed=0)
    parameters = {name: jnp.asarray(value) for name, value in drawn.items()}
    x, lengths = jnp.ones((5, 2, 3)), jnp.array([5, 2])
    how = {"reset_after": False}
    fused = jax_impl.gru.gru(parameters, x, lengths, implementation="fused", **how)
    auto = jax_impl.gru.gru(parameters, x, lengths, **how)  # scan, there
    for got, want in zip(fused, auto, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
