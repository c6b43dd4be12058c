"""The classifier in PyTorch: word vectors, recurrent layers, pooling, ReLU, linear, logits.

Its twin is jax_impl/classifier.py: the same names in the same order.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.arguments import check_classify, check_mapping
from common.cells import Cells, LayerCall
from common.params import NO_LABEL, NO_MASKS, ModelConfig, ProductDtype
from torch_impl.layers import canonical, check_arrays, in_range, register, run, within

Reduction = Literal["mean", "sum"]
CELLS = Cells("torch_impl")


def drop(embedded: Float[Tensor, "K D"], masks: Mapping[str, Tensor]) -> Float[Tensor, "K D"]:
    """Dropout of distinct words and of the elements of their vectors, in place."""
    for name in ("elements", "words"):
        if name in masks:
            embedded = embedded.mul_(masks[name])
    return embedded


def beside(
    embedded: Float[Tensor, "K D"],
    tokens: Int[Tensor, "T B"],
    ratios: Float[Tensor, "T B E"] | None,
) -> tuple[Tensor, Tensor | None]:
    """x and tokens of the layers, with the ratios appended to the vectors.

    With ratios, the inputs of a word differ at each occurrence, so tokens are None and the product
    is computed for each occurrence.
    """
    if ratios is None:
        return embedded, tokens
    return torch.cat([F.embedding(tokens, embedded), ratios], -1), None


def pool(
    outputs: Float[Tensor, "T B R*H"],
    h_last: Float[Tensor, "R B H"],
    lengths: Int[Tensor, " B"],
    pooling: str,
) -> Float[Tensor, "B F"]:
    """The input of the head: for each kind of pooling the last output of each direction, or the
    maximum or mean of the outputs over all words. Zeros for a row without words."""
    features = []
    for kind in pooling.split("+"):
        if kind == "last":
            pooled = h_last.transpose(0, 1).flatten(1)
        elif kind == "mean":
            pooled = outputs.sum(0) / lengths.clamp(min=1)[:, None]
        else:
            words = within(lengths, outputs.shape[0])[..., None]
            most = torch.where(words, outputs, -torch.inf)
            most = most.amax(0) if outputs.shape[0] else outputs.sum(0)
            pooled = torch.where(lengths[:, None] > 0, most, 0)
        features.append(pooled)
    return torch.cat(features, dim=-1) if len(features) > 1 else features[0]


def head(
    parameters: Mapping[str, Tensor],
    features: Float[Tensor, "B F"],
    mask: Float[Tensor, "B F"] | None = None,
    *,
    relu: bool,
) -> Float[Tensor, "B C"]:
    """The logits: ReLU, if requested, dropout and a linear layer, applied to the result of
    `pool`."""
    features = torch.relu(features) if relu else features
    features = features if mask is None else features * mask
    return F.linear(features, parameters["head.weight"], parameters["head.bias"])


def classify(
    parameters: Mapping[str, Tensor],
    vectors: Float[Tensor, "V D"],
    distinct: Int[Tensor, " K"],
    tokens: Int[Tensor, "T B"],
    lengths: Int[Tensor, " B"],
    masks: Mapping[str, Tensor] = NO_MASKS,
    ratios: Float[Tensor, "T B E"] | None = None,
    *,
    reset_after: bool = False,
    pooling: str = "last",
    relu: bool = True,
    implementation: str = "auto",
    product_dtype: ProductDtype = "float32",
) -> Float[Tensor, "B C"]:
    """The logits of a batch (see common/data/batches.py) as a pure function of the parameters.

    vectors: the frozen word vectors, unless parameters contain vectors.weight. masks: the factors
    of dropout (common/training/dropout.py). ratios: further inputs of the first layer. pooling,
    relu: see ModelConfig in common/params.py. product_dtype: for the recurrent layers; the head
    does not round.

    Raises as `gru` does, and ValueError for indices in distinct outside 0..V-1.
    """
    check_mapping(parameters)
    vectors = parameters.get("vectors.weight", vectors)
    arrays = {"vectors": vectors, "distinct": distinct, "tokens": tokens}
    arrays |= {} if ratios is None else {"ratios": ratios}
    check_arrays({**parameters, **arrays})
    cell, directions, size = check_classify(parameters, vectors, distinct, tokens, ratios, pooling)
    try:
        embedded = F.embedding(distinct, vectors)
    except (IndexError, RuntimeError):  # out of range, or of another integer dtype
        what = "V - 1, there being V vectors"
        embedded = F.embedding(in_range("distinct", distinct, len(vectors) - 1, what), vectors)
    embedded = drop(embedded, masks)
    flags = reset_after, pooling != "last", product_dtype
    x, rows = beside(embedded, tokens, ratios)
    call = LayerCall(x, rows, (), lengths, None, None, None, *flags)
    outputs, h_last = run(CELLS[cell], parameters, call, implementation=implementation)
    features = pool(outputs, h_last[-directions:, :, :size], lengths, pooling)
    return head(parameters, features, masks.get("features"), relu=relu)


def cross_entropy(
    logits: Float[Tensor, "B C"],
    labels: Int[Tensor, " B"],
    class_weights: Float[Tensor, " C"] | None = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""]:
    """The mean or sum over the rows that are reviews, weighted by class."""
    return F.cross_entropy(
        logits, labels, class_weights, ignore_index=NO_LABEL, reduction=reduction
    )


class Classifier(nn.Module):
    """The module of `classify`: parameters and word vectors."""

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
        self,
        distinct: Int[Tensor, " K"],
        tokens: Int[Tensor, "T B"],
        lengths: Int[Tensor, " B"],
        masks: Mapping[str, Tensor] = NO_MASKS,
        ratios: Float[Tensor, "T B E"] | None = None,
    ) -> Float[Tensor, "B C"]:
        """The logits of a batch."""
        return classify(
            canonical(self, self.names),
            self.vectors,
            distinct,
            tokens,
            lengths,
            masks,
            ratios,
            reset_after=self.config.reset_after,
            pooling=self.config.pooling,
            relu=self.config.relu,
            implementation=self.config.implementation,
            product_dtype=self.config.dtype,
        )
