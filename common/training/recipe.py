"""What a recipe makes of a step: how large it is, and how much each class counts.

torch.optim.lr_scheduler and optax.schedules have these schedules, too, each with a state of its own
and in another precision. So that both frameworks take the very same steps, and a run goes on in the
other, they are given their sizes: tests/test_recipe.py holds them to both.
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
    """What the options come to on a data set."""

    steps: int = 0
    """How many there are in all epochs."""
    class_weights: tuple[float, ...] | None = None


PLAIN = Recipe()


def recipe_of(
    options: TrainConfig, steps: int, labels: Int[np.ndarray, " N"], classes: int
) -> Recipe:
    """labels: of the training reviews. Raises InputError where weights do not fit the classes."""
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
    """How much these reviews weigh in the mean that is the loss; NO_LABEL: nothing."""
    own = labels[labels != NO_LABEL]
    return float(np.take(recipe.class_weights, own).sum() if recipe.class_weights else len(own))


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
