"""What every source yields: labelled texts, one after the other, read as often as need be."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, UInt64

from common.errors import InputError

# The splits do not depend on the seed of a run: runs with different seeds are tested alike.
SPLIT_SEED = 0
SPLITS = ("", "train", "test")


class Example(NamedTuple):
    """A text as its source has it (not cleaned), and what the source says of it."""

    text: str
    label: str
    category: str = ""
    """What it is about, where a data set has categories ("books"), else empty."""
    split: str = ""
    """"train" or "test" where the source itself splits; empty: the split is still to be drawn."""


@dataclass(frozen=True)
class Dataset:
    """A data set as a stream, so that it need not fit into memory."""

    name: str
    examples: Callable[[], Iterator[Example]]
    """Reads the source from its beginning, in always the same order. Raises InputError, naming file
    and place, at the first thing that cannot be used."""
    classes: tuple[str, ...] = ()
    """The labels in their order; empty: those that occur, sorted (as numbers where all are)."""
    test_size: float | int = 0.2
    """The share, or the number, of examples to be drawn for the test split where the source has no
    split of its own; stratified by category and label."""
    state: Mapping[str, str | int] = field(default_factory=dict)
    """What tells one state of the source from another, without reading it."""


def draw_test(
    dataset: Dataset, hashes: UInt64[np.ndarray, " N"], strata: Int32[np.ndarray, " N"]
) -> Bool[np.ndarray, " N"]:
    """Which texts are drawn for the test split: stratified, always the same ones.

    They are drawn from the texts that occur once (equal texts have equal hashes), so no text stands
    in both splits. A text that is alone in its stratum stays in training. Raises InputError where
    there are too few texts.
    """
    from sklearn.model_selection import train_test_split  # slow to import

    size = dataset.test_size
    if isinstance(size, float):
        size = math.ceil(size * len(strata))
    _, text, copies = np.unique(hashes, return_inverse=True, return_counts=True)
    single = np.flatnonzero(copies[text] == 1)
    single = single[np.bincount(strata[single])[strata[single]] > 1]
    try:
        _, test = train_test_split(
            single, test_size=size, stratify=strata[single], random_state=SPLIT_SEED
        )
    except ValueError:
        raise InputError(
            f"{dataset.name}: cannot draw {size:,} texts to test on, some of each class, "
            f"from the {len(single):,} of {len(strata):,} that occur once"
        ) from None
    return np.isin(np.arange(len(strata)), test)
