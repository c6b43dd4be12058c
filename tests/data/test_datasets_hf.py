"""The source hf, offline: data sets on disk in the formats of Hugging Face datasets."""

from pathlib import Path

import numpy as np
import pytest

from common.data import sources
from common.data.sources import Example
from common.errors import InputError

hf = pytest.importorskip("datasets", reason="needs the extra hf")


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(hf.config, "HF_HUB_OFFLINE", True)


def table(labels: list[int]) -> "hf.Dataset":
    features = hf.Features(
        {"text": hf.Value("string"), "label": hf.ClassLabel(names=["negative", "positive"])}
    )
    rows = {"text": [f"text {number}" for number in range(len(labels))], "label": labels}
    return hf.Dataset.from_dict(rows, features=features)


def test_saved_splits_with_named_classes(tmp_path: Path) -> None:
    splits = {"validation": table([1]), "train": table([0, 1]), "unsupervised": table([-1])}
    hf.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    spec = f"hf:{tmp_path}/saved"
    expected = [
        Example("text 0", "negative", split="train"),
        Example("text 1", "positive", split="train"),
        Example("text 0", "positive", split="test"),
    ]
    assert list(sources.load(spec).examples()) == expected
    assert list(sources.load(f"{spec}?test=train").examples())[2:] == [
        Example("text 0", "negative", split="test"),
        Example("text 1", "positive", split="test"),
    ]
    assert sources.fingerprint(spec) == sources.fingerprint(spec)
    with pytest.raises(InputError, match=r"saved: split unsupervised: row 1: no label"):
        list(sources.load(f"{spec}?test=unsupervised").examples())
    with pytest.raises(InputError, match="no split dev; splits: validation, train, unsup"):
        list(sources.load(f"{spec}?test=dev").examples())
    with pytest.raises(
        InputError, match="saved: split train: no column mark; columns: text, label"
    ):
        list(sources.load(f"{spec}?label=mark").examples())


def test_single_split_is_loaded_without_split_names(tmp_path: Path) -> None:
    table([0, 1]).save_to_disk(tmp_path / "one")
    result = list(sources.load(f"hf:{tmp_path}/one").examples())
    assert [example.split for example in result] == ["", ""]


def test_damaged_offsets_are_not_followed(tmp_path: Path) -> None:
    table([0, 1]).save_to_disk(tmp_path / "one")
    (path,) = (tmp_path / "one").glob("*.arrow")
    offsets = np.array([0, 6, 12], np.int32)  # of "text 0" and "text 1", which end at 12
    data = path.read_bytes()
    assert data.count(offsets.tobytes()) == 1
    path.write_bytes(data.replace(offsets.tobytes(), (offsets * [1, 1, 6]).astype("i4").tobytes()))
    with pytest.raises(InputError, match=rf"^hf:{tmp_path}/one: ArrowInvalid: "):
        list(sources.load(f"hf:{tmp_path}/one").examples())


def test_a_folder_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    table([0, 1]).to_parquet(folder / "train.parquet")
    table([1]).to_parquet(folder / "test.parquet")
    result = list(sources.load(f"hf:{folder}").examples())
    assert [(e.label, e.split) for e in result] == [
        *(("negative", "train"), ("positive", "train"), ("positive", "test"))
    ]


def test_missing_data_set_or_package_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"^hf:nobody/nothing: [^\n]*$"):
        list(sources.load("hf:nobody/nothing").examples())
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=rf"^hf:{tmp_path}/empty: "):
        list(sources.load(f"hf:{tmp_path}/empty").examples())
    monkeypatch.setattr("common.extras.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'datasets is not installed: pip install -e "\.\[hf\]"'):
        sources.fingerprint("hf:imdb")
