"""notebooks/tour.ipynb: every cell runs, and the notebook in the repository has its outputs."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

from tests import ROOT

NOTEBOOK = ROOT / "notebooks/tour.ipynb"
SMALL = ["--train-size", "64", "--test-size", "32", "--epochs", "1", "--vectors", "random:8"]


def code_cells() -> list[dict]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert len(cells) <= 30
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_outputs_are_included_and_contain_no_local_paths():
    cells = code_cells()
    kinds = {kind for cell in cells for out in cell["outputs"] for kind in out.get("data", ())}
    assert kinds >= {"text/html", "image/svg+xml"}
    assert not any(out["output_type"] == "error" for cell in cells for out in cell["outputs"])
    assert not re.search(r"/(home|root|tmp|Users|work)/", NOTEBOOK.read_text(encoding="utf-8"))


def test_every_cell_runs_and_the_frameworks_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("IPython")
    monkeypatch.chdir(NOTEBOOK.parent)  # as Jupyter does
    names: dict = {}
    output = io.StringIO()
    for cell in code_cells():
        source = "".join(cell["source"])
        source = source.replace('Path("runs/tour")', f"Path({str(tmp_path / 'run')!r})")
        source = source.replace('"--restart"]', f'"--restart", *{SMALL}]')
        with contextlib.redirect_stdout(output):
            exec(compile(source, str(NOTEBOOK), "exec"), names)
    assert (tmp_path / "run/model.safetensors").is_file()
    comparisons = r"(?:difference|torch_impl|jax_impl|flax\.nnx): +(\S+)"
    differences = [float(number) for number in re.findall(comparisons, output.getvalue())]
    assert len(differences) == 6 and max(differences) < 1e-5
    gradients = [values.mean(axis=1) for values in names["norms"].values()]
    shares = [values[-1] / values[0] for values in gradients]
    assert (
        shares == sorted(shares) and shares[-1] > 0.1
    )  # the more closed the gate, the more is left
