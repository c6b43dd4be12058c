"""compare.py on little data: its files, and its exit status after a failed check."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compare
import jax_impl.classifier
from common.cells import LayerCall
from common.report import figures
from common.report.schema import Check, Run, Task
from common.training import run_directory
from comparison import checks, gpu, parity, runs
from tests.training.cases import Command, refused, succeeds

QUICKLY = ("--epochs", 1, "--log-every", 2)


@pytest.mark.usefixtures("in_this_process", "drawing")  # .ci/run starts processes
def test_accuracy_trains_models_and_writes_the_report(
    small: list[str], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path.parent)
    out, chosen = tmp_path.name, ("gru", "nn.gru", "linear")
    options = (*small, *QUICKLY, "--models", *chosen, "--out", out)
    output = succeeds(command(compare.main, "accuracy", *options))
    assert "torch gru" in output
    assert output.count("192 of 6,824 reviews to train on") == 1, "said once, not for each model"
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["schema"] == 1
    assert results["data"]["name"] == "rt"
    assert (results["data"]["train"], results["data"]["test"]) == (192, 96)
    assert {"command", "torch", "jax", "cores"} <= results["environment"].keys()
    models = [(run["framework"], run["model"]) for run in results["runs"]]
    there = [(f, m) for f, ms in compare.COMPARED.items() for m in ms if m in chosen]
    assert sorted(models) == sorted(there)
    for run in results["runs"]:
        assert np.sum(run["confusion"]) == 96
        implementations = {"nn.gru": "nn.GRU", "linear": "NB-SVM"}
        assert run["implementation"] == implementations.get(run["model"], "fused")
        assert Path(run["run_dir"], "model.safetensors").is_file()
        assert 1 <= run["cores"] <= results["environment"]["cores"]
        assert run["train_seconds"] > 0 and run["peak_memory_bytes"] > 0
        assert bool(run["losses"]) == (run["model"] != "linear")
    checks = {(tuple(row["models"]), row["check"], row["dtype"]) for row in results["parity"]}
    assert len(checks) == len(results["parity"]) == 2 * 3 + 2
    assert all(row["passed"] and row["error"] <= row["bound"] for row in results["parity"])

    report = (tmp_path / "report.md").read_text()
    for figure in re.findall(r"\((figures/.+?)\)", report):
        assert (tmp_path / figure).is_file()
    (tmp_path / "report.md").unlink()
    monkeypatch.setattr(figures.Figure, "save", lambda *_: None)  # which are drawn already
    assert command(compare.main, "report", "--out", out)[0] == 0
    assert (tmp_path / "report.md").read_text() == report


@pytest.mark.long  # .ci/run's first command does the same, and on all that it reads
def test_models_are_checked_against_the_oracle(
    small: list[str], command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "rows.json"
    options = ("--implementation", "scan", "--models", "gru", "--oracle", "--out", out)
    succeeds(command(checks.main, *small, *options))
    rows = json.loads(out.read_text())
    assert all(row["passed"] for row in rows)
    oracle = {(row["models"][0], row["dtype"]) for row in rows if row["models"][1] == "oracle"}
    twins, dtypes = ("torch scan", "jax scan"), ("float32", "float64")
    expected = {(name, dtype) for name in (*twins, "torch nn.GRU") for dtype in dtypes}
    assert oracle == expected | {(name, "bfloat16") for name in twins}
    assert ["torch gru", "jax gru"] in [row["models"] for row in rows]


def test_both_kinds_of_reset_are_checked_on_real_reviews(
    small: list[str], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A faster version of the previous test: which cases are compared with the oracle."""
    checked: list[str] = []
    monkeypatch.setattr(parity, "real", "real reviews, reset_after {}".format)
    monkeypatch.setattr(parity, "run", lambda _, problems: checked.extend(problems) or [])
    monkeypatch.setattr(checks, "trained", lambda _: [])
    monkeypatch.setattr(checks, "check_twins", lambda _: [])
    assert command(checks.main, *small, "--oracle", "--out", tmp_path / "rows.json")[0] == 0
    assert checked == [f"real reviews, reset_after {after}" for after in (False, True)]


def test_disagreeing_twins_fail(
    small: list[str], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, out = jax_impl.classifier.run, tmp_path / "rows.json"

    def wrong(cell: Any, parameters: Any, call: LayerCall, *others: Any, **options: Any) -> Any:
        call = call._replace(reset_after=not call.reset_after)
        return right(cell, parameters, call, *others, **options)

    monkeypatch.setattr(jax_impl.classifier, "run", wrong)
    assert command(checks.main, *small, "--models", "gru", "--out", out)[0] == 0
    failed = {row["check"] for row in json.loads(out.read_text()) if not row["passed"]}
    assert {"logits, real batch", "gradients, real batch"} <= failed


def test_a_failed_parity_check_is_exit_status_1(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = Check.of(["torch scan", "oracle"], "outputs, reset after", "float32", 2, 1, 1)
    monkeypatch.setattr(parity, "run", lambda: [failed])
    status, output, _ = command(compare.main, "parity", "--out", tmp_path)
    assert status == 1
    assert "parity check failed" in output
    assert "0 of 1 parity checks passed" in output


def test_the_rounding_of_a_peer_is_reported_and_is_no_failure(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, quantity = ["flax.linen.GRUCell", "oracle"], "d params, reset after"
    rounded = Check.of(models, quantity, "float32", 1.02, 1, 1, peer=True)
    monkeypatch.setattr(parity, "run", lambda: [rounded])
    status, output, _ = command(compare.main, "parity", "--out", tmp_path)
    assert status == 0
    assert "1 of 1 parity checks passed" in output
    assert f"by at most a factor of 1.02 ({models[0]}, {quantity}, float32)" in output
    again = command(compare.main, "report", "--out", tmp_path)  # the file says that it is a peer
    assert again[0] == 0
    assert "above the bound, not ours" in (tmp_path / "report.md").read_text()


def test_disagreeing_losses_fail(tmp_path: Path) -> None:
    for framework, loss in (("torch", 0.50), ("jax", 0.52)):
        (tmp_path / f"{framework}-gru").mkdir()
        line = json.dumps({"epoch": 1, "step_losses": [0.7, loss]})
        (tmp_path / f"{framework}-gru" / "log.jsonl").write_text(line + "\n")
    row = runs.check_losses(tmp_path, "gru")
    assert row.error == pytest.approx(0.02)
    assert not row.passed


@pytest.mark.parametrize(
    ("other", "passed"), [([0.815, 0.845, 0.865], True), ([0.825, 0.85, 0.87], False)]
)
@pytest.mark.parametrize("order", [1, -1])
def test_disagreeing_accuracies_fail(other: list[float], passed: bool, order: int) -> None:
    """Accuracies whose intervals do not overlap fail the check."""
    pair = [
        Run(
            framework=framework,
            model="gru",
            implementation="fused",
            accuracy=middle,
            accuracy_interval=(low, high),
            confusion=[],
            losses=[],
            loss_epochs=[],
            train_seconds=1,
            tokens_per_second=1,
            first_step_seconds=1,
            peak_memory_bytes=1,
            categories={},
            cores=1,
        )
        for framework, (low, middle, high) in zip(
            ("torch", "jax"), ([0.78, 0.80, 0.82], other)[::order], strict=True
        )
    ]
    assert runs.check_accuracy(pair, "gru").passed is passed


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--frameworks", "keras"], "keras"),
        (["--models", "gru", "lstm"], "lstm"),
        (["--preset", "quik"], "quik"),
        (["--data", "imbd"], "--data imbd"),
        (["sped"], "sped"),
        (["--frameworks", "jax", "--models", "nn.gru"], "nn.gru"),
        (["report", "--out", "nowhere"], "nowhere"),
        (["--out", "/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_bad_options_get_one_clear_line(arguments: list[str], named: str, command: Command) -> None:
    assert named in refused(command(compare.main, *arguments))


def test_twins_error_treats_nan_as_failure() -> None:
    nan = {"logits": np.array([1.0, np.nan])}
    assert checks.largest_error({"logits": np.array([1.0, 2.0])}, nan, "logits") == np.inf


def test_a_report_that_cannot_be_drawn_costs_one_warning(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The results are written, and the exit status still reports failed checks."""
    requested = []
    monkeypatch.setattr(
        parity, "run", lambda: [Check.of(["a", "oracle"], "x, reset y", "z", 1, 0, 1)]
    )
    monkeypatch.setattr(run_directory, "draw", lambda *arguments: bool(requested.append(arguments)))
    timed_on = {"command": "python compare.py gpu", "gpu": "H100"}
    (tmp_path / "results.json").write_text(json.dumps({"schema": 1, "environment": timed_on}))
    status, output, _ = command(compare.main, "parity", "--out", tmp_path)
    assert (status, requested) == (1, [(tmp_path, ("compare", "report"))])
    assert "0 of 1 parity checks passed" in output
    assert "report:" not in output
    environment = json.loads((tmp_path / "results.json").read_text())["environment"]
    assert environment["gpu"] == "H100", "timings that a part leaves in the file keep their GPU"
    assert environment["command"] != timed_on["command"]


def test_gpu_needs_a_gpu(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "device_name", lambda: None)
    status, _, error = command(compare.main, "gpu", "--out", tmp_path)
    assert (status, error) == (2, "error: gpu: PyTorch or JAX finds no CUDA device here\n")
    assert not (tmp_path / "results.json").exists()


def test_on_a_gpu_denormal_numbers_of_the_cpu_are_not_timed() -> None:
    names = (
        "torch cuda",
        "nn.GRU packed",
        "nn.GRU packed, denormals",
        "torch loop",
        "Equinox scan",
    )
    chosen = {name for name in names if gpu.chosen(name, Task(64, 200, 128))}
    assert chosen == {"torch cuda", "nn.GRU packed", "Equinox scan"}
