"""The learning rate of each step and the weights of the classes.

torch.optim.lr_scheduler and optax.schedules also have these schedules, but with a state, and in
different precisions. Here, the learning rate is a function of the step, so that both frameworks
take the same steps and either continues a run of the other. tests/training/test_recipes.py compares
it with the schedules of both frameworks.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from common.errors import InputError
from common.params import NO_LABEL
from common.training.options import TrainConfig


@dataclass(frozen=True)
class Recipe:
    """The quantities that options and data set determine together."""

    steps: int = 0
    """The number of steps of all epochs."""
    class_weights: tuple[float, ...] | None = None


PLAIN = Recipe()


def recipe_of(
    options: TrainConfig, steps: int, labels: Int[np.ndarray, " N"], classes: int
) -> Recipe:
    """The recipe of a training.

    labels: those of the training reviews. Raises InputError unless there is one weight per class.
    """
    match options.class_weights:
        case "none":
            weights = None
        case "balanced":  # as in scikit-learn
            counts = np.bincount(labels, minlength=classes)
            weights = tuple((len(labels) / (classes * np.maximum(counts, 1))).tolist())
        case text:
            weights = tuple(map(float, text.split(",")))
            if len(weights) != classes:
                raise InputError(
                    f"--class-weights {text}: {len(weights)} numbers for {classes} classes"
                )
    return Recipe(steps, weights)


def weight_of(labels: Int[np.ndarray, " B"], recipe: Recipe) -> float:
    """The total weight of reviews in the mean of the loss; rows with NO_LABEL have no weight."""
    labels = labels[labels != NO_LABEL]
    return float(
        np.take(recipe.class_weights, labels).sum() if recipe.class_weights else len(labels)
    )


def learning_rate(options: TrainConfig, recipe: Recipe, step: int) -> float:
    """The size of a step; steps are counted from 0.

    It grows to --learning-rate over the first --warmup of all steps. Then it stays there, or falls
    to zero linearly.
    """
    warm = math.ceil(options.warmup * recipe.steps)
    if step < warm:
        return options.learning_rate * (step + 1) / warm
    if options.schedule == "constant":
        return options.learning_rate
    return options.learning_rate * (1 - min((step - warm) / max(recipe.steps - warm, 1), 1))
