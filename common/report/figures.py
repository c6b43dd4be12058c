"""The homework's two figures, loss curve and confusion matrix, drawn from numbers alone."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

# Told apart by people who confuse red and green too (Okabe and Ito 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
FEW_CLASSES = 6


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
    few = len(classes) <= FEW_CLASSES
    names = [textwrap.shorten(name, 30, placeholder="…") or name[:30] for name in classes]
    cell = 1.6 if few else 0.6  # inches; of many classes only the shares are shown, as percentages
    size = cell * len(classes) + 0.07 * max(map(len, names)) + 1.5
    figure = Figure(figsize=(size + 0.5, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(title=title, xlabel="predicted class", ylabel="true class")
    upright = any(len(name) > 10 * cell for name in names)
    axes.set_xticks(range(len(classes)), names, rotation=90 if upright else 0)
    axes.set_yticks(range(len(classes)), names)
    for (row, column), share in np.ndenumerate(shares):
        axes.text(
            column,
            row,
            f"{counts[row, column]:,}\n{share:.1%}" if few else f"{100 * share:.0f}",
            ha="center",
            va="center",
            color="white" if share > 0.5 else "black",
        )
    figure.colorbar(image, label="share of the true class" + ("" if few else ", in %"))
    figure.savefig(path, dpi=150)
