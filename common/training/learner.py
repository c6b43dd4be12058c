"""What a twin gives to the one training loop, and what is asked of it outside of training."""

from collections.abc import Mapping
from typing import Protocol, SupportsFloat

import numpy as np
from jaxtyping import Float, Int

from common.cells import Cell
from common.data.batches import Batch, Batches
from common.errors import NotFiniteError
from common.params import ModelConfig
from common.training.options import TrainConfig


class Learner(Protocol):
    """A classifier, its loss and its optimizer in some framework; arrays come and go as NumPy.

    Parameters, and gradients with respect to them, have their canonical names (common/params.py).
    """

    @property
    def implementation(self) -> str:
        """What computes the GRU: loop, scan, nn.GRU."""

    @property
    def compilations(self) -> int:
        """How often the training step was compiled."""

    @property
    def gradient_norm(self) -> SupportsFloat:
        """Of the last step, over all parameters, before clipping; may still be being computed."""

    def step(self, batch: Batch) -> SupportsFloat:
        """Take one optimizer step; returns the loss, which may still be being computed."""

    def logits(self, batch: Batch) -> Float[np.ndarray, "B C"]: ...

    def gradients(self, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
        """The loss of a batch and its gradient with respect to every parameter."""

    def explain(self, batch: Batch) -> dict[str, np.ndarray]:
        """How the model comes to its answers: see `explain` in the twins' trace.py."""

    def parameters(self) -> dict[str, np.ndarray]: ...

    def optimizer_state(self) -> dict[str, np.ndarray]:
        """Adam's: step [], first_moment.NAME and second_moment.NAME."""

    def load(
        self,
        parameters: Mapping[str, np.ndarray],
        optimizer_state: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Go on from what `parameters` and `optimizer_state` once returned."""


_Learner = Learner  # under another name, as Framework has a Learner, too


class Framework(Protocol):
    """The module of a twin that has its learner, torch_impl.learner or jax_impl.learner."""

    __name__: str
    FRAMEWORK: str
    CELLS: dict[str, Cell]

    def Learner(
        self,
        config: ModelConfig,
        training: TrainConfig,
        vectors: Float[np.ndarray, "V D"],
        parameters: Mapping[str, np.ndarray] | None = None,
        dtype: str = "float32",
    ) -> _Learner:
        """The class; by default its parameters are drawn from the seed."""

    def make_deterministic(self) -> None:
        """Have the framework compute the same numbers each time on a GPU, too."""

    def find_device(self, name: str) -> object:
        """The device of this name. Raises InputError where the machine has none."""


def predict(
    learner: Learner, batches: Batches
) -> tuple[Float[np.ndarray, "N C"], Int[np.ndarray, " N"]]:
    """The logits of all reviews and their labels, in the order of the split."""
    logits: np.ndarray | None = None
    for batch in batches.epoch():
        found, real = learner.logits(batch), batch.reviews >= 0
        if logits is None:
            logits = np.zeros((len(batches.split), found.shape[1]), found.dtype)
        logits[batch.reviews[real]] = found[real]
    assert logits is not None, "a split has at least one review"
    return logits, np.asarray(batches.split.labels)


def validate(learner: Learner, batches: Batches) -> tuple[float, float]:
    """The mean cross-entropy and the accuracy on a split."""
    from scipy.special import log_softmax  # slow to import

    logits, labels = predict(learner, batches)
    losses = -log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels]
    if not np.isfinite(losses).all():
        raise NotFiniteError("the loss on the validation reviews is not finite")
    return float(losses.mean()), float((logits.argmax(axis=1) == labels).mean())
