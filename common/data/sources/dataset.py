"""The interface of all sources: a stream of labelled texts, which can be read repeatedly."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from common.errors import InputError


class Example(NamedTuple):
    """An uncleaned text of a source with its label."""

    text: str
    label: str
    category: str = ""
    """The category, such as "books"; empty if the data set has none."""
    split: str = ""
    """"train" or "test"; empty if the source has no split."""


class BadRow(InputError):
    """An unusable row of a table."""

    def __init__(self, place: object, row: str, problem: str, kind: str = "", rows: int = 1):
        """kind: groups problems in counts (default: problem); rows: how many rows are affected."""
        super().__init__(f"{place}: {row}: {problem}")
        self.kind, self.rows = kind or problem, rows


@dataclass(frozen=True)
class Dataset:
    """A data set as a stream, which need not fit into memory."""

    name: str
    rows: Callable[[], Iterator[Example | BadRow]]
    """Reads the source from its beginning in a fixed order. Raises InputError, with file and place,
    if the source cannot be read."""
    classes: tuple[str, ...] = ()
    """The labels in order; empty: those that occur, sorted (numerically if all are numbers)."""
    test_size: float | int = 0.2
    """The fraction or number of examples to draw for the test split, stratified by category and
    label, if the source has no split."""
    state: Mapping[str, str | int] = field(default_factory=dict)
    """Identifies the state of the source without reading it."""

    def examples(self, left_out: Counter[str] | None = None) -> Iterator[Example]:
        """The usable rows; left_out counts the others by kind.

        Raises InputError if the source cannot be read and, without left_out, for an unusable row.
        """
        for row in self.rows():
            if not isinstance(row, BadRow):
                yield row
            elif left_out is None:
                raise InputError(f"{row}; --skip-bad-rows leaves such rows out")
            else:
                left_out[row.kind] += row.rows
