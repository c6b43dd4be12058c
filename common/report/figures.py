"""The homework's two figures, loss curve and confusion matrix, drawn from numbers alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Told apart by people who confuse red and green too (Okabe and Ito 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

# What the homework calls its networks; it has no title of this kind for the last two.
HOMEWORK_NAMES = {
    "gru": "MyGRU",
    "nn.gru": "nn.GRU",
    "bigru": "MyGRU, bidirectional",
    "nn.bigru": "nn.GRU, bidirectional",
}


def of_run(folder: Path, results: Mapping[str, Any], classes: Sequence[str], preset: str) -> None:
    """Draw loss.png and confusion.png of a run, from what metrics.json holds.

    With the preset `seed` they are titled and normalised as the homework's are (docs/homework.md).
    """
    model, homework = results["model"], preset == "seed"
    title = f"{results['framework']} {model} on {results['data']['name']}"
    loss_curves(
        folder / "loss.png",
        {model: (results["loss_epochs"], results["losses"])},
        f"Loss (using {HOMEWORK_NAMES[model]})" if homework else f"Training loss: {title}",
        round(max(results["loss_epochs"])),
    )
    confusion(
        folder / "confusion.png",
        results["confusion"],
        classes,
        "" if homework else f"{title}: {results['accuracy']:.2%} correct",
        of="predicted" if homework else "true",
    )


def loss_curves(
    path: Path,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    epochs: int,
) -> None:
    """Draw training losses. curves: name -> (epochs done at each point, mean loss up to there)."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, (x, y)), colour in zip(curves.items(), COLOURS * len(curves), strict=False):
        # The framework twins lie on top of each other: one is dashed so that both show.
        style = "--" if name.startswith("jax") else "-"
        axes.plot(x, y, style, color=colour, label=name)
    axes.set(title=title, xlabel="epoch", ylabel="mean cross-entropy loss", xlim=(0, epochs))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()
    figure.savefig(path, dpi=150)


def confusion(
    path: Path,
    matrix: Sequence[Sequence[int]],
    classes: Sequence[str],
    title: str,
    *,
    of: Literal["true", "predicted"] = "true",
) -> None:
    """Draw a confusion matrix (row: true class, column: predicted), counts and shares.

    `of` says what a share is of: all reviews of its true class (row), or of its predicted class
    (column), as in the homework's figures.
    """
    counts = np.asarray(matrix)
    shares = counts / np.maximum(counts.sum(axis=1 if of == "true" else 0, keepdims=True), 1)
    figure = Figure(
        figsize=(1.6 * len(classes) + 2.2, 1.4 * len(classes) + 1.6), layout="constrained"
    )
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(title=title, xlabel="Predicted label", ylabel="True label")
    axes.set_xticks(range(len(classes)), classes)
    axes.set_yticks(range(len(classes)), classes)
    for (row, column), share in np.ndenumerate(shares):
        axes.text(
            column,
            row,
            f"{counts[row, column]:,}\n{share:.1%}",
            ha="center",
            va="center",
            color="white" if share > 0.5 else "black",
        )
    figure.colorbar(image, label=f"share of the {of} class")
    figure.savefig(path, dpi=150)
