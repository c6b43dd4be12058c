"""The modules replace torch.nn.GRU and GRUCell, and nnx.RNN and GRUCell of Flax.

The tests cover each statement of docs/layer.md about their arguments.
"""

import copy
import io
import itertools
import os
import pickle
import subprocess
import sys
import warnings
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import jax_impl
import torch_impl
from common import convert
from common.params import init_gru
from jax_impl.gru import gru as jax_gru
from tests import ROOT
from torch_impl.gru import CELL
from torch_impl.gru import gru as torch_gru

T, B, D, H = 11, 3, 5, 7
LENGTHS = [4, 11, 1]
needs_kernel = pytest.mark.skipif(CELL.implementations()[-1] == "scan", reason="no kernel")


def pair(*sizes: int, seed: int = 0, **options: object) -> tuple[nn.GRU, torch_impl.GRU]:
    """nn.GRU and torch_impl.GRU, with the same seed."""
    created = []
    for kind in (nn.GRU, torch_impl.GRU):
        torch.manual_seed(seed)
        created.append(kind(*(sizes or (D, H)), **options))
    return created[0], created[1]


def assert_same(ours: object, theirs: object) -> None:
    """Assert equality up to the rounding of sums in another order."""
    for pair in zip(ours, theirs, strict=True):
        a, b = (each.data if hasattr(each, "batch_sizes") else each for each in pair)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


# PyTorch


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("with_hx", [False, True])
def test_a_seed_gives_nn_grus_parameters_outputs_and_gradients(
    batch_first, bidirectional, bias, with_hx
):
    theirs, ours = pair(D, H, 2, bias, batch_first, 0.0, bidirectional)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)
    x = torch.randn(T, B, D)
    hx = torch.randn(4 if bidirectional else 2, B, H) if with_hx else None
    result = []
    for gru in (ours, theirs):
        leaf = x.clone().requires_grad_()
        outputs, h_n = gru(leaf.transpose(0, 1) if batch_first else leaf, hx)
        leaves = [leaf, *gru.parameters()]
        gradients = torch.autograd.grad(outputs.square().sum() + h_n.sum(), leaves)
        result.append([outputs, h_n, *gradients])
    assert_same(*result)


@pytest.mark.parametrize("enforce_sorted", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_sequences(enforce_sorted, bidirectional):
    theirs, ours = pair(D, H, 2, bidirectional=bidirectional)
    lengths = sorted(LENGTHS, reverse=True) if enforce_sorted else LENGTHS
    packed = pack_padded_sequence(torch.randn(T, B, D), lengths, enforce_sorted=enforce_sorted)
    for hx in (None, torch.randn(4 if bidirectional else 2, B, H)):
        (a, h_a), (b, h_b) = ours(packed, hx), theirs(packed, hx)
        assert torch.equal(a.batch_sizes, b.batch_sizes)
        assert_same((a, h_a), (b, h_b))
        for one, other in zip(pad_packed_sequence(a), pad_packed_sequence(b), strict=True):
            torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="PackedSequence"):
        ours(packed, lengths=lengths)


@pytest.mark.parametrize("batch_first", [False, True])
def test_input_without_a_batch(batch_first):
    theirs, ours = pair(D, H, 2, batch_first=batch_first)
    x, hx = torch.randn(T, D), torch.randn(2, H)
    assert_same(ours(x), theirs(x))
    assert_same(ours(x, hx), theirs(x, hx))
    assert_same(ours(x, hx, lengths=4)[1:], theirs(x[:4], hx)[1:])
    with pytest.raises(RuntimeError, match="hx should also be 2-D"):
        ours(x, hx[:, None])


@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_are_those_of_packing(batch_first):
    theirs, ours = pair(D, H, bidirectional=True, batch_first=batch_first)
    x = torch.randn(*((B, T) if batch_first else (T, B)), D)
    packed = pack_padded_sequence(x, LENGTHS, batch_first, enforce_sorted=False)
    outputs, h_n = theirs(packed)
    expected = (pad_packed_sequence(outputs, batch_first)[0], h_n)
    for lengths in (LENGTHS, torch.tensor(LENGTHS), np.array(LENGTHS, np.int16)):
        assert_same(ours(x, lengths=lengths), expected)


def test_dropout_drops_what_nn_gru_drops():
    theirs, ours = pair(D, H, 3, dropout=0.4, bidirectional=True)
    x, result = torch.randn(T, B, D), []
    for gru in (ours, theirs):
        torch.manual_seed(1)
        result.append(gru(x))
    assert_same(*result)
    again = ours(x)[0]
    assert not torch.equal(result[0][0], again)
    assert_same(ours.eval()(x), theirs.eval()(x))
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        torch_impl.GRU(D, H, dropout=0.5)


def test_packed_sequences_ignore_the_default_device():
    packed = pack_padded_sequence(torch.randn(T, B, D), LENGTHS, enforce_sorted=False)
    gru = torch_impl.GRU(D, H)
    expected = gru(packed)
    with torch.device("meta"):
        actual = gru(packed)
    assert torch.equal(actual[0].data, expected[0].data)
    assert torch.equal(actual[1], expected[1])


def test_dropout_of_packed_sequences_drops_what_nn_gru_drops():
    theirs, ours = pair(D, H, 2, dropout=0.5, bidirectional=True)
    packed, result = pack_sequence([torch.randn(n, D) for n in LENGTHS], False), []
    for gru in (ours, theirs):
        torch.manual_seed(1)
        result.append((gru(packed)[0].data, torch.rand(1)))
    assert_same(*result)


def test_activations_are_recomputed():
    gru, x = torch_impl.GRU(D, H, 2), torch.randn(T, B, D, requires_grad=True)
    expected = torch.autograd.grad(gru(x)[0].sum(), x)
    for reentrant in (False, True):
        x.grad = None
        torch.utils.checkpoint.checkpoint(gru, x, use_reentrant=reentrant)[0].sum().backward()
        assert_same([x.grad], expected)


@needs_kernel
def test_torch_jit_trace_is_refused():
    """A trace would not contain the kernel."""
    gru, x = torch_impl.GRU(D, H), torch.randn(T, B, D)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record"):
        torch.jit.trace(gru, (x,))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_transformations_within_torch_compile(transform):
    gru, x = torch_impl.GRU(D, H), torch.randn(T, B, D)
    function = transform(lambda x: gru(x)[0].sum())
    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_device_and_dtype(dtype):
    gru = torch_impl.GRU(D, H, device="cpu", dtype=dtype)
    outputs, h_n = gru(torch.randn(T, B, D, dtype=dtype))
    assert outputs.dtype == h_n.dtype == gru.weight_ih_l0.dtype == dtype
    assert torch_impl.GRU(D, H, device="meta").weight_ih_l0.is_meta
    with pytest.raises(ValueError, match="does not match weight dtype"):
        gru(torch.randn(T, B, D).half())


def test_a_state_dict_is_nn_grus_and_the_other_kind_is_refused():
    theirs, _ = pair(D, H, 2, bidirectional=True)
    _, ours = pair(D, H, 2, bidirectional=True, seed=1)
    x = torch.randn(T, B, D)
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours(x), theirs(x))
    _, ours = pair(D, H, 2, bidirectional=True, seed=2)
    theirs.load_state_dict(ours.state_dict())
    assert_same(ours(x), theirs(x))

    before = torch_impl.GRU(D, H, 2, bidirectional=True, reset_after=False)
    model, other = nn.Sequential(before), nn.Sequential(theirs)
    for strict in (False, True):
        with pytest.raises(
            RuntimeError, match=r"0\.weight_ih_l0 is of a GRU with reset_after=True"
        ):
            model.load_state_dict(other.state_dict(), strict=strict)
        with pytest.raises(RuntimeError, match="is of a GRU with reset_after=False, this one has"):
            ours.load_state_dict(before.state_dict(), strict=strict)
    again = torch_impl.GRU(D, H, 2, bidirectional=True, reset_after=False)
    again.load_state_dict(before.state_dict())
    assert torch.equal(again(x)[0], before(x)[0])


@pytest.mark.parametrize("reset_after", [False, True])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}])
def test_canonical_parameters_there_and_back(reset_after, options):
    gru = torch_impl.GRU(D, H, reset_after=reset_after, dtype=torch.float64, **options)
    parameters = {name: p.detach().numpy() for name, p in gru.canonical().items()}
    again = torch_impl.GRU.from_canonical(parameters, reset_after=reset_after)
    for a, b in zip(gru.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    x = torch.randn(T, B, D, dtype=torch.float64)
    lengths = torch.tensor(LENGTHS)
    plain = torch_gru(gru.canonical(), x, lengths, reset_after=reset_after)
    assert torch.equal(plain[0], again(x, lengths=LENGTHS)[0])
    with jax.enable_x64(True):
        twin = jax_impl.GRU.from_canonical(parameters, reset_after=reset_after)
        outputs, h_last = twin(x.numpy(), lengths=np.array(LENGTHS), time_major=True)
        np.testing.assert_allclose(outputs, plain[0].detach().numpy(), rtol=0, atol=1e-13)
        np.testing.assert_allclose(h_last, plain[1].detach().numpy(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("reset_after", [False, True])
def test_invalid_canonical_parameters_raise(reset_after):
    good = torch_impl.GRU(D, H, 2, bidirectional=True, reset_after=reset_after).canonical()
    name = "gru.1.forward.weight_ih"
    for changed, error, match in (
        ({name: good[name][:, :1]}, ValueError, r"gru\.1\.forward\.weight_ih: expected shape"),
        ({name: good[name].double()}, TypeError, "expected float32, as"),
        ({"gru.0.forwrd.bias_ih": good[name]}, ValueError, "found gru.0.forwrd.bias_ih"),
        ({name: None}, ValueError, r"expected gru\.1\.forward\.weight_ih, found none"),
    ):
        wrong = {n: p for n, p in (good | changed).items() if p is not None}
        for each in (torch_impl.GRU, jax_impl.GRU):
            arguments = wrong
            if each is jax_impl.GRU:
                arguments = {n: p.detach().numpy() for n, p in wrong.items()}
            with jax.enable_x64(True), pytest.raises(error, match=match):
                each.from_canonical(arguments, reset_after=reset_after)


@pytest.mark.parametrize("reset_after", [False, True])
def test_torch_modules_are_copied_pickled_and_printed(reset_after, tmp_path):
    gru = torch_impl.GRU(D, H, 2, True, True, 0.2, True, reset_after=reset_after).eval()
    x = torch.randn(B, T, D)
    expected = gru(x)
    buffer = io.BytesIO()
    torch.save(gru, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(gru), pickle.loads(pickle.dumps(gru))]
    for each in (*copies, torch.load(buffer, weights_only=False)):
        assert torch.equal(each(x)[0], expected[0])
    assert gru.flatten_parameters() is None
    assert [len(names) for names in gru.all_weights] == [4] * 4
    assert (gru.input_size, gru.hidden_size, gru.num_layers, gru.bidirectional) == (D, H, 2, True)
    text = "GRU(5, 7, num_layers=2, batch_first=True, dropout=0.2, bidirectional=True"
    assert repr(gru) == text + (")" if reset_after else ", reset_after=False)")
    assert "implementation=scan" in repr(torch_impl.GRU(D, H, implementation="scan"))
    swapped = {name: p.detach().clone() * 2 for name, p in gru.named_parameters()}
    called = torch.func.functional_call(gru, swapped, (x,))
    gru.load_state_dict(swapped)
    assert_same(called, gru(x))


@needs_kernel
@pytest.mark.parametrize("reset_after", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_of_any_batch_and_time(reset_after, strict):
    gru = torch_impl.GRU(D, H, 2, bidirectional=True, reset_after=reset_after).eval()
    example = {"input": torch.randn(150, B, D), "lengths": torch.tensor([150, 3, 70])}
    T_, B_ = torch.export.Dim("T"), torch.export.Dim("B")
    shapes = {"input": {0: T_, 1: B_}, "lengths": {0: B_}}
    program = torch.export.export(gru, (), example, dynamic_shapes=shapes, strict=strict)
    for steps, rows in ((150, 3), (1, 1), (400, 8), (65, 2)):
        x, lengths = torch.randn(steps, rows, D), torch.randint(1, steps + 1, (rows,))
        assert_same(program.module()(input=x, lengths=lengths), gru(x, lengths=lengths))


@needs_kernel
@pytest.mark.parametrize("reset_after", [False, True])
def test_torch_compile_of_any_batch_and_time(reset_after):
    gru = torch_impl.GRU(D, H, bidirectional=True, reset_after=reset_after)
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gru, dynamic=True, fullgraph=True, backend=counter)
    for steps, rows in ((20, 3), (64, 2), (65, 5), (2, 2), (30, 4), (100, 3)):
        leaf = torch.randn(steps, rows, D, requires_grad=True)
        result = []
        for each in (compiled, gru):
            outputs, h_n = each(leaf)
            result.append((outputs, h_n, *torch.autograd.grad(outputs.square().sum(), leaf)))
        assert_same(*result)
    assert counter.frame_count <= 2  # one step, with the special cases of a short sequence


@needs_kernel
def test_torch_compile_of_any_number_of_units():
    def h_last(x, lengths, parameters):
        return torch_gru(parameters, x, lengths, implementation="auto")[1]

    torch.compiler.reset()
    compiled = torch.compile(h_last, dynamic=True, fullgraph=True, backend="aot_eager")
    for units in (7, 8, 9):
        arguments = (
            torch.randn(T, B, D),
            torch.tensor(LENGTHS),
            torch_impl.GRU(D, units).canonical(),
        )
        assert_same(compiled(*arguments), h_last(*arguments))


@pytest.mark.parametrize("shape", [(0, B, D), (T, 0, D), (0, 0, D), (0, D), (T, B, 0), (0, B, 1)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_empty_input_gives_what_nn_gru_gives(batch_first, device, shape):
    """The shapes, or the error after the name of the argument, are those of nn.GRU."""
    x, result = torch.ones(shape, device=device), []
    if batch_first and len(shape) == 3:
        x = x.transpose(0, 1)
    for layer in (nn.GRU, torch_impl.GRU):
        for recorded in (False, True):
            with torch.set_grad_enabled(recorded):
                try:
                    results = layer(D, H, batch_first=batch_first, device=device)(x)
                    result.append(str([each.shape for each in results]))
                except RuntimeError as error:
                    result.append(str(error).removeprefix("input: "))
    assert len({*result}) == 1, result


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("with_hx", [False, True])
def test_torch_cell(bias, with_hx):
    torch.manual_seed(0)
    theirs = nn.GRUCell(D, H, bias)
    torch.manual_seed(0)
    ours = torch_impl.GRUCell(D, H, bias)
    x, hx = torch.randn(B, D), torch.randn(B, H) if with_hx else None
    assert torch.equal(ours(x, hx), theirs(x, hx))
    one = None if hx is None else hx[0]
    assert torch.equal(ours(x[0], one), theirs(x[0], one))

    gru = torch_impl.GRU(D, H, bias=bias, reset_after=False)
    cell = torch_impl.GRUCell(D, H, bias, reset_after=False)
    cell.load_state_dict(gru.state_dict())
    first = None if hx is None else hx[None]
    torch.testing.assert_close(cell(x, hx), gru(x[None], first)[1][0])
    torch.testing.assert_close(cell(x[0], one), cell(x, hx)[0])
    assert repr(cell) == f"GRUCell(5, 7{'' if bias else ', bias=False'}, reset_after=False)"
    with pytest.raises(RuntimeError, match="reset_after=True, this one has reset_after=False"):
        cell.load_state_dict(theirs.state_dict())
    for wrong in (x[:, 1:], hx), (x, torch.zeros(B + 1, H)), (x.double(), hx), (x.numpy(), hx):
        with pytest.raises((ValueError, TypeError), match=r"input|hx"):
            cell(*wrong)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(cell(x.bfloat16(), hx), cell(x.bfloat16().float(), hx))
    program = torch.export.export(cell, (x,), dynamic_shapes={"input": {0: torch.export.Dim("B")}})
    torch.testing.assert_close(program.module()(torch.cat([x, x])), cell(torch.cat([x, x])))


# Flax


def flax_pair(**options: object) -> tuple[nnx.RNN, jax_impl.GRU]:
    """The layer of Flax, with a non-zero bias, and jax_impl.GRU with its parameters."""
    normal = nnx.initializers.normal()
    theirs = nnx.RNN(nnx.GRUCell(D, H, bias_init=normal, rngs=nnx.Rngs(0)), **options)
    options = {"return_carry": False, **options}
    return theirs, jax_impl.GRU.from_canonical(canonical(theirs), reset_after=True, **options)


def canonical(layer: nnx.RNN) -> dict[str, np.ndarray]:
    """The canonical parameters of the layer of Flax."""
    flat = nnx.to_flat_state(nnx.state(layer.cell, nnx.Param))
    tensors = {"/".join(path): np.asarray(value[...]) for path, value in flat}
    return convert.from_format("nnx", tensors, reset_after=True)


# time_major, reverse, keep_order, return_carry, seq_lengths. With the carry, every pair of values
# occurs by default.
NNX_DEFAULT = [
    (False, False, False, False, None),
    (False, False, True, True, LENGTHS),
    (False, True, False, True, LENGTHS),
    (False, True, True, True, None),
    (True, False, False, True, LENGTHS),
    (True, True, True, True, LENGTHS),
    (True, False, True, True, None),
]
NNX_OPTIONS = [
    pytest.param(*each, marks=[] if each in NNX_DEFAULT else [pytest.mark.long])
    for each in itertools.product(*[[False, True]] * 4, [None, LENGTHS])
    if each[3] or not any(each[:3])
]


@pytest.mark.parametrize(
    ("time_major", "reverse", "keep_order", "return_carry", "seq_lengths"), NNX_OPTIONS
)
def test_nnx_rnns_call(time_major, reverse, keep_order, return_carry, seq_lengths):
    options = {"time_major": time_major, "reverse": reverse, "keep_order": keep_order}
    options["return_carry"] = return_carry
    arguments = {"initial_carry": 0.3 * jnp.ones((B, H))} if keep_order else {}
    if seq_lengths:
        arguments["seq_lengths"] = jnp.array(seq_lengths)
    x = jax.random.normal(jax.random.key(1), (T, B, D) if time_major else (B, T, D))
    results = [each(x, **options, **arguments) for each in flax_pair()]
    results += [each(x, **arguments) for each in flax_pair(**options)]
    actual = []
    for result in results:
        carry, outputs = result if return_carry else (None, result)
        outputs = outputs.swapaxes(0, 1) if time_major else outputs
        there = np.arange(T) < np.array(seq_lengths or [T] * B)[:, None]
        actual.append(
            (carry, np.where(there[..., None], outputs, 0))
        )  # here jax_impl.GRU has zeros
    for carry, outputs in actual[1:]:
        np.testing.assert_allclose(outputs, actual[0][1], rtol=0, atol=2e-6)
        if return_carry:
            np.testing.assert_allclose(carry, actual[0][0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_any_number_of_batch_dimensions(shape):
    theirs, ours = flax_pair(return_carry=True)
    x = jax.random.normal(jax.random.key(0), (*shape, T, D))
    for a, b in zip(ours(x), theirs(x), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)
    outputs, h_last = jax_impl.GRU(D, H, 2, bidirectional=True, rngs=nnx.Rngs(0))(x)
    assert outputs.shape == (*shape, T, 2 * H) and h_last.shape == (4, *shape, H)


def test_construction_under_nnx_transformations():
    def make(rngs):
        return jax_impl.GRU(D, H, 2, bidirectional=True, dropout=0.2, rngs=rngs)

    x = jnp.ones((B, T, D))
    created, plain = nnx.jit(make)(nnx.Rngs(0)), make(nnx.Rngs(0))
    for a, b in zip(
        *(jax.tree.leaves(nnx.state(g, nnx.Param)) for g in (created, plain)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    assert abstract.gru_0_forward_weight_ih.shape == (3 * H, D)

    @nnx.split_rngs(splits=4)
    @nnx.vmap(in_axes=0, out_axes=0)
    def many(rngs):
        return jax_impl.GRU(D, H, rngs=rngs)

    ensemble = many(nnx.Rngs(0))
    assert len({float(w[0, 0]) for w in ensemble.gru_0_forward_weight_ih[...]}) == 4
    outputs = nnx.vmap(lambda gru, x: gru(x)[0], in_axes=(0, None))(ensemble, x)
    assert outputs.shape == (4, B, T, H)


def test_flax_dtypes_and_initializers():
    observed = []

    def init(key, shape, dtype):
        observed.append(shape)
        return jnp.full(shape, len(observed), dtype)

    gru = jax_impl.GRU(D, H, recurrent_kernel_init=init, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert observed == [(H, H)] * 3 and gru.gru_0_forward_weight_hh.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gru.gru_0_forward_weight_hh[::H, 0], [1, 2, 3])
    assert 0.3 < float(abs(gru.gru_0_forward_weight_ih[...]).max()) < 0.38  # of ±1/sqrt(7)
    x = jnp.ones((B, T, D))
    with pytest.raises(TypeError, match="as x is"):
        gru(x)
    mixed = jax_impl.GRU(D, H, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert mixed(x)[0].dtype == jnp.bfloat16 and mixed.gru_0_forward_bias_hh.dtype == jnp.float32
    gradient = nnx.grad(lambda gru: gru(x)[0].sum())(mixed)
    assert gradient.gru_0_forward_weight_ih.dtype == jnp.float32


def test_flax_dropout():
    gru = jax_impl.GRU(D, H, 2, dropout=0.5, rngs=nnx.Rngs(0))
    x = jnp.ones((B, T, D))
    assert not np.array_equal(gru(x)[0], gru(x)[0])
    first, second = (gru(x, rngs=nnx.Rngs(dropout=3))[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    gru.eval()
    np.testing.assert_array_equal(gru(x)[0], gru(x)[0])


@pytest.mark.parametrize(
    "implementation", [pytest.param("loop", marks=pytest.mark.long), "scan", "fused"]
)
def test_jax_export_of_any_batch_and_time(implementation):
    if implementation not in CELL.implementations():
        pytest.skip("no kernel")
    gru = jax_impl.GRU(D, H, implementation=implementation, rngs=nnx.Rngs(0))
    graph, state = nnx.split(gru)
    shape = jax.export.symbolic_shape("b, t")
    # The exported program of fused calls the kernel, which jax_impl registers.
    kernel = jax.export.DisabledSafetyCheck.custom_call("gru_forward")
    call = jax.jit(lambda x: nnx.merge(graph, state)(x)[0])
    with warnings.catch_warnings(record=True) as output:
        warnings.simplefilter("always")
        program = jax.export.export(call, disabled_checks=[kernel])(
            jax.ShapeDtypeStruct((*shape, D), jnp.float32)
        )
    assert any("calls a kernel" in str(w.message) for w in output) == (implementation == "fused")
    program = jax.export.deserialize(program.serialize())
    for rows, steps in ((1, 1), (4, 300)):
        x = jax.random.normal(jax.random.key(rows), (rows, steps, D))
        np.testing.assert_allclose(program.call(x), gru(x)[0], rtol=0, atol=1e-6)


def test_flax_cell():
    theirs, _ = flax_pair()
    cell = jax_impl.GRUCell(D, H, rngs=nnx.Rngs(0))
    for name, value in canonical(theirs).items():
        getattr(cell, name.rpartition(".")[2])[...] = jnp.asarray(value)
    h, x = jnp.ones((B, H)) / 2, jax.random.normal(jax.random.key(0), (B, D))
    for a, b in zip(cell(h, x), theirs.cell(h, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    sequence = jax.random.normal(jax.random.key(1), (B, T, D))
    np.testing.assert_allclose(nnx.RNN(cell)(sequence), theirs(sequence), rtol=0, atol=2e-6)
    assert cell.initialize_carry((2, 3, D)).shape == (2, 3, H)
    ones = cell.initialize_carry((3, D), nnx.Rngs(0), nnx.initializers.ones)
    np.testing.assert_array_equal(ones, np.ones((3, H)))

    mixed = nnx.RNN(jax_impl.GRUCell(D, H, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    assert mixed(sequence).dtype == jnp.float32

    before = jax_impl.GRUCell(D, H, reset_after=False, rngs=nnx.Rngs(0))
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    own = {f"gru.0.forward.{name}": getattr(before, name)[...] for name in names}
    last = jax_gru(own, sequence.swapaxes(0, 1)[:1], np.ones(B, int), h[None])[1][0]
    np.testing.assert_allclose(before(h, sequence[:, 0])[0], last, rtol=0, atol=1e-6)


def test_no_time_steps_no_rows_and_no_inputs():
    """Empty inputs give the shapes of nnx.RNN, which also allows zero time steps."""
    gru = jax_impl.GRU(D, H, 2, rngs=nnx.Rngs(0))
    for shape in ((0, D), (3, 0, D), (2, 3, 0, D), (0, T, D), (2, 0, T, D)):
        outputs, h_last = gru(jnp.zeros(shape))
        assert outputs.shape == (*shape[:-1], H) and h_last.shape == (2, *shape[:-2], H)
        theirs = nnx.RNN(nnx.GRUCell(D, H, rngs=nnx.Rngs(0)))(jnp.zeros(shape))
        assert theirs.shape == outputs.shape
    assert gru(jnp.zeros((0, T, D)), [])[0].shape == (0, T, H)
    parameters = {name: p.astype(np.float32) for name, p in init_gru(0, H, 1, False, 0).items()}
    lengths = jnp.full(B, T)
    slopes = jax.grad(lambda p: jax_gru(p, jnp.zeros((T, B, 0)), lengths)[0].sum())(parameters)
    assert all(jnp.isfinite(each).all() for each in slopes.values())


@pytest.mark.parametrize("length", [-1, T + 1])
def test_a_row_with_a_wrong_length_is_nan_under_jit(length):
    gru, lengths = jax_impl.GRU(D, H, rngs=nnx.Rngs(0)), jnp.array([3, length, T])
    outputs, h_last = nnx.jit(lambda gru, x, n: gru(x, n))(gru, jnp.ones((B, T, D)), lengths)
    for each in (outputs, h_last[0]):
        assert np.isnan(each[1]).all() and np.isfinite(np.delete(each, 1, 0)).all()


@pytest.mark.parametrize("module", [torch_impl.GRU, torch_impl.GRUCell])
def test_torch_modules_refuse_a_reset_after_that_is_no_bool(module):
    with pytest.raises(TypeError, match="reset_after"):
        module(D, H, reset_after=None)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_repr_of_recurrent(bidirectional):
    layer = torch_impl.Recurrent(torch_impl.rnn.CELL, D, H, bidirectional=bidirectional)
    assert repr(layer) == f"Recurrent(rnn, {D}, {H}, 1{', bidirectional=True' * bidirectional})"


def test_jax_modules_reject_invalid_arguments():
    for changed, match in (
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"reset_after": None}, "reset_after"),
        ({"reverse": 1}, "reverse"),
        ({"rngs": None}, "rngs"),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            jax_impl.GRU(D, H, **{"rngs": nnx.Rngs(0), **changed})
    gru, x = jax_impl.GRU(D, H, rngs=nnx.Rngs(0)), jnp.ones((B, T, D))
    with pytest.raises(ValueError, match="initial_carry"):
        gru(x, initial_carry=jnp.ones((1, B, H)))
    with pytest.raises(ValueError, match="rngs"):
        jax_impl.GRU.from_canonical(gru.canonical(), reset_after=True, dropout=0.5)
    cell = jax_impl.GRUCell(D, H, rngs=nnx.Rngs(0))
    for carry, inputs in ((jnp.ones((B, H)), jnp.ones((B, D + 1))), (None, jnp.ones((B, D)))):
        with pytest.raises((ValueError, TypeError), match=r"inputs|carry"):
            cell(carry, inputs)


def test_jax_modules_are_copied_and_pickled():
    gru, x = jax_impl.GRU(D, H, 2, bidirectional=True, rngs=nnx.Rngs(0)), jnp.ones((B, T, D))
    for each in (copy.deepcopy(gru), pickle.loads(pickle.dumps(gru)), nnx.clone(gru)):
        np.testing.assert_array_equal(each(x)[0], gru(x)[0])


def test_two_names_of_one_argument():
    gru, x = jax_impl.GRU(D, H, rngs=nnx.Rngs(0)), jnp.ones((B, T, D))
    for arguments in (
        {"lengths": LENGTHS, "seq_lengths": LENGTHS},
        {"h0": jnp.ones((1, B, H)), "initial_carry": jnp.ones((B, H))},
    ):
        with pytest.raises(ValueError, match="one of the two, found both"):
            gru(x, **arguments)
    with pytest.raises(ValueError, match="reverse"):
        gru(x, resets=jnp.zeros((B, T), bool), reverse=True)


# Resets, in both


@pytest.mark.parametrize("reset_after", [False, True])
@pytest.mark.parametrize("implementation", CELL.implementations())
def test_concatenated_documents_with_resets_match_separate_documents(implementation, reset_after):
    """Concatenated documents with resets give the outputs of each document alone."""
    options = {"bidirectional": True, "reset_after": reset_after, "implementation": implementation}
    gru = torch_impl.GRU(D, H, 2, dtype=torch.float64, **options)
    documents = [torch.randn(length, D, dtype=torch.float64) for length in (4, 1, 6)]
    alone, _ = gru(pack_sequence(documents, enforce_sorted=False))
    alone = [row[:n] for row, n in zip(pad_packed_sequence(alone, True)[0], (4, 1, 6), strict=True)]
    stream, resets = torch.cat(documents), torch.zeros(11, dtype=torch.bool)
    resets[[0, 4, 5]] = True
    outputs, _ = gru(stream, resets=resets)
    torch.testing.assert_close(outputs, torch.cat(alone), rtol=0, atol=1e-14)
    with jax.enable_x64(True):
        parameters = {name: p.detach().numpy() for name, p in gru.canonical().items()}
        twin = jax_impl.GRU.from_canonical(
            parameters, reset_after=reset_after, implementation=implementation
        )
        outputs, _ = twin(stream.numpy(), resets=resets.numpy())
        np.testing.assert_allclose(outputs, torch.cat(alone).detach().numpy(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("batch_first", [False, True])
def test_chunks_with_resets_and_h_reset_match_single_steps(batch_first):
    """Each chunk starts from the state of the previous one; episodes start from the first state."""
    gru = torch_impl.GRU(D, H, batch_first=batch_first)
    first = torch.randn(1, 1, H).expand(1, B, H).requires_grad_()
    x, begins = torch.randn(T, B, D), torch.rand(T, B) < 0.2
    h, expected = first, []
    for t in range(T):
        h = torch.where(begins[t, :, None], first, h)
        _, h = gru(x[t : t + 1] if not batch_first else x[t][:, None], h)
        expected.append(h[0])
    result, carry = [], first
    for part in (slice(0, 4), slice(4, T)):
        chunk, resets = x[part], begins[part]
        if batch_first:
            chunk, resets = chunk.transpose(0, 1), resets.T
        outputs, carry = gru(chunk, carry, resets=resets, h_reset=first)
        result.append(outputs.transpose(0, 1) if batch_first else outputs)
    torch.testing.assert_close(torch.cat(result), torch.stack(expected))
    wanted = torch.autograd.grad(torch.stack(expected).square().sum(), [first, gru.weight_hh_l0])
    actual = torch.autograd.grad(torch.cat(result).square().sum(), [first, gru.weight_hh_l0])
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# Conversion from other libraries


KERAS = f"""
import pathlib
import keras, numpy as np, torch
from common.convert import from_format
import jax_impl, torch_impl
x = np.random.default_rng(0).normal(size=({B}, {T}, {D})).astype(np.float32)
for reset_after in (False, True):
    how = dict(reset_after=reset_after, bias_initializer="uniform")
    layer = keras.layers.GRU({H}, return_sequences=True, **how)
    expected = keras.ops.convert_to_numpy(layer(x))
    names = ("kernel", "recurrent_kernel", "bias")
    tensors = dict(zip(names, map(np.asarray, layer.get_weights())))
    parameters = from_format("keras", tensors, reset_after=reset_after)
    ours = torch_impl.GRU.from_canonical(parameters, reset_after=reset_after, batch_first=True)
    twin = jax_impl.GRU.from_canonical(parameters, reset_after=reset_after)
    for outputs in (ours(torch.tensor(x))[0].detach().numpy(), twin(x)[0]):
        np.testing.assert_allclose(outputs, expected, rtol=0, atol=2e-6)
text = pathlib.Path("docs/layer.md").read_text()
blocks = [block.partition("```")[0] for block in text.split("```python\\n")[1:]]
assert len(blocks) >= 6
for block in blocks:
    exec(compile(block, "docs/layer.md", "exec"), {{"__name__": "docs"}})
"""


@pytest.mark.parametrize("backend", ["jax", pytest.param("torch", marks=pytest.mark.long)])
def test_keras_layers_are_converted_and_docs_examples_run(backend):
    """A separate process runs this, because Keras has one backend per process."""
    if not find_spec("keras"):
        pytest.skip("needs keras")
    environment = os.environ | {"KERAS_BACKEND": backend}
    subprocess.run([sys.executable, "-c", KERAS], check=True, cwd=ROOT, env=environment)
