"""Dropout masks, the same for both frameworks.

Philox (Salmon et al. 2011) is a counter-based generator: its random numbers are a function of a key
and a counter. These are derived from seed, purpose, share and step, so that a resumed run drops the
same elements, in either framework. Rates are rounded to multiples of 1/256, because one random byte
per element is drawn fast.
"""

import math

import numpy as np
from jaxtyping import Bool

from common.data.batches import Batch
from common.params import ModelConfig
from common.training.options import TrainConfig

_LEVELS = 256
# The purposes. Each keeps its number, so that a resumed run drops the same elements as before.
WORDS, ELEMENTS, FEATURES = 0, 1, 3


def masks(
    model: ModelConfig, options: TrainConfig, batch: Batch, step: int
) -> dict[str, np.ndarray]:
    """The masks of a step by name; a rate of zero has no mask.

    A step multiplies by the masks. Each share of a batch has masks of its own.

    elements [K, D], uint8, 0 or 1: the elements of the vectors of the distinct words.
    words [K, 1], float32: 0 for a dropped word, otherwise the scale that preserves the mean of its
        vector, whose elements are dropped, too. Scaling here costs less than scaling the elements.
    features [B, F], float32: the inputs of the last linear layer.
    """
    K, B = len(batch.distinct), len(batch.lengths)
    counter = [0, 0, batch.share, step]

    def kept(
        rate: float, purpose: int, *shape: int, rows: int | None = None
    ) -> Bool[np.ndarray, "..."]:
        """A random mask. rows: the number of rows that are drawn; the others are all False."""
        generator = np.random.Philox(key=[options.seed, purpose], counter=counter)
        count = math.prod(shape if rows is None else (rows, *shape[1:]))
        drawn = generator.random_raw(-(-count // 8)).astype("<u8", copy=False).view(np.uint8)
        mask = np.zeros(math.prod(shape), bool)  # filled in place: a copy takes as long as Philox
        np.greater_equal(drawn[:count], _dropped(rate), out=mask[:count])
        return mask.reshape(shape)

    result: dict[str, np.ndarray] = {}
    if rate := options.vector_dropout:
        elements = kept(rate, ELEMENTS, K, model.input_size, rows=batch.num_distinct)
        result["elements"] = elements.view(np.uint8)
        result["words"] = np.full((K, 1), _scale(rate))
    if rate := options.word_dropout:
        words = kept(rate, WORDS, K, 1) * _scale(rate)
        result["words"] = words * result.get("words", np.float32(1))
    if rate := options.feature_dropout:
        result["features"] = kept(rate, FEATURES, B, model.features) * _scale(rate)
    return result


def _dropped(rate: float) -> int:
    """The number of the _LEVELS of a byte that are dropped."""
    return min(round(rate * _LEVELS), _LEVELS - 1)


def _scale(rate: float) -> np.float32:
    """The scale that preserves the mean."""
    return np.float32(_LEVELS / (_LEVELS - _dropped(rate)))
