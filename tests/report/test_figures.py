"""The figures of a run, with the preset homework as the homework drew them."""

import re
from pathlib import Path
from typing import Any

import pytest

from common.report import figures

RESULTS = {
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


@pytest.mark.parametrize("preset", EXPECTED)
def test_the_preset_homework_draws_the_homeworks_figures(preset: str, tmp_path: Path) -> None:
    figures.of_run(tmp_path, RESULTS, ("negative", "positive"), preset)
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
    draw = figures.loss_curves

    def noted(curves: dict, *rest: Any) -> figures.Figure:
        drawn.append(curves)
        return draw(curves, *rest)

    monkeypatch.setattr(figures, "loss_curves", noted)
    iterations = (200, 400, 440)  # of 440 in an epoch
    epochs = [epoch + i / 440 for epoch in range(2) for i in iterations]
    results = RESULTS | {"loss_epochs": epochs, "losses": [6, 5, 0, 4, 3, 9]}
    for preset in ("homework", "quick"):
        figures.of_run(tmp_path, results, ("negative", "positive"), preset)
    homework, quick = (curves["gru"] for curves in drawn)
    assert homework == (epochs[0:2] + epochs[3:5], [6, 5, 4, 3])
    assert quick == (epochs, [6, 5, 0, 4, 3, 9])


def test_the_preset_homework_draws_a_model_that_the_homework_does_not_have(tmp_path: Path) -> None:
    figures.of_run(tmp_path, RESULTS | {"model": "rnn"}, ("negative", "positive"), "homework")
    assert "Loss (using rnn)" in (tmp_path / "loss.svg").read_text()
