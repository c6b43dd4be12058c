"""The measurement of tools/large_corpus.py, on a data set that is not large."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own: what other tests have loaded would count as its memory.
MEASURE = """
import json, pathlib, sys
from common.data import encoding
from tools import large_corpus
encoding._CHUNKS_BEFORE_WORKERS = 1
large_corpus.VOCABULARY = 20_000
path = pathlib.Path(sys.argv[1])
large_corpus.write(path, 4_000)
print(json.dumps([large_corpus.measure(path), large_corpus.measure(path)]))
"""


@pytest.mark.long  # test_encoding.py tests the processes, test_batches.py the memory of a file
def test_a_synthetic_data_set_is_encoded_and_batched_in_processes(tmp_path: Path) -> None:
    if not Path("/proc/self/task").is_dir():
        pytest.skip("memory is read from /proc")
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "reviews.jsonl"],
        env={**os.environ, "GRU_TWINS_CACHE": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        check=True,
    )
    first, again = json.loads(process.stdout.splitlines()[-1])
    assert first["reviews"] == again["reviews"] == 4_000
    assert first["words"] == pytest.approx(4_000 * 100, rel=0.05)
    assert again["corpus_seconds"] < first["corpus_seconds"]
    assert again["resume_seconds"] < 1
    assert 0 < first["peak_private_bytes"] < 2**29
