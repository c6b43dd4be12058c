"""Dropout: what a training step leaves out, the same elements in both frameworks.

Philox (Salmon et al. 2011) is a generator without a state: its numbers are a function of a key and
a counter. Here they are those of (seed, step, share, purpose), so a run that was interrupted drops
what it would have dropped, in whichever framework it goes on. Rates are rounded to a 256th: a byte
an element, and a step takes hardly longer.
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
    """What a step multiplies by, float32 but for the first; nothing where nothing is dropped.

    Each share of a batch drops words and elements of its own.

    elements [K, D], uint8: of the vectors of the batch's distinct words, wherever they stand; 0, 1.
    words [K, 1]: of these vectors, too: 0, or what makes up for all that is dropped of them, which
        costs next to nothing.
    features [B, F]: of what the last linear layer reads.
    """
    K, B = len(batch.distinct), len(batch.lengths)
    counter = [0, 0, batch.share, step]

    def kept(
        rate: float, purpose: int, *shape: int, rows: int | None = None
    ) -> Bool[np.ndarray, "..."]:
        """rows: nothing is kept of those after the first so many."""
        generator = np.random.Philox(key=[options.seed, purpose], counter=counter)
        count = math.prod(shape if rows is None else (rows, *shape[1:]))
        drawn = generator.random_raw(-(-count // 8)).astype("<u8", copy=False).view(np.uint8)
        found = np.zeros(math.prod(shape), bool)  # filled in place: a copy takes as long as Philox
        np.greater_equal(drawn[:count], _dropped(rate), out=found[:count])
        return found.reshape(shape)

    found: dict[str, np.ndarray] = {}
    if rate := options.vector_dropout:
        elements = kept(rate, ELEMENTS, K, model.input_size, rows=batch.named)
        found["elements"] = elements.view(np.uint8)
        found["words"] = np.full((K, 1), _scale(rate))
    if rate := options.word_dropout:
        words = kept(rate, WORDS, K, 1) * _scale(rate)
        found["words"] = words * found.get("words", np.float32(1))
    if rate := options.feature_dropout:
        found["features"] = kept(rate, FEATURES, B, model.features) * _scale(rate)
    return found


def _dropped(rate: float) -> int:
    """Of _LEVELS."""
    return min(round(rate * _LEVELS), _LEVELS - 1)


def _scale(rate: float) -> np.float32:
    """What keeps the mean as it was."""
    return np.float32(_LEVELS / (_LEVELS - _dropped(rate)))
