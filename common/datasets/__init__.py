"""Labelled texts: one file a source, and one function load(spec) in front of them."""

from common.datasets import movie_reviews
from common.datasets.dataset import Dataset, Example
from common.errors import InputError

__all__ = ["Dataset", "Example", "fingerprint", "load"]

_SOURCES = {name: movie_reviews for name in movie_reviews.NAMES}


def load(spec: str) -> Dataset:
    """Read the data set that `spec` names ("imdb", "rt").

    Raises InputError for a name that no source knows or a source that cannot be read.
    """
    return _source(spec).load(spec)


def fingerprint(spec: str) -> dict[str, str | int]:
    """What the data set depends on, cheap to find out: part of the key under which it is cached."""
    return _source(spec).fingerprint(spec)


def _source(spec: str):  # type: ignore[no-untyped-def]
    try:
        return _SOURCES[spec]
    except KeyError:
        raise InputError(
            f"--data {spec}: no such data set; expected one of {', '.join(_SOURCES)}"
        ) from None
