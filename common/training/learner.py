"""The interface between a twin and the training loop, and prediction over batches."""

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

Arrays = Mapping[str, np.ndarray]  # by the canonical names of parameters
MOMENTS = ("first_moment", "second_moment")  # Adam's


class Learner(Protocol):
    """A classifier, its loss and its optimizer (Adam) in some framework.

    All arrays are those of NumPy; parameters and their gradients have canonical names
    (common/params.py).
    """

    implementation: str
    """The implementation of the GRU: loop, scan, fused, cuda or nn.GRU."""
    compilations: int
    """The number of compilations of the training step."""
    gradient_norm: SupportsFloat
    """The norm of the gradient of the last step over all parameters, before clipping. It may still
    be computed asynchronously."""
    taken: int
    """The number of steps taken."""
    training: TrainConfig
    world: World
    stop_requests: SupportsFloat
    """The number of shares of the last step whose workers had received a request to stop."""

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
        """parameters: by default drawn from the seed. In JAX, float64 requires the x64 mode.

        Each batch is divided into shares (training.shares); this learner computes those of its
        worker in `world`.
        """

    def step(self, *shares: Batch, stop_requested: bool = False) -> SupportsFloat:
        """Take one optimizer step on a batch; returns the loss before the step, which may still be
        computed asynchronously.

        shares: those of this worker. The gradients of all shares are summed in their order, so the
        result does not depend on which worker computes which share. stop_requested: whether this
        worker has received a request to stop.
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
        """Restore the results of `parameters` and `optimizer_state`, of either framework."""
        self._write("parameters", parameters)
        if optimizer_state is not None:
            self.taken = int(optimizer_state["step"])
            for kind in MOMENTS:
                self._write(kind, {name: optimizer_state[f"{kind}.{name}"] for name in parameters})

    def _read(self, kind: str) -> dict[str, np.ndarray]:
        """A copy of the parameters, or of one of MOMENTS."""

    def _write(self, kind: str, values: Arrays) -> None:
        """Write the result of _read back; with a moment, also set Adam's step count to `taken`."""


_Learner = Learner  # another name, because Framework also has an attribute Learner


class Framework(Protocol):
    """The module with the learner of a twin: torch_impl.learner or jax_impl.learner."""

    __name__: str
    FRAMEWORK: str

    @property
    def Learner(self) -> type[_Learner]: ...

    def make_deterministic(self) -> None:
        """Make the results of the framework reproducible on a GPU, too."""

    def join(self) -> AbstractContextManager[World]:
        """Connect this process to the other workers that a launcher has started."""

    def check(self, options: TrainConfig) -> None:
        """Raise InputError if the device or a recurrence for the options is not available."""


class Classifier(Protocol):
    """A learner or a predictor (common/inference/predictor.py)."""

    def logits(self, inputs: Inputs) -> Float[np.ndarray, "B C"]: ...


def predict(
    classifier: Classifier,
    batches: Batches,
    reduce: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda logits, labels: logits,
    world: World = ALONE,
) -> tuple[Float[np.ndarray, "N C"], Int[np.ndarray, " N"]]:
    """The logits of all reviews and their labels, in the order of the split.

    reduce: maps the logits and labels of a batch to rows that are returned in place of the logits,
    which are then never all in memory. The batches are distributed over the workers.
    """
    own_batches = map(batches.batch, batches.plan(0)[world.rank :: world.size])
    own = [(each.reviews, reduce(classifier.logits(each), each.labels)) for each in own_batches]
    results = [result for of_worker in world.gather_values(own) for result in of_worker]
    reviews, logits = map(np.concatenate, zip(*results, strict=True))
    order = np.argsort(reviews)[-len(batches.split) :]  # padding rows have negative numbers
    return logits[order], np.asarray(batches.split.labels)


def validate(learner: Learner, batches: Batches) -> tuple[float, float]:
    """The mean cross-entropy and the accuracy on a split."""
    answers, labels = predict(learner, batches, metrics.answers, learner.world)
    predicted, _, losses = answers.T
    if not np.isfinite(losses).all():
        raise NotFiniteError("the loss on the validation reviews is not finite")
    return float(losses.mean()), float((predicted == labels).mean())
