import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common.data import corpus, encoding
from common.data.sources.dataset import Dataset, Example
from common.data.text import clean, tokenize
from common.errors import InputError
from tests import ROOT

WORKERS = 2


@pytest.fixture
def many_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_CHUNKS_BEFORE_WORKERS", 1)
    monkeypatch.setattr(encoding, "cores", lambda: WORKERS)
    monkeypatch.setattr(corpus, "CHUNK", 200)


def children() -> set[str]:
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        pytest.skip("needs /proc")
    return {pid for task in tasks.iterdir() for pid in (task / "children").read_text().split()}


def examples(count: int) -> Iterator[Example]:
    for i in range(count):
        yield Example(f"Text <b>{i}</b> isn't caf\u00e9 {i % 7} \ud800", "ab"[i % 2])


def test_processes_give_what_one_process_gives(many_small_chunks: None) -> None:
    chunks = [[text for text, *_ in examples(n)] for n in (3, 0, 50, 1, 7, 20)]
    before = children()
    results = encoding.encode_all(chunks)
    actual = [next(results), next(results)]
    assert len(children() - before) == WORKERS
    actual += results
    assert children() == before
    assert actual == [encoding.encode(chunk) for chunk in chunks]
    for chunk, result in zip(chunks, actual, strict=True):
        words = [result.words[i] for i in result.tokens]
        assert words == [word for text in chunk for word in tokenize(clean(text))]
        assert len(result.hashes) == encoding.HASH_BYTES * len(chunk)


def test_encoded_blocks_are_freed_immediately() -> None:
    """A reference cycle would keep the memory until the next garbage collection."""
    while gc.collect():  # the garbage of other tests may take several collections
        pass
    encoding.encode(["a text", "and another"])
    assert gc.collect() == 0


def test_a_small_data_set_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_Worker", lambda: pytest.fail("a process was started"))
    chunks = [["a text"]] * encoding._CHUNKS_BEFORE_WORKERS
    assert len(list(encoding.encode_all(chunks))) == len(chunks)


def test_the_corpus_is_the_same_with_and_without_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    result = []
    for name in ("alone", "parallel"):
        monkeypatch.setenv("GRU_TWINS_CACHE", str(tmp_path / name))
        if name == "parallel":
            request.getfixturevalue("many_small_chunks")
        result.append(corpus.encoded(lambda: Dataset("x", lambda: examples(300)), {}))
    alone, parallel = result
    assert alone.vocabulary == parallel.vocabulary
    np.testing.assert_array_equal(alone.train.tokens, parallel.train.tokens)
    np.testing.assert_array_equal(alone.test.starts, parallel.test.starts)


@pytest.mark.parametrize("options", ["killed", "interrupted", "bad input"])
def test_failed_encoding_leaves_no_process_and_no_folder(
    options: str, many_small_chunks: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GRU_TWINS_CACHE", str(tmp_path))
    before = children()

    def stops() -> Iterator[Example]:
        yield from examples(100)
        workers = children() - before
        assert len(workers) == WORKERS
        if options == "killed":
            os.kill(int(min(workers)), signal.SIGKILL)
        elif options == "interrupted":
            raise KeyboardInterrupt
        else:
            raise InputError("file.csv: line 101: no")
        yield from examples(100)

    error, message = {
        "killed": (InputError, "a worker process ended with status -9"),
        "interrupted": (KeyboardInterrupt, None),
        "bad input": (InputError, "line 101"),
    }[options]
    with pytest.raises(error, match=message):
        corpus.encoded(lambda: Dataset("x", stops), {})
    assert children() == before
    assert not list(tmp_path.iterdir())


PROGRAM = """
import itertools
from common.data import corpus, encoding
from common.data.sources.dataset import Dataset, Example
from common.errors import exit_on_input_error

encoding._CHUNKS_BEFORE_WORKERS, encoding.cores, corpus.CHUNK = 1, lambda: 2, 10_000

def endless():
    for i in itertools.count():
        if i == 20_000:
            print("running", flush=True)
        yield Example("some text", "a")

with exit_on_input_error():
    corpus.encoded(lambda: Dataset("x", endless), {})
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_and_kill_end_the_workers(stop: signal.Signals, tmp_path: Path) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "GRU_TWINS_CACHE": str(tmp_path)},
        cwd=ROOT,
        text=True,
    )
    watchdog = threading.Timer(60, program.kill)
    watchdog.start()
    assert program.stdout and program.stdout.readline() == "running\n"
    result = Path(f"/proc/{program.pid}/task/{program.pid}/children")
    if not result.exists():
        program.kill()
        pytest.skip("needs /proc")
    workers = result.read_text().split()
    assert len(workers) == WORKERS
    program.send_signal(stop)
    _, error = program.communicate()
    watchdog.cancel()
    assert program.returncode == (130 if stop == signal.SIGINT else -stop)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker is still there"
        time.sleep(0.01)
    if stop == signal.SIGINT:
        assert error == ""
        assert not list(tmp_path.iterdir())
