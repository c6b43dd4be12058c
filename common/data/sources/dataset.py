"""What every source yields: labelled texts, one after the other, read as often as need be."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


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
