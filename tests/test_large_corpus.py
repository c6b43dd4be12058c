"""The measurement of comparison/large_corpus.py, on a data set that is not large."""

from pathlib import Path

import pytest

from common import encoding
from comparison import large_corpus


def test_a_synthetic_data_set_is_encoded_and_batched_in_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc/self/task").is_dir():
        pytest.skip("memory is read from /proc")
    monkeypatch.setenv("GRU_TWINS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(encoding, "_ALONE", 1)
    monkeypatch.setattr(large_corpus, "VOCABULARY", 20_000)
    path = tmp_path / "reviews.jsonl"
    large_corpus.write(path, 4_000)
    _, before = large_corpus._resident("self")
    first = large_corpus.measure(path)
    again = large_corpus.measure(path)
    assert first["reviews"] == again["reviews"] == 4_000
    assert first["words"] == pytest.approx(4_000 * 100, rel=0.05)
    assert again["corpus_seconds"] < first["corpus_seconds"]
    assert again["resume_seconds"] < 1
    assert 0 < first["peak_private_bytes"] - before < 2**28  # whatever other tests have loaded
