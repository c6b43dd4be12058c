"""What every source yields: labelled texts, one after the other, read as often as need be."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from common.errors import InputError


class Example(NamedTuple):
    """A text as its source has it (not cleaned), and what the source says of it."""

    text: str
    label: str
    category: str = ""
    """What it is about, where a data set has categories ("books"), else empty."""
    split: str = ""
    """"train" or "test" where the source itself splits; empty: the split is still to be drawn."""


class BadRow(InputError):
    """A row of a table that cannot be used, beside others that can."""

    def __init__(self, where: object, row: str, problem: str, kind: str = "", rows: int = 1):
        """kind: of problems that are counted together; rows: how many it may have swallowed."""
        super().__init__(f"{where}: {row}: {problem}")
        self.kind, self.rows = kind or problem, rows


@dataclass(frozen=True)
class Dataset:
    """A data set as a stream, so that it need not fit into memory."""

    name: str
    rows: Callable[[], Iterator[Example | BadRow]]
    """Reads the source from its beginning, in always the same order. Raises InputError, naming file
    and place, where it cannot be read on."""
    classes: tuple[str, ...] = ()
    """The labels in their order; empty: those that occur, sorted (as numbers where all are)."""
    test_size: float | int = 0.2
    """The share, or the number, of examples to be drawn for the test split where the source has no
    split of its own; stratified by category and label."""
    state: Mapping[str, str | int] = field(default_factory=dict)
    """What tells one state of the source from another, without reading it."""

    def examples(self, left_out: Counter[str] | None = None) -> Iterator[Example]:
        """The rows that can be used; the others are counted in left_out, by their kind.

        Raises InputError where the source cannot be read on; without left_out, at the first row
        that cannot be used, too.
        """
        for row in self.rows():
            if not isinstance(row, BadRow):
                yield row
            elif left_out is None:
                raise InputError(f"{row}; --skip-bad-rows leaves such rows out")
            else:
                left_out[row.kind] += row.rows
