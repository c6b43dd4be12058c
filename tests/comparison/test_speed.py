"""The speed comparison times all contenders, and its arithmetic is right."""

import pkgutil
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from importlib import reload
from importlib.machinery import FileFinder
from pkgutil import ModuleInfo
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from msgspec.structs import asdict

from common import kernels, oracle
from common.report import tables
from common.report.schema import BUILT_IN, Task
from comparison import contenders, parity, peers, speed
from comparison.contenders import Contenders, batch_of
from comparison.peers import PROCESSES
from comparison.peers.torch import nn_module
from tools import endurance


@pytest.mark.parametrize(
    "processes",
    [("torch", "jax"), pytest.param(PROCESSES, marks=pytest.mark.long)],
    ids=["the twins'", "all"],
)
def test_every_contender_is_timed(
    processes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    quickly = "from comparison import contenders\ncontenders.ENOUGH_SECONDS = 0.01\n"
    quickly += "contenders.WARM_UP = 0, 1\ncontenders.TIMED = 0.01, 3\n"
    if processes != PROCESSES:  # Inductor, which starts a C++ compiler, is left to the long case.
        quickly += "import functools, torch\n"
        quickly += "torch.compile = functools.partial(torch.compile, backend='eager')\n"

    def start(count: int, context: object) -> ProcessPoolExecutor:
        # The processes are forked from one that has imported the frameworks.
        return ProcessPoolExecutor(count, endurance.forkserver(), exec, (quickly,))

    monkeypatch.setattr(speed, "ProcessPoolExecutor", start)
    monkeypatch.setattr(speed, "REPETITIONS", 1)
    monkeypatch.setattr(speed, "RECIPE", Task(1, 5, 8, training=True))
    monkeypatch.setattr(speed, "LENGTHS", (Task(3, 5, 8), Task(3, 6, 8)))
    monkeypatch.setattr(speed, "INFERENCE", (Task(3, 5, 8, backward=False),))
    tasks = [Task(3, 5, 8)]
    if processes == PROCESSES:
        tasks.append(Task(3, 5, 8, bidirectional=True, backward=False))
    result = speed.measure(tasks, lambda line: None, processes=processes)
    for task in tasks:
        rows = {r.contender: r for r in result.rows if asdict(r).items() >= asdict(task).items()}
        assert {"torch loop", "torch scan", "jax scan", "nn.GRU packed"} < rows.keys()
        assert {"flax.linen RNN", "flax.nnx RNN"} < rows.keys()
        assert rows[speed.REFERENCE].ratio == 1
        for row in rows.values():
            low, high = row.quartiles
            assert 0 < low <= row.tokens_per_second <= high
            assert 0 < row.peak_fraction < 1
    assert {"nn.GRU padded", "torch loop"} <= {row.contender for row in result.recipe}
    if {"torch fused", "jax fused"} < rows.keys():
        requested = {(name, T) for name in ("torch fused", "jax fused") for T in (5, 6)}
        assert {(row.contender, row.T) for row in result.lengths} == requested
    assert all(row.nanoseconds_per_token > 0 for row in result.lengths)
    visible = tables.tasks(result.rows, tables.TIMED)
    assert [len(table.rows) for table in visible] == [len(result.rows) // len(tasks)] * len(tasks)
    assert len(tables.all_tasks("all", result.rows, tables.TIMED).rows) == len(result.rows)
    peers = [
        ("equinox", "Equinox scan"),
        ("keras-torch", "Keras on torch"),
        ("keras-jax", "Keras on jax"),
        ("onnxruntime", "ONNX Runtime"),
        ("openvino", "OpenVINO"),
        ("openvino", "OpenVINO float32"),
    ]
    inferring = {"torch_impl.gru", "torch_impl.GRU", "jax_impl.gru", BUILT_IN, "nn.GRU compiled"}
    inferring |= {"flax.linen RNN", "flax.nnx RNN"}
    if kernels.bfloat16():
        inferring |= {"torch_impl.gru bfloat16", "jax_impl.gru bfloat16"}
    inferring |= {name for process, name in peers if process in processes}
    for B, T, latencies in ((3, 5, result.inference), (1, 1, result.calls)):
        assert {row.contender for row in latencies} == inferring
        for row in latencies:
            assert 0 < row.p50 <= row.p99
            assert row.tokens_per_second == pytest.approx(B * T / row.p50)
            assert row.ratio == 1 or row.contender != BUILT_IN


def test_rows_follow_from_the_seconds() -> None:
    task = Task(4, 30, 16)
    words = batch_of(4, 30).words
    rows = speed._rows(task, {speed.REFERENCE: [4.0, 2.0, 3.0], "ours": [1.0, 1.0, 9.0]}, 1e9)
    ours = next(row for row in rows if row.contender == "ours")
    assert ours.tokens_per_second == words
    assert ours.ratio == 3
    assert ours.quartiles == (pytest.approx(words / 5), words)


def test_latencies_follow_from_the_seconds() -> None:
    seconds = {BUILT_IN: [4.0, 2.0, 3.0], "ours": [1.0] * 99 + [2.0, 9.0]}
    ours = next(r for r in speed._latencies(Task(4, 30, 16), seconds) if r.contender == "ours")
    assert (ours.p50, ours.p99, ours.tokens_per_second, ours.ratio) == (1, 2, 120, 3)
    assert ours.ratios == (1.5, 3)


def test_a_wrong_last_state_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def gru(weights: dict, x: np.ndarray, *, reset_after: bool) -> partial:
        lengths = np.full(x.shape[1], len(x))
        run = partial(oracle.forward, weights, x, lengths, reset_after=reset_after)
        return partial(lambda: run().h_last)

    kinds = {"right": partial(gru, reset_after=True), "wrong": partial(gru, reset_after=False)}
    monkeypatch.setattr(contenders, "here", [Contenders({}, kinds)])
    task = Task(2, 5, 128, backward=False)
    assert len(contenders.seconds("right", task, True)) >= 20
    with pytest.raises(ArithmeticError, match=r"wrong, B 2, T 5, H 128 .* off by"):
        contenders.seconds("wrong", task, True)
    monkeypatch.setattr(contenders, "here", [Contenders({}, kinds, tolerances={"wrong": 1})])
    assert contenders.ready("wrong", task, True)


def test_contender_that_cannot_be_compiled_is_reported_and_omitted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compiled(*_: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("no compiler\nfor a long story")

    kinds = {BUILT_IN: nn_module, "compiled": partial(nn_module, compiled=True)}
    here = [Contenders({}, kinds, torch.inference_mode)]
    monkeypatch.setattr(contenders, "here", here)
    monkeypatch.setattr(torch, "compile", lambda module: torch.nn.Identity())
    monkeypatch.setattr(torch.nn.Identity, "forward", compiled)
    lines: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        assert speed._available(dict.fromkeys(kinds, pool), lines.append) == [BUILT_IN]
    assert lines == ["compiled is left out: no compiler"]


def test_a_new_peer_is_a_new_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer whose package is not installed is left out."""
    files = [ModuleInfo(FileFinder("."), name, False) for name in ("colorsys", "not_installed")]
    peer = SimpleNamespace(implementations=lambda: ["a GRU"])
    with monkeypatch.context() as patch:
        patch.setattr(pkgutil, "iter_modules", lambda path: files)
        patch.setitem(sys.modules, "comparison.peers.colorsys", peer)
        reload(peers)
        assert peers.PROCESSES == ("torch", "torch-default", "jax", "colorsys")
        assert parity.implementations()[-1] == "a GRU"
    reload(peers)


def test_operations_of_the_products() -> None:
    # 10 words, 4 distinct, H 2: recurrent 2 * 10 * 6 * 2 = 240, inputs 2 * 4 * 6 * 300 = 14,400.
    forward = speed._flops(Task(1, 10, 2, backward=False), 10, 4)
    both = speed._flops(Task(1, 10, 2, bidirectional=True), 10, 4)
    assert forward == 240 + 14_400
    assert both == 2 * (3 * 240 + 2 * 14_400)


def test_batch_contains_real_reviews_of_about_the_requested_length() -> None:
    batch = batch_of(16, 50)
    assert batch.tokens.shape == (50, 16)
    assert batch.lengths.max() == 50
    assert batch.lengths.min() >= 37
    assert len(batch.distinct) < batch.words
    assert (batch_of(16, 50, shortest=1).lengths == 50).all()
