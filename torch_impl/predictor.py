"""Classifies texts and explains predictions in PyTorch. Its twin is jax_impl/predictor.py.

A predictor consists of parameters, word vectors and the forward computation; training (learner.py)
adds the loss, the gradients and the optimizer.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.data.batches import Inputs
from common.errors import InputError
from common.inference import predictor
from common.params import ModelConfig
from torch_impl.builtin import BuiltinClassifier
from torch_impl.classifier import CELLS, Classifier
from torch_impl.layers import canonical
from torch_impl.trace import explain


def find_device(name: str) -> torch.device:
    """The device named auto, cpu, cuda or mps. Raises InputError if the machine has none."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    if name == "auto":
        name = "cuda" if available["cuda"] else "cpu"
    if not available.get(name):
        raise InputError(f"--device {name}: PyTorch finds no such device on this machine")
    return torch.device(name)


class Predictor(predictor.Predictor):
    """The predictor of common/inference/predictor.py in PyTorch."""

    def __init__(
        self,
        config: ModelConfig,
        parameters: Mapping[str, np.ndarray],
        vectors: Float[np.ndarray, "V D"],
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        self.device = find_device(device)
        cell, kind = CELLS[config.cell], self.device.type
        resolved = cell.resolve(config.implementation, kind, config.dtype, config.hidden_size)
        self.implementation = "nn.GRU" if config.builtin else resolved
        config = dataclasses.replace(config, implementation=resolved)
        make = BuiltinClassifier if config.builtin else Classifier
        self.model = make(config, parameters, vectors, getattr(torch, dtype)).to(self.device)

    def logits(self, inputs: Inputs) -> Float[np.ndarray, "B C"]:
        with torch.no_grad():
            logits = self.model(*self._arrays(inputs), {}, self._ratios(inputs))
            return logits.cpu().numpy()

    def explain(self, inputs: Inputs, labels: Int[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        named = canonical(self.model, self.model.names).items()
        parameters = {name: value.detach() for name, value in named}
        explanation = explain(
            parameters,
            self.model.vectors,
            *self._arrays(inputs),
            torch.from_numpy(labels).to(self.device),
            ratios=self._ratios(inputs),
            config=self.model.config,
        )
        return {name: value.detach().cpu().numpy() for name, value in explanation.items()}

    def _tensor(self, array: np.ndarray) -> Tensor:
        """The array in the dtype of the parameters; an array of bytes keeps its dtype."""
        tensor = torch.from_numpy(array).to(self.device)
        return tensor if array.dtype == np.uint8 else tensor.to(self.model.vectors.dtype)

    def _arrays(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        arrays = inputs.distinct, inputs.tokens, inputs.lengths
        distinct, tokens, lengths = (torch.from_numpy(array).to(self.device) for array in arrays)
        return distinct, tokens, lengths

    def _ratios(self, inputs: Inputs) -> Float[Tensor, "T B E"] | None:
        return None if inputs.ratios is None else self._tensor(inputs.ratios)
