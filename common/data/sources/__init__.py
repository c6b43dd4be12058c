"""Sources of labelled texts, one module for each, and load(spec), which dispatches to them.

A spec is a name (imdb, rt) or KIND:ARGUMENTS; docs/data.md has an example of each kind.
"""

from collections.abc import Callable

from common.data.sources import amazon, dlstudio, hugging_face, movie_reviews, tables, text_files
from common.data.sources.dataset import Dataset, Example
from common.errors import InputError

__all__ = ["Dataset", "Example", "fingerprint", "load", "load_unlabelled"]

_SOURCES: dict[str, Callable[[str], Dataset]] = {
    **dict.fromkeys(movie_reviews.NAMES, movie_reviews.load),
    "amazon:": amazon.load,
    "dlstudio:": dlstudio.load,
    **{f"{kind}:": tables.load for kind in tables.KINDS},
    "text:": text_files.load,
    "hf:": hugging_face.load,
}


def load(spec: str) -> Dataset:
    """The data set that `spec` names, as a stream.

    Raises InputError for an invalid spec or a missing file.
    """
    return _source(spec)(spec)


def load_unlabelled(spec: str) -> Dataset:
    """All texts of a data set, with every row of a table; a missing label is empty.

    Raises InputError as load does.
    """
    kind = spec.partition(":")[0]
    return tables.load(spec, needs_label=False) if kind in tables.KINDS else load(spec)


def fingerprint(spec: str) -> dict[str, str | int]:
    """A cheap fingerprint of the data set for cache keys. Raises InputError as load does."""
    return {"data": spec, **_source(spec)(spec).state}


def _source(spec: str) -> Callable[[str], Dataset]:
    kind, colon, _ = spec.partition(":")
    if kind + colon not in _SOURCES:
        raise InputError(f"--data {spec}: no such data set; expected one of {', '.join(_SOURCES)}")
    return _SOURCES[kind + colon]
