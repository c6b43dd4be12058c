"""The new cell of docs/extending.md, added to a copy of the program, in both frameworks."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import jax_impl.learner
import torch_impl.learner
from common import cells, oracle, params
from common.training import loop, options
from tests import ROOT

FOLDERS = ("common", "torch_impl", "jax_impl", "comparison")
LEARNERS = {"torch_impl": torch_impl.learner, "jax_impl": jax_impl.learner}
LABELS = {"good": "pos", "fine": "pos", "bad": "neg", "dull": "neg"}
# Trains, explains and exports with both frameworks, and compares every tensor with the oracle.
PROGRAM = """
import contextlib, io, sys
from pathlib import Path
import jax, numpy as np, torch
from flax import nnx
import jax_impl.export, jax_impl.learner, jax_impl.mgu, torch_impl.export, torch_impl.learner
import torch_impl.mgu
from common import oracle
from common.inference import export, explanation, prediction
from common.training import loop, run_directory
from comparison import parity

def call(main, *arguments):
    sys.argv = ["command", *arguments]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as stop:
            assert not stop.code, said.getvalue()
    return said.getvalue()

own = {"torch": (torch_impl.learner, torch_impl.export), "jax": (jax_impl.learner, jax_impl.export)}
options = "--data csv:table.csv --vectors random:4 --hidden-size 3 --epochs 1 --device cpu".split()
options += ["--train-size", "None", "--test-size", "None"]
options += ["--warmup", "0", "--schedule", "constant"]  # allow more epochs later
run_directory.draw = lambda *_: True  # takes longer than the training
for name, (learner, exported) in own.items():
    start = ["--model", "bimgu", *options, "--out", "run"]  # JAX continues PyTorch's run
    resume = ["--resume", "run", "--epochs", "2"]
    call(lambda: loop.main(learner), *(start if name == "torch" else resume))
    run = run_directory.load_run(Path("run"))
    assert run.parameters["mgu.0.backward.weight_hh"].shape == (2 * 3, 3)
    gain = run.parameters["mgu.0.forward.gain"]
    assert gain.shape == (3,) and np.any(gain != 1) and np.allclose(gain, 1, atol=0.1)
    assert "a good film" in call(lambda: prediction.main(learner), "run", "a good film")
    told = call(lambda: explanation.main(learner), "run", "a good film", "--by", "f")
    assert "tinted by f" in told
    kind = {"torch": "torch", "jax": "stablehlo"}[name]
    told = call(
        lambda: export.main(learner, kind, exported.save, exported.load),
        "run", "--to", kind, "--out", f"{name}.exported",
    )
    assert "checked" in told
    sys.argv = ["command", "run", "--to", "onnx", "--out", "model.onnx"]
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.suppress(SystemExit):
        export.main(learner, kind, exported.save, exported.load)
    assert "no operator of ONNX computes the cell mgu" in said.getvalue()

cases = [draws for draws in parity.cases() if draws[0].cell == "mgu"][1:2]
able = [each for each in parity.implementations() if each.cell == "mgu"]
assert [each.name for each in able] == ["torch mgu", "jax mgu"] and len(cases) == 1
rows = [row for each in able for case in cases for row in parity.check(each, case, "float64")]
assert {"d mgu.0.forward.gain", "outputs"} <= {row.check for row in rows}
assert [row for row in rows if not row.passed] == []

x = np.random.default_rng(0).standard_normal((5, 2, 4)).astype(np.float32)
ours = torch_impl.Recurrent(torch_impl.mgu.CELL, 4, 3, bidirectional=True)
theirs = jax_impl.Recurrent(jax_impl.mgu.CELL, 4, 3, bidirectional=True, rngs=nnx.Rngs(0))
assert repr(ours) == "Recurrent(mgu, 4, 3, 1, bidirectional=True)"
assert (ours.mgu_0_forward_gain == 1).all() and (theirs.mgu_0_forward_gain[...] == 1).all()
for found, values in (
    (ours(torch.from_numpy(x), lengths=[5, 2]), ours.canonical()),
    (theirs(x.swapaxes(0, 1), [5, 2]), theirs.canonical()),
):
    values = {n: v.detach().numpy() if hasattr(v, "detach") else v for n, v in values.items()}
    run = oracle.forward(values, x, np.array([5, 2]), reset_after=False)
    outputs = found[0].detach().numpy() if hasattr(found[0], "detach") else found[0].swapaxes(0, 1)
    assert np.allclose(outputs, run.outputs, atol=1e-6)
"""


def test_a_cell_that_is_added_as_the_page_says(tmp_path: Path) -> None:
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder)
    page = (ROOT / "docs" / "extending.md").read_text()
    steps = re.findall(r"`(\S+\.py)`:\n\n```python\n(.*?)```", page, re.DOTALL)
    assert len(steps) == 4
    for name, block in steps:
        with (tmp_path / name).open("a") as file:
            file.write(f"\n\n{block}")
    rows = [f"a {word} film and {n},{label}" for n in "abcdef" for word, label in LABELS.items()]
    (tmp_path / "table.csv").write_text("\n".join(["text,label", *rows]))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("twin", LEARNERS)
def test_a_cell_that_one_twin_lacks_gets_one_clear_line(
    twin: str, command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = LEARNERS[twin]
    monkeypatch.setitem(params.CELLS, "absent", params.CellSpec("absent", blocks=2))
    monkeypatch.setitem(options.MODELS, learner.FRAMEWORK, ("gru", "absent"))
    monkeypatch.setattr(learner, "CELLS", cells.Cells(twin))
    line = f"error: cell absent: {twin} has no file {twin}/absent.py for it\n"
    assert command(partial(loop.main, learner), "--model", "absent") == (2, "", line)


def test_every_cell_has_an_oracle_but_for_those_of_larger_states() -> None:
    """Without one, `compare.py parity` passes over a cell."""
    assert {*oracle.CELLS} == {name for name, spec in params.CELLS.items() if spec.states == 1}


class Tagger(torch.nn.Module):
    def __init__(self, reset_after: bool) -> None:
        super().__init__()
        self.gru = torch_impl.GRU(5, 7, reset_after=reset_after)
        self.head = torch.nn.Linear(7, 2)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs, h_n = self.gru(x, lengths=lengths)
        return self.head(outputs), h_n


@pytest.mark.filterwarnings("ignore")
def test_onnx_export_of_a_model_with_the_gru() -> None:
    """The ONNX model accepts any batch and time; only torch.export records the kernel."""
    pytest.importorskip("onnxscript")
    model = Tagger(reset_after=True).eval()
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
    example = torch.randn(4, 2, 5), torch.tensor([4, 2])
    arguments = {"dynamic_shapes": ({0: time, 1: batch}, {0: batch})}
    program = torch.onnx.export(model, example, dynamo=True, verbose=False, **arguments)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [each.name for each in session.get_inputs()]
    for steps, rows in ((4, 2), (9, 3), (1, 1)):
        x, lengths = torch.randn(steps, rows, 5), torch.randint(0, steps + 1, (rows,))
        result = session.run(None, dict(zip(names, (x.numpy(), lengths.numpy()), strict=True)))
        for ours, theirs in zip(result, model(x, lengths), strict=True):
            np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=1e-6)
    if "fused" in torch_impl.gru.CELL.implementations():
        graph = torch.export.export(model, example).graph
        assert any("gru.forward" in str(node.target) for node in graph.nodes)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_onnx_export_of_a_layer() -> None:
    pytest.importorskip("onnxscript")
    layer = torch_impl.GRU(5, 7, 2, bidirectional=True, batch_first=True, reset_after=False).eval()
    x = torch.randn(3, 4, 5)
    program = torch.onnx.export(layer, (x,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    result = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for ours, theirs in zip(result, layer(x), strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=1e-6)
