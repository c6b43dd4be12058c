"""Data sets of the Hugging Face hub, and local ones in its formats.

    hf:NAME           a data set of the hub, downloaded once
    hf:DIR            what save_to_disk wrote, or a folder of Parquet, CSV or JSON files

Options, as hf:NAME?config=NAME: besides the columns (see tables.py), `config`, and `train` and
`test`, which name splits. Without these the splits go by their names; validation is tested on where
there is no test. Needs the extra hf.
"""

import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any

from common.data.sources import columns, files, tables
from common.data.sources.dataset import BadRow, Dataset, Example
from common.errors import InputError

OPTIONS = (*columns.OPTIONS, "config", "train", "test")


def load(spec: str) -> Dataset:
    """The rows of the split for training and of the one for testing."""
    if importlib.util.find_spec("datasets") is None:
        raise InputError(f'--data {spec}: needs the extra hf: pip install -e ".[hf]"')
    (path,), options = files.parse(spec, OPTIONS, must_exist=False)

    def rows() -> Iterator[Example | BadRow]:
        try:
            import datasets  # slow to import

            if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
                found = datasets.load_from_disk(str(path))
            else:
                found = datasets.load_dataset(str(path), options.get("config"))
            found = found if isinstance(found, dict) else {"": found}
            for name, split in _splits(list(found), options, spec):
                place = f"{path}: split {name}" if name else str(path)
                chosen = columns.choose(found[name].column_names, options, place)
                yield from columns.labelled(
                    partial(_rows, found[name], chosen), place, "row", split
                )
        except InputError:
            raise
        except Exception as error:  # the library, and those that it uses, have no common one
            first_line = str(error).partition("\n")[0]
            raise InputError(f"hf:{path}: {type(error).__name__}: {first_line}") from None

    on_disk = sorted(file for file in path.rglob("*") if file.is_file())
    return Dataset(spec, rows, state=files.state(on_disk) if path.is_dir() else {})


def _splits(found: list[str], options: dict[str, str], spec: str) -> list[tuple[str, str]]:
    """(name of a split, "train", "test" or, where it is to be drawn, empty)"""
    if len(found) == 1 and not {"train", "test"} & set(options):
        return [(found[0], "")]
    chosen = []
    for split, meanings in (("train", ("train",)), ("test", ("test", "validation"))):
        usual = (name for want in meanings for name in found if columns.SPLITS.get(name) == want)
        name = options.get(split) or next(usual, None)
        if name not in found:
            missing = name or f"for the {split}: ?{split}=NAME"
            raise InputError(f"--data {spec}: no split {missing}; there are: {', '.join(found)}")
        chosen.append((name, split))
    return chosen


def _rows(table: Any, chosen: columns.Columns) -> Iterator[columns.Row]:
    # A ClassLabel's numbers stand for names, -1 for none.
    names = getattr(table.features[chosen[1]], "names", None)
    selected = table.select_columns([name for name in dict.fromkeys(chosen) if name])
    selected.data.validate(full=True)  # else damaged offsets are followed wherever they lead
    batches = selected.with_format("arrow").iter(tables.BATCH)
    for text, label, *rest in tables.arrow_rows(batches, chosen):
        name = names[label] if names and label in range(len(names)) else None
        yield text, name if names else label, *rest
