"""The interface of a twin for prediction: a classifier that is not trained further."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int

from common.data.batches import Inputs
from common.params import ModelConfig


class Predictor(Protocol):
    """Parameters, word vectors and the forward computation, in some framework.

    Arguments and results are NumPy arrays, parameters have canonical names (common/params.py).
    """

    implementation: str
    """The implementation of the GRU: loop, scan, fused, nn.GRU."""

    def __init__(
        self,
        config: ModelConfig,
        parameters: Mapping[str, np.ndarray],
        vectors: Float[np.ndarray, "V D"],
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        """In JAX, float64 requires x64 mode. Raises InputError if the device is not available."""

    def logits(self, inputs: Inputs) -> Float[np.ndarray, "B C"]: ...

    def explain(self, inputs: Inputs, labels: Int[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        """The gates, states and gradients behind the logits: see `explain` in the twins' trace.py.

        labels: the class of each text that the gradients are of.
        """


_Predictor = Predictor  # under another name, as Framework has a Predictor, too


class Framework(Protocol):
    """The module of a twin that has its predictor: torch_impl.predictor or jax_impl.predictor."""

    __name__: str

    @property
    def Predictor(self) -> type[_Predictor]: ...
