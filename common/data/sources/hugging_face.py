"""Data sets of the Hugging Face hub, and local ones in its formats.

    hf:NAME           a data set of the hub, downloaded once
    hf:DIR            what save_to_disk wrote, or a folder of Parquet, CSV or JSON files

Options, as hf:NAME?config=NAME: besides the columns (see tables.py), `config`, and `train` and
`test`, which name splits. Without these the splits go by their names; validation is tested on where
there is no test. Needs the extra hf.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from common.data.sources import columns, files, parquet, tables
from common.data.sources.dataset import Dataset, Example
from common.errors import InputError

OPTIONS = (*columns.OPTIONS, "config", "train", "test")


def load(spec: str) -> Dataset:
    """The rows of the split for training and of the one for testing."""
    if importlib.util.find_spec("datasets") is None:
        raise InputError(f'--data {spec}: needs the extra hf: pip install -e ".[hf]"')
    (path,), options = files.parse(spec, OPTIONS, must_exist=False)
    name = str(path)

    def examples() -> Iterator[Example]:
        with _errors_in_one_line(name):
            found = _load(name, options)
            for split_name, split in _splits(found, options, spec):
                table = found[split_name]
                place = f"{name}: split {split_name}" if split_name else name
                chosen = columns.choose(table.column_names, options, place)
                yield from tables.labelled(partial(_rows, table, chosen), f"{place}: row", split)

    on_disk = sorted(file for file in path.rglob("*") if file.is_file())
    return Dataset(spec, examples, state=files.state(on_disk) if path.is_dir() else {})


@contextmanager
def _errors_in_one_line(name: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the library, and those that it uses, have no common one
        first_line = str(error).partition("\n")[0]
        raise InputError(f"hf:{name}: {type(error).__name__}: {first_line}") from None


def _load(name: str, options: dict[str, str]) -> dict[str, Any]:
    import datasets  # slow to import

    if (Path(name) / "dataset_dict.json").exists() or (Path(name) / "state.json").exists():
        found = datasets.load_from_disk(name)
    else:
        found = datasets.load_dataset(name, options.get("config"))
    return dict(found) if isinstance(found, dict) else {"": found}


def _splits(found: dict[str, Any], options: dict[str, str], spec: str) -> list[tuple[str, Any]]:
    """(name of a split, "train", "test" or, where it is to be drawn, empty)"""
    there = f"there are: {', '.join(found)}"
    if len(found) == 1 and not {"train", "test"} & set(options):
        return [(name, "") for name in found]
    chosen = []
    for split, meanings in (("train", ("train",)), ("test", ("test", "validation"))):
        usual = (name for want in meanings for name in found if tables.SPLITS.get(name) == want)
        name = options.get(split) or next(usual, None)
        if name not in found:
            raise InputError(
                f"--data {spec}: no split {name or f'for the {split}: ?{split}=NAME'}; {there}"
            )
        chosen.append((name, split))
    return chosen


def _rows(table: Any, chosen: columns.Columns) -> Iterator[columns.Row]:
    feature = table.features[chosen[1]]
    names = getattr(feature, "names", ())  # a ClassLabel's numbers stand for names, -1 for none
    selected = table.select_columns([name for name in dict.fromkeys(chosen) if name])
    selected.data.validate(full=True)  # else damaged offsets are followed wherever they lead
    batches = selected.with_format("arrow").iter(parquet.BATCH)
    for number, text, label, split, category in parquet.arrow_rows(batches, chosen):
        name = names[label] if isinstance(label, int) and 0 <= label < len(names) else None
        yield number, text, name if names else label, split, category
