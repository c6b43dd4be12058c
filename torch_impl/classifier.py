"""The classifier in PyTorch: word vectors, recurrent layers, last states, ReLU, linear, logits.

Its twin is jax_impl/classifier.py: the same names in the same order.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.arguments import check_classify, check_mapping
from common.params import NO_LABEL, ModelConfig
from torch_impl import gru, rnn
from torch_impl.layers import canonical, check_arrays, in_range, register, run

CELLS = {cell.name: cell for cell in (gru.CELL, rnn.CELL)}


def head(
    parameters: Mapping[str, Tensor], h_last: Float[Tensor, "R B S*H"]
) -> Float[Tensor, "B C"]:
    """Logits from the last output of each direction: ReLU, then one linear layer."""
    size = parameters["head.weight"].shape[1] // len(h_last)
    features = torch.relu(h_last[..., :size].transpose(0, 1).flatten(1))
    return F.linear(features, parameters["head.weight"], parameters["head.bias"])


def classify(
    parameters: Mapping[str, Tensor],
    vectors: Float[Tensor, "V D"],
    distinct: Int[Tensor, " K"],
    tokens: Int[Tensor, "T B"],
    lengths: Int[Tensor, " B"],
    *,
    reset_after: bool = False,
    implementation: str = "auto",
    bfloat16: bool = False,
) -> Float[Tensor, "B C"]:
    """The logits of a batch (see common/data/batches.py) as a pure function of the parameters.

    vectors are the frozen word vectors; where parameters have vectors.weight, those are read.
    bfloat16: see `gru`; the head is float32.

    Raises as `gru` does, and ValueError for what in distinct is not in 0..V-1.
    """
    check_mapping(parameters)
    vectors = parameters.get("vectors.weight", vectors)
    check_arrays({**parameters, "vectors": vectors, "distinct": distinct, "tokens": tokens})
    cell, directions = check_classify(parameters, vectors, distinct, tokens)
    try:
        embedded = F.embedding(distinct, vectors)
    except (IndexError, RuntimeError):  # out of range, or of another integer dtype
        what = "V - 1, there being V vectors"
        embedded = F.embedding(in_range("distinct", distinct, len(vectors) - 1, what), vectors)
    _, h_last = run(
        CELLS[cell],
        parameters,
        embedded,
        lengths,
        tokens=tokens,
        reset_after=reset_after,
        implementation=implementation,
        return_sequences=False,
        bfloat16=bfloat16,
    )
    return head(parameters, h_last[-directions:])


def cross_entropy(logits: Float[Tensor, "B C"], labels: Int[Tensor, " B"]) -> Float[Tensor, ""]:
    """The mean over the rows that are reviews."""
    return F.cross_entropy(logits, labels, ignore_index=NO_LABEL)


class Classifier(nn.Module):
    """`classify` with its parameters and its word vectors."""

    def __init__(
        self,
        config: ModelConfig,
        parameters: Mapping[str, np.ndarray],
        vectors: Float[np.ndarray, "V D"],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        self.names = register(self, parameters, dtype)
        self.vectors: Tensor
        self.register_buffer("vectors", torch.tensor(vectors, dtype=dtype))

    def forward(
        self, distinct: Int[Tensor, " K"], tokens: Int[Tensor, "T B"], lengths: Int[Tensor, " B"]
    ) -> Float[Tensor, "B C"]:
        """The logits of a batch."""
        return classify(
            canonical(self, self.names),
            self.vectors,
            distinct,
            tokens,
            lengths,
            reset_after=self.config.reset_after,
            implementation=self.config.implementation,
            bfloat16=self.config.dtype == "bfloat16",
        )
