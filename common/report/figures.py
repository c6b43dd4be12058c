"""The homework's two figures, loss curve and confusion matrix, drawn from numbers alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

# Told apart by people who confuse red and green too (Okabe and Ito 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


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
    axes.set(title=title, xlabel="epochs", ylabel="mean cross-entropy loss", xlim=(0, epochs))
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()
    figure.savefig(path, dpi=150)


def confusion(
    path: Path, matrix: Sequence[Sequence[int]], classes: Sequence[str], title: str
) -> None:
    """Draw a confusion matrix (row: true class, column: predicted), counts and share of row."""
    counts = np.asarray(matrix)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(
        figsize=(1.6 * len(classes) + 2.2, 1.4 * len(classes) + 1.6), layout="constrained"
    )
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(title=title, xlabel="predicted class", ylabel="true class")
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
    figure.colorbar(image, label="share of the true class")
    figure.savefig(path, dpi=150)
