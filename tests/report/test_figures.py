"""The figures of a run, with the preset homework as the homework drew them."""

import re
from pathlib import Path
from typing import Any

import altair as alt
import pytest

from common.report import figures
from common.report.schema import Metrics, Trial, Tuning, convert

RESULTS = {
    **dict.fromkeys(("train_seconds", "tokens_per_second", "peak_memory_bytes"), 1.0),
    **{"implementation": "fused", "cores": 1, "accuracy_interval": [0.85, 0.87], "categories": {}},
    "framework": "torch",
    "model": "gru",
    "data": {"name": "dlstudio"},
    "loss_epochs": [0.5, 1.0, 1.5, 2.0],
    "losses": [0.7, 0.6, 0.5, 0.4],
    "confusion": [[1502, 150], [345, 1566]],  # the homework's own
    "accuracy": 0.8611,
}
# Of 1,502 and 345: the shares of the true class, and of the predicted one.
EXPECTED = {
    "quick": ("Training loss: torch gru on dlstudio", {"90.9%", "18.1%"}, "true"),
    "homework": ("Loss (using MyGRU)", {"81.3%", "18.7%"}, "predicted"),
}


def draw(folder: Path, preset: str, **changes: Any) -> None:
    run = convert(RESULTS | changes, Metrics, folder)
    figures.draw_run(folder, run, ("negative", "positive"), preset)


@pytest.mark.parametrize("preset", EXPECTED)
def test_the_preset_homework_draws_the_homeworks_figures(preset: str, tmp_path: Path) -> None:
    draw(tmp_path, preset)
    title, shares, of = EXPECTED[preset]
    loss, confusion = (
        set(re.findall(r">([^<>]+)</", (tmp_path / f"{name}.svg").read_text()))
        for name in ("loss", "confusion")
    )
    assert {title, "epochs"} <= loss
    assert {"1,502", "345", f"share of the {of} class"} | shares <= confusion
    assert any("86.11% correct" in text for text in confusion) == (preset == "quick")
    assert (tmp_path / "loss.png").stat().st_size > 0


def test_the_homeworks_loss_figure_has_whole_intervals_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    loss_curves = figures.loss_curves

    def noted(curves: dict, *rest: Any) -> figures.Figure:
        drawn.append(curves)
        return loss_curves(curves, *rest)

    monkeypatch.setattr(figures, "loss_curves", noted)
    iterations = (200, 400, 440)  # of 440 in an epoch
    epochs = [epoch + i / 440 for epoch in range(2) for i in iterations]
    for preset in ("homework", "quick"):
        draw(tmp_path, preset, loss_epochs=epochs, losses=[6, 5, 0, 4, 3, 9])
    homework, quick = (curves["gru"] for curves in drawn)
    assert homework == (epochs[0:2] + epochs[3:5], [6, 5, 4, 3])
    assert quick == (epochs, [6, 5, 0, 4, 3, 9])


def test_the_preset_homework_draws_a_model_that_the_homework_does_not_have(tmp_path: Path) -> None:
    draw(tmp_path, "homework", model="rnn")
    assert "Loss (using rnn)" in (tmp_path / "loss.svg").read_text()


@pytest.mark.parametrize(
    ("losses", "highest"),
    [([0.4, 0.5, 0.6, 9.0, 8.0], 1.2), ([0.4, 0.4, 0.6], 0.6), ([0.4, 0.5, 0.6], 0.6)],
)
def test_far_higher_losses_of_trials_are_at_the_upper_edge(
    losses: list[float], highest: float
) -> None:
    """The axis also has an extent if the median is the lowest loss; a failed trial has a mark."""
    trials = [Trial(i, "failed", {}, [loss], 1.0) for i, loss in enumerate(losses)]
    chart = figures._loss_points(Tuning("study", "", trials), alt.X("number:Q")).to_dict()
    lowest, upper = chart["encoding"]["y"]["scale"]["domain"]
    assert upper == pytest.approx(highest)
    assert lowest == pytest.approx(0.4 - 0.05 * (highest - 0.4))
    assert chart["encoding"]["shape"]["scale"] == {"domain": ["failed"], "range": ["cross"]}


@pytest.mark.parametrize(
    ("last", "change"),
    [
        (0.25, "shrinks 8-fold"),
        (2e-9, "shrinks 10^9-fold"),
        (4, "grows 2-fold"),
        (0, "shrinks to nothing"),
    ],
)
def test_change_of_a_gradient_in_words(last: float, change: str) -> None:
    assert figures._fold(2, last) == change
