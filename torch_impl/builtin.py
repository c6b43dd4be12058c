"""The baselines nn.gru and nn.bigru: PyTorch's own layer. JAX has none, so this has no twin."""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.params import GRU_PARAMETERS, ModelConfig
from torch_impl.classifier import Classifier, head
from torch_impl.layers import canonical, within


class BuiltinClassifier(Classifier):
    """The classifier with torch.nn.GRU in it: what nn.GRU computes on packed sequences.

    It runs on padded ones, since packing makes it slower (pytorch issue 149194). So that the
    backward direction still starts at each review's own last word, each direction is an nn.GRU of
    its own, and the backward one reads the reviews turned round within their lengths.
    """

    def __init__(
        self,
        config: ModelConfig,
        parameters: Mapping[str, np.ndarray],
        vectors: Float[np.ndarray, "V D"],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        others = {name: value for name, value in parameters.items() if name[:4] != "gru."}
        super().__init__(config, others, vectors, dtype)
        H, R = config.hidden_size, config.directions
        sizes = [config.input_size if layer == 0 else H * R for layer in range(config.num_layers)]
        self.cells = nn.ModuleList(nn.GRU(size, H, dtype=dtype) for size in sizes for _ in range(R))

    def forward(
        self, distinct: Int[Tensor, " K"], tokens: Int[Tensor, "T B"], lengths: Int[Tensor, " B"]
    ) -> Float[Tensor, "B C"]:
        """The logits of a batch."""
        parameters = canonical(self, self.names)
        x = F.embedding(distinct, parameters.get("vectors.weight", self.vectors))
        (T, B), L, R = tokens.shape, self.config.num_layers, self.config.directions
        steps, rows = torch.arange(T, device=x.device)[:, None], torch.arange(B, device=x.device)
        turned = torch.where(within(lengths, T), lengths - 1 - steps, 0), rows
        last = (lengths - 1).clamp(min=0), rows
        inputs = [x[read] for read in (tokens, tokens[turned])[:R]]  # of each direction
        for layer in range(L):
            cells = self.cells[layer * R : (layer + 1) * R]
            outputs = [cell(x)[0] for cell, x in zip(cells, inputs, strict=True)]
            h_last = [torch.where((lengths > 0)[:, None], out[last], 0) for out in outputs]
            if layer < L - 1:
                outputs[1:] = [out[turned] for out in outputs[1:]]
                x = torch.cat(outputs, dim=-1)
                inputs = [x, x[turned]] if R == 2 else [x]
        return head(parameters, torch.stack(h_last))

    def builtin_names(self) -> dict[str, nn.Parameter]:
        """The GRU's parameters under the names that one nn.GRU of this size would give them."""
        suffixes = [
            f"_l{layer}{direction}"
            for layer in range(self.config.num_layers)
            for direction in ("", "_reverse")[: self.config.directions]
        ]
        return {
            name + suffix: getattr(cell, f"{name}_l0")
            for cell, suffix in zip(self.cells, suffixes, strict=True)
            for name in GRU_PARAMETERS
        }
