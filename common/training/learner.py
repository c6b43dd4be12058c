"""What a twin gives to the one training loop."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, SupportsFloat

import numpy as np
from jaxtyping import Float, Int

from common import metrics
from common.data.batches import Batch, Batches, Inputs
from common.errors import NotFiniteError
from common.params import ModelConfig
from common.training.options import TrainConfig
from common.training.recipe import PLAIN, Recipe
from common.training.world import ALONE, World

Arrays = Mapping[str, np.ndarray]  # by the names of parameters
MOMENTS = ("first_moment", "second_moment")  # Adam's


class Learner(Protocol):
    """A classifier, its loss and its optimizer (Adam) in some framework.

    Arrays come and go as NumPy; parameters, and gradients with respect to them, by their canonical
    names (common/params.py).
    """

    implementation: str
    """What computes the GRU: loop, scan, fused, nn.GRU."""
    compilations: int
    """How often the training step was compiled."""
    gradient_norm: SupportsFloat
    """Of the last step, over all parameters, before clipping; may still be being computed."""
    taken: int
    """How many steps have been."""
    training: TrainConfig
    world: World
    asked: SupportsFloat
    """How many shares of the last step were computed by workers that were asked to stop."""

    def __init__(
        self,
        config: ModelConfig,
        training: TrainConfig,
        vectors: Float[np.ndarray, "V D"],
        parameters: Arrays | None = None,
        dtype: str = "float32",
        recipe: Recipe = PLAIN,
        world: World = ALONE,
    ) -> None:
        """parameters: by default drawn from the seed. In JAX, float64 needs its x64 mode.

        Of the shares that each batch is cut into (training.shares), this one computes those of its
        worker in `world`.
        """

    def step(self, *shares: Batch, asked: bool = False) -> SupportsFloat:
        """Take one optimizer step on a batch; returns the loss before it, which may still be being
        computed.

        shares: this worker's. The gradients of all are added up in the order of the shares, so the
        result does not hang on who computes which. asked: whether it was asked to stop.
        """

    def logits(self, inputs: Inputs) -> Float[np.ndarray, "B C"]: ...

    def gradients(self, *shares: Batch) -> tuple[float, dict[str, np.ndarray]]:
        """The loss of a batch and its gradient with respect to every parameter, without dropout."""

    def parameters(self) -> dict[str, np.ndarray]:
        """A copy of the parameters."""
        return self._read("parameters")

    def optimizer_state(self) -> dict[str, np.ndarray]:
        """A copy of Adam's state: step [], first_moment.NAME and second_moment.NAME."""
        moments = {f"{kind}.{name}": v for kind in MOMENTS for name, v in self._read(kind).items()}
        return {"step": np.array(self.taken), **moments}

    def load(self, parameters: Arrays, optimizer_state: Arrays | None = None) -> None:
        """Go on from what `parameters` and `optimizer_state` once returned, in either framework."""
        self._write("parameters", parameters)
        if optimizer_state is not None:
            self.taken = int(optimizer_state["step"])
            for kind in MOMENTS:
                self._write(kind, {name: optimizer_state[f"{kind}.{name}"] for name in parameters})

    def _read(self, kind: str) -> dict[str, np.ndarray]:
        """A copy of the parameters, or of one of MOMENTS."""

    def _write(self, kind: str, values: Arrays) -> None:
        """The way back; with a moment, Adam's count becomes that of the steps taken."""


_Learner = Learner  # under another name, as Framework has a Learner, too


class Framework(Protocol):
    """The module of a twin that has its learner, torch_impl.learner or jax_impl.learner."""

    __name__: str
    FRAMEWORK: str

    @property
    def Learner(self) -> type[_Learner]: ...

    def make_deterministic(self) -> None:
        """Have the framework compute the same numbers each time on a GPU, too."""

    def join(self) -> AbstractContextManager[World]:
        """Among the other workers, which a launcher has started."""

    def check(self, options: TrainConfig) -> None:
        """Raise InputError where the device, or a recurrence that fits the options, is missing."""


class Classifier(Protocol):
    """A learner, or a predictor (common/inference/predictor.py)."""

    def logits(self, inputs: Inputs) -> Float[np.ndarray, "B C"]: ...


def predict(
    classifier: Classifier,
    batches: Batches,
    reduce: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda logits, labels: logits,
    world: World = ALONE,
) -> tuple[Float[np.ndarray, "N C"], Int[np.ndarray, " N"]]:
    """The logits of all reviews and their labels, in the order of the split.

    reduce: maps the logits and labels of each batch to rows that are returned in place of the
    logits, so that these are never all in memory. The workers take turns with the batches.
    """
    turns = map(batches.batch, batches.plan(0)[world.rank :: world.size])
    mine = [(each.reviews, reduce(classifier.logits(each), each.labels)) for each in turns]
    found = [each for theirs in world.everyones(mine) for each in theirs]
    reviews, logits = map(np.concatenate, zip(*found, strict=True))
    order = np.argsort(reviews)[-len(batches.split) :]  # rows that are no review come first
    return logits[order], np.asarray(batches.split.labels)


def validate(learner: Learner, batches: Batches) -> tuple[float, float]:
    """The mean cross-entropy and the accuracy on a split."""
    answers, labels = predict(learner, batches, metrics.answers, learner.world)
    predicted, _, losses = answers.T
    if not np.isfinite(losses).all():
        raise NotFiniteError("the loss on the validation reviews is not finite")
    return float(losses.mean()), float((predicted == labels).mean())
