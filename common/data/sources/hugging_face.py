"""Data sets of the Hugging Face hub, and local data sets in its formats.

    hf:NAME           a data set of the hub, downloaded once
    hf:DIR            a folder of save_to_disk, or of Parquet, CSV or JSON files

Options, for example hf:NAME?config=NAME: the columns (see tables.py), `config`, and `train` and
`test`, the names of splits. By default, splits with usual names are chosen; without a test split,
validation is the test split. Requires the extra hf.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from common.data.sources import columns, files, tables
from common.data.sources.dataset import BadRow, Dataset, Example
from common.errors import InputError
from common.extras import require

OPTIONS = (*columns.OPTIONS, "config", "train", "test")


def load(spec: str) -> Dataset:
    """The rows of the training and of the test split."""
    require("hf", what=f"--data {spec}: ")
    (path,), options = files.parse(spec, OPTIONS, must_exist=False)

    def rows() -> Iterator[Example | BadRow]:
        try:
            import datasets  # slow to import

            if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
                loaded = datasets.load_from_disk(str(path))
            else:
                loaded = datasets.load_dataset(str(path), options.get("config"))
            tables_of = loaded if isinstance(loaded, dict) else {"": loaded}
            for name, split in _splits(list(tables_of), options, spec):
                place = f"{path}: split {name}" if name else str(path)
                table = tables_of[name]
                chosen = columns.choose(table.column_names, options, place)
                yield from columns.labelled(partial(_rows, table, chosen), place, "row", split)
        except InputError:
            raise
        except Exception as error:  # the library and its dependencies have no common base class
            first_line = str(error).partition("\n")[0]
            raise InputError(f"hf:{path}: {type(error).__name__}: {first_line}") from None

    on_disk = sorted(file for file in path.rglob("*") if file.is_file())
    return Dataset(spec, rows, state=files.state(on_disk) if path.is_dir() else {})


def _splits(names: list[str], options: dict[str, str], spec: str) -> list[tuple[str, str]]:
    """Pairs of a split's name and "train" or "test"; ("name", "") for a single split."""
    if len(names) == 1 and not {"train", "test"} & set(options):
        return [(names[0], "")]
    chosen = []
    for split, roles in (("train", ("train",)), ("test", ("test", "validation"))):
        usual = (name for role in roles for name in names if columns.SPLITS.get(name) == role)
        name = options.get(split) or next(usual, None)
        if name not in names:
            missing = name or f"for the {split}: ?{split}=NAME"
            raise InputError(f"--data {spec}: no split {missing}; splits: {', '.join(names)}")
        chosen.append((name, split))
    return chosen


def _rows(table: Any, chosen: columns.Columns) -> Iterator[columns.Row]:
    # The values of a ClassLabel are indices of names; -1 means no label.
    names = getattr(table.features[chosen[1]], "names", None)
    selected = table.select_columns([name for name in dict.fromkeys(chosen) if name])
    selected.data.validate(full=True)  # otherwise Arrow dereferences damaged offsets
    batches = selected.with_format("arrow").iter(tables.BATCH)
    for text, label, *rest in tables.arrow_rows(batches, chosen):
        name = names[label] if names and label in range(len(names)) else None
        yield text, name if names else label, *rest
