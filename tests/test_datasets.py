import numpy as np
import pytest

from common import datasets
from common.errors import InputError


@pytest.mark.parametrize(("spec", "train", "test"), [("imdb", 20_000, 5_000), ("rt", 6_824, 1_706)])
def test_splits_are_stratified_and_share_no_text(spec: str, train: int, test: int) -> None:
    data = datasets.load(spec)
    assert (len(data.train.texts), len(data.test.texts)) == (train, test)
    assert not set(data.train.texts) & set(data.test.texts)
    for split in (data.train, data.test):
        assert len(split.labels) == len(split.texts)
        assert abs(split.labels.mean() - 0.5) < 0.005
        assert not any("<br" in text for text in split.texts)


def test_the_split_is_always_the_same() -> None:
    first, second = datasets.load("rt"), datasets.load("rt")
    assert first.test.texts == second.test.texts
    np.testing.assert_array_equal(first.train.labels, second.train.labels)


def test_an_unknown_data_set_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"--data imbd: .* imdb, rt"):
        datasets.load("imbd")
