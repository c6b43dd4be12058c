"""What every source yields: texts with labels, split into train and test."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

# The splits do not depend on the seed of a run: runs with different seeds are tested alike.
SPLIT_SEED = 0


@dataclass(frozen=True)
class Split:
    """Cleaned texts and their labels, one for one."""

    texts: list[str]
    labels: Int[np.ndarray, " N"]


@dataclass(frozen=True)
class Dataset:
    """A data set in its two splits; a label is an index into `classes`."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split


def split(
    name: str, classes: tuple[str, ...], texts: list[str], labels: np.ndarray, *, test_size: int
) -> Dataset:
    """Split labelled texts, stratified by label, always the same way.

    The test split is drawn from the texts that occur once, so no text stands in both.
    """
    from sklearn.model_selection import train_test_split  # slow to import

    _, first, copies = np.unique(np.asarray(texts, object), return_index=True, return_counts=True)
    single = np.sort(first[copies == 1])
    _, test = train_test_split(
        single, test_size=test_size, stratify=labels[single], random_state=SPLIT_SEED
    )
    test = np.sort(test)
    train = np.setdiff1d(np.arange(len(texts)), test)

    def take(rows: np.ndarray) -> Split:
        return Split([texts[row] for row in rows], labels[rows].astype(np.int32))

    return Dataset(name, classes, take(train), take(test))
