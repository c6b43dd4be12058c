"""The classifier in JAX/Flax: word vectors, recurrent layers, pooling, ReLU, linear, logits.

Its twin is torch_impl/classifier.py: the same names in the same order.
"""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jaxtyping import DTypeLike, Float, Int

from common.arguments import check_classify, check_mapping
from common.cells import Cells, LayerCall
from common.params import NO_LABEL, NO_MASKS, ModelConfig, ProductDtype
from jax_impl.layers import as_array, canonical, in_range, register, run, within

Reduction = Literal["mean", "sum"]
CELLS = Cells("jax_impl")


def drop(embedded: Float[Array, "K D"], masks: Mapping[str, Array]) -> Float[Array, "K D"]:
    """Dropout of distinct words and of the elements of their vectors."""
    for name in ("elements", "words"):
        if name in masks:
            embedded = embedded * masks[name]
    return embedded


def beside(
    embedded: Float[Array, "K D"],
    tokens: Int[Array, "T B"],
    ratios: Float[Array, "T B E"] | None,
) -> tuple[Array, Array | None]:
    """x and tokens of the layers, with the ratios appended to the vectors.

    With ratios, the inputs of a word differ at each occurrence, so tokens are None and the product
    is computed for each occurrence.
    """
    if ratios is None:
        return embedded, tokens
    return jnp.concatenate([embedded[tokens], ratios], -1), None


def pool(
    outputs: Float[Array, "T B R*H"],
    h_last: Float[Array, "R B H"],
    lengths: Int[Array, " B"],
    pooling: str,
) -> Float[Array, "B F"]:
    """The input of the head: for each kind of pooling the last output of each direction, or the
    maximum or mean of the outputs over all words. Zeros for a row without words."""
    features = []
    for kind in pooling.split("+"):
        if kind == "last":
            pooled = jnp.concatenate(list(h_last), axis=-1)
        elif kind == "mean":
            pooled = outputs.sum(0) / jnp.maximum(lengths, 1)[:, None].astype(outputs.dtype)
        else:
            words = within(lengths, outputs.shape[0])[..., None]
            most = jnp.where(words, outputs, -jnp.inf).max(0, initial=-jnp.inf)
            pooled = jnp.where(lengths[:, None] > 0, most, 0)
        features.append(pooled)
    return jnp.concatenate(features, axis=-1)


def head(
    parameters: Mapping[str, Array],
    features: Float[Array, "B F"],
    mask: Float[Array, "B F"] | None = None,
    *,
    relu: bool,
) -> Float[Array, "B C"]:
    """The logits: ReLU, if requested, dropout and a linear layer, applied to the result of
    `pool`."""
    features = jax.nn.relu(features) if relu else features
    features = features if mask is None else features * mask
    return features @ parameters["head.weight"].T + parameters["head.bias"]


def classify(
    parameters: Mapping[str, Array],
    vectors: Float[Array, "V D"],
    distinct: Int[Array, " K"],
    tokens: Int[Array, "T B"],
    lengths: Int[Array, " B"],
    masks: Mapping[str, Array] = NO_MASKS,
    ratios: Float[Array, "T B E"] | None = None,
    *,
    reset_after: bool = False,
    pooling: str = "last",
    relu: bool = True,
    implementation: str = "auto",
    product_dtype: ProductDtype = "float32",
) -> Float[Array, "B C"]:
    """The logits of a batch (see common/data/batches.py) as a pure function of the parameters.

    vectors: the frozen word vectors, unless parameters contain vectors.weight. masks: the factors
    of dropout (common/training/dropout.py). ratios: further inputs of the first layer. pooling,
    relu: see ModelConfig in common/params.py. product_dtype: for the recurrent layers; the head
    does not round.

    Raises as `gru` does, and ValueError for indices in distinct outside 0..V-1; under jax.jit, the
    rows of the batch that read them are NaN.
    """
    check_mapping(parameters)
    parameters = {name: as_array(name, value) for name, value in parameters.items()}
    vectors = as_array("vectors", parameters.get("vectors.weight", vectors))
    distinct, tokens, lengths = (
        as_array(name, array, np.asarray)
        for name, array in (("distinct", distinct), ("tokens", tokens), ("lengths", lengths))
    )
    ratios = None if ratios is None else as_array("ratios", ratios)
    masks = jax.tree.map(lambda mask: as_array("masks", mask), dict(masks))
    cell, directions, size = check_classify(parameters, vectors, distinct, tokens, ratios, pooling)
    distinct, wrong = in_range(
        "distinct", distinct, len(vectors) - 1, "V - 1, there being V vectors"
    )
    embedded = vectors[distinct]
    if wrong is not None:
        embedded = jnp.where(wrong[:, None], jnp.nan, embedded)
    embedded = drop(embedded, masks)
    flags = reset_after, pooling != "last", product_dtype
    x, rows = beside(embedded, tokens, ratios)
    call = LayerCall(x, rows, (), lengths, None, None, None, *flags)
    outputs, h_last = run(CELLS[cell], parameters, call, implementation=implementation)
    features = pool(outputs, h_last[-directions:, :, :size], lengths, pooling)
    return head(parameters, features, masks.get("features"), relu=relu)


def cross_entropy(
    logits: Float[Array, "B C"],
    labels: Int[Array, " B"],
    class_weights: Float[Array, " C"] | None = None,
    reduction: Reduction = "mean",
) -> Float[Array, ""]:
    """The mean or sum over the rows that are reviews, weighted by class."""
    own, is_review = jnp.maximum(labels, 0), labels != NO_LABEL
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, own)
    if class_weights is None:
        return getattr(losses, reduction)(where=is_review)
    weights = class_weights[own]
    total = (weights * losses).sum(where=is_review)
    return total if reduction == "sum" else total / weights.sum(where=is_review)


class Classifier(nnx.Module):
    """The module of `classify`: parameters and word vectors."""

    def __init__(
        self,
        config: ModelConfig,
        parameters: Mapping[str, np.ndarray],
        vectors: Float[np.ndarray, "V D"],
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        self.config = config
        self.names = register(self, parameters, dtype)
        self.vectors = nnx.Variable(jnp.array(vectors, dtype))

    def __call__(
        self,
        distinct: Int[Array, " K"],
        tokens: Int[Array, "T B"],
        lengths: Int[Array, " B"],
        masks: Mapping[str, Array] = NO_MASKS,
        ratios: Float[Array, "T B E"] | None = None,
    ) -> Float[Array, "B C"]:
        """The logits of a batch."""
        return classify(
            canonical(self, self.names),
            self.vectors[...],
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
