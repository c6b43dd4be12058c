"""The classifier in JAX/Flax: word vectors, recurrent layers, last states, ReLU, linear, logits.

Its twin is torch_impl/classifier.py: the same names in the same order.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jaxtyping import DTypeLike, Float, Int

from common.arguments import check_classify, check_mapping
from common.params import NO_LABEL, ModelConfig
from jax_impl import gru, rnn
from jax_impl.layers import as_array, canonical, in_range, register, run

CELLS = {cell.name: cell for cell in (gru.CELL, rnn.CELL)}


def head(parameters: Mapping[str, Array], h_last: Float[Array, "R B S*H"]) -> Float[Array, "B C"]:
    """Logits from the last output of each direction: ReLU, then one linear layer."""
    size = parameters["head.weight"].shape[1] // len(h_last)
    features = jax.nn.relu(jnp.concatenate(list(h_last[..., :size]), axis=-1))
    return features @ parameters["head.weight"].T + parameters["head.bias"]


def classify(
    parameters: Mapping[str, Array],
    vectors: Float[Array, "V D"],
    distinct: Int[Array, " K"],
    tokens: Int[Array, "T B"],
    lengths: Int[Array, " B"],
    *,
    reset_after: bool = False,
    implementation: str = "auto",
    bfloat16: bool = False,
) -> Float[Array, "B C"]:
    """The logits of a batch (see common/data/batches.py) as a pure function of the parameters.

    vectors are the frozen word vectors; where parameters have vectors.weight, those are read.
    bfloat16: see `gru`; the head is float32.

    Raises as `gru` does, and ValueError for what in distinct is not in 0..V-1; under jax.jit, the
    rows of the batch that read it have NaN.
    """
    check_mapping(parameters)
    parameters = {name: as_array(name, value) for name, value in parameters.items()}
    vectors = as_array("vectors", parameters.get("vectors.weight", vectors))
    distinct, tokens, lengths = (
        as_array(name, array, np.asarray)
        for name, array in (("distinct", distinct), ("tokens", tokens), ("lengths", lengths))
    )
    cell, directions = check_classify(parameters, vectors, distinct, tokens)
    distinct, wrong = in_range(
        "distinct", distinct, len(vectors) - 1, "V - 1, there being V vectors"
    )
    embedded = vectors[distinct]
    if wrong is not None:
        embedded = jnp.where(wrong[:, None], jnp.nan, embedded)
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


def cross_entropy(logits: Float[Array, "B C"], labels: Int[Array, " B"]) -> Float[Array, ""]:
    """The mean over the rows that are reviews."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return losses.mean(where=labels != NO_LABEL)


class Classifier(nnx.Module):
    """`classify` with its parameters and its word vectors."""

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
        self, distinct: Int[Array, " K"], tokens: Int[Array, "T B"], lengths: Int[Array, " B"]
    ) -> Float[Array, "B C"]:
        """The logits of a batch."""
        return classify(
            canonical(self, self.names),
            self.vectors[...],
            distinct,
            tokens,
            lengths,
            reset_after=self.config.reset_after,
            implementation=self.config.implementation,
            bfloat16=self.config.dtype == "bfloat16",
        )
