"""Which column of a table is which."""

from collections.abc import Mapping, Sequence

from common.errors import InputError

# The usual names, the most telling first; case, blanks, - and _ do not matter.
_USUAL = {
    "text": "text review reviewtext reviewbody sentence content body comment document tweet",
    "label": "label labels sentiment class target polarity stars rating score emotion topic",
    "split": "split partition subset",
    "category": "category domain",
}
OPTIONS = tuple(_USUAL)

Columns = Sequence[str | None]
"""The names of the columns for text, label, split and category; None where there is none."""
Row = tuple[int, object, object, object, object]
"""The number of its line or row, and what these columns have; None where there is no column."""


def choose(names: Sequence[str], options: Mapping[str, str], place: str) -> Columns:
    """The columns that the options name, or else those with usual names.

    Raises InputError, naming `place` and the columns there are.
    """
    simple = {}
    for there in reversed(names):  # of two alike, the first
        simple[there.lower().translate({ord(c): None for c in " _-"})] = there
    columns = f"there are: {', '.join(names)}"
    chosen: dict[str, str | None] = {}
    for use, usual in _USUAL.items():
        guesses = (simple[guess] for guess in usual.split() if guess in simple)
        guess = next((guess for guess in guesses if guess not in chosen.values()), "")
        name = options.get(use, guess)
        if name and names.count(name) != 1:
            found = "no column" if name not in names else "more than one column"
            raise InputError(f"{place}: {found} {name}; {columns}")
        if use in ("text", "label") and not name:
            raise InputError(
                f"{place}: no column for the {use}: name it with ?{use}=COLUMN; {columns}"
            )
        chosen[use] = name or None
    return list(chosen.values())
