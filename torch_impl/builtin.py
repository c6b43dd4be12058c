"""The baselines nn.gru and nn.bigru: PyTorch's own layer. JAX has none, so this has no twin."""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from common import convert
from common.params import GRU_PARAMETERS, NO_MASKS, ModelConfig
from torch_impl.classifier import Classifier, drop, head, pool
from torch_impl.layers import canonical, within

SIDES = ("", "_reverse")  # as in the names of nn.GRU's parameters


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
        D, H, R = config.input_size + config.ratios, config.hidden_size, config.directions
        self.cells = nn.ModuleDict()
        for layer in range(config.num_layers):
            for side in SIDES[:R]:
                self.cells[f"l{layer}{side}"] = nn.GRU(H * R if layer else D, H, dtype=dtype)
        values = convert.to_format("torch", parameters, reset_after=True, ngrams=config.ngrams)
        for name, parameter in self.builtin_names().items():
            parameter.data.copy_(torch.from_numpy(values[name]))

    def forward(
        self,
        distinct: Int[Tensor, " K"],
        tokens: Int[Tensor, "T B"],
        lengths: Int[Tensor, " B"],
        masks: Mapping[str, Tensor] = NO_MASKS,
        ratios: Float[Tensor, "T B E"] | None = None,
    ) -> Float[Tensor, "B C"]:
        parameters = canonical(self, self.names)
        x = F.embedding(distinct, parameters.get("vectors.weight", self.vectors))
        x = drop(x, masks)
        (T, B), R = tokens.shape, self.config.directions
        steps, rows = torch.arange(T, device=x.device)[:, None], torch.arange(B, device=x.device)
        turned = torch.where(within(lengths, T), lengths - 1 - steps, 0), rows

        def both(outputs: list[Tensor]) -> Tensor:
            """What one nn.GRU would return."""
            return torch.cat([outputs[0], *(out[turned] for out in outputs[1:])], dim=-1)

        x = x[tokens] if ratios is None else torch.cat([x[tokens], ratios], -1)
        inputs = [x, x[turned]][:R]  # of each direction
        outputs: list[Tensor] = []
        for layer in range(self.config.num_layers):
            if outputs:
                x = both(outputs)
                inputs = [x, x[turned]] if R == 2 else [x]
            cells = [self.cells[f"l{layer}{side}"] for side in SIDES[:R]]
            outputs = [cell(x)[0] for cell, x in zip(cells, inputs, strict=True)]
        last = (lengths - 1).clamp(min=0), rows
        h_last = [torch.where((lengths > 0)[:, None], out[last], 0) for out in outputs]
        if (pooling := self.config.pooling) != "last":  # which reads no more than that
            x = torch.where(within(lengths, T)[..., None], both(outputs), 0)
        features = pool(x, torch.stack(h_last), lengths, pooling)
        return head(parameters, features, masks.get("features"), relu=self.config.relu)

    def builtin_names(self) -> dict[str, nn.Parameter]:
        """The GRU's parameters under the names that one nn.GRU of this size would give them."""
        return {
            f"gru.{name}_{place}": getattr(cell, f"{name}_l0")
            for place, cell in self.cells.items()
            for name in GRU_PARAMETERS
        }
