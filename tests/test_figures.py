"""The figures of a run, as they are given to matplotlib."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

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
EXPECTED = {
    "quick": ("Training loss: torch gru on dlstudio", ["1,502\n90.9%", "345\n18.1%"]),
    "seed": ("Loss (using MyGRU)", ["1,502\n81.3%", "345\n18.7%"]),
}


@pytest.mark.parametrize("preset", EXPECTED)
def test_the_presets_seed_draws_the_homeworks_figures(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Figure] = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: drawn.update({path.stem: self}))
    figures.of_run(tmp_path, RESULTS, ("negative", "positive"), preset)
    title, column = EXPECTED[preset]
    loss, confusion = drawn["loss"].axes[0], drawn["confusion"].axes[0]
    assert loss.get_title() == title
    assert loss.get_xlabel() == "epoch"
    assert [tick for tick in loss.get_xticks() if 0 <= tick <= 2] == [0, 1, 2]
    texts = {text.get_position(): text.get_text() for text in confusion.texts}
    assert [texts[0, row] for row in (0, 1)] == column  # of those predicted negative
    assert (confusion.get_title() == "") == (preset == "seed")
