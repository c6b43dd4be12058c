"""The cache: verification, concurrent construction, failing disks."""

import dataclasses
import mmap
import os
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from common import cache
from common.cache import cache_folder, cached
from common.data import batches
from common.errors import InputError, exit_on_input_error
from common.training.data import load_data
from common.training.options import TrainConfig
from tests.training.cases import Command, refused, train_torch

SIZES = {"batch_size": 8, "validation_size": 12, "ngrams": 2, "hidden_size": 4, "epochs": 1}
WORDS = [f"word{i}" for i in range(40)]
ANOTHER = "set GRU_TWINS_CACHE to another folder\n"
LOAD = """
import sys
from common.data import batches
from common.training.data import load_data
from common.training.options import TrainConfig
batches.LARGE = 1
data = load_data(TrainConfig(**eval(sys.argv[1])), lambda line: None)
for each in (data.train, data.test, data.validation):
    each.plan(0)
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRU_TWINS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """Options of a training that uses every kind of cache."""
    rng = np.random.default_rng(0)
    lines = [
        f'{{"text": "{" ".join(rng.choice(WORDS, 80))}", "label": {i % 2}, "category": "{i % 3}", '
        f'"split": "{"test" if i % 4 == 3 else "train"}"}}\n'
        for i in range(80)
    ]
    (tmp_path / "reviews.jsonl").write_text("".join(lines))
    vectors = (f"{word} {' '.join(map(str, rng.standard_normal(3)))}\n" for word in WORDS[2:])
    (tmp_path / "vectors.txt").write_text("".join(vectors))
    monkeypatch.setattr(batches, "LARGE", 1)
    spec = f"jsonl:{tmp_path / 'reviews.jsonl'}"
    return TrainConfig(data=spec, vectors=str(tmp_path / "vectors.txt"), **SIZES)  # type: ignore[arg-type]


def contents(options: TrainConfig) -> list[object]:
    """All data that a training reads."""
    data = load_data(options, lambda line: None)
    assert data.ratios and data.validation
    values: list[object] = [data.name, data.classes, data.categories, data.vectors.words]
    values += [data.vectors.matrix.tobytes()]
    values += [each.tobytes() for each in data.ratios.tensors().values()]
    for part in (data.train, data.test, data.validation):
        for batch in part.epoch():
            values += [np.asarray(value).tobytes() for value in vars(batch).values()]
        assert part.split.categories is not None
        values.append(part.split.categories.tobytes())
    return values


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def flip_bit(content: bytes, rng: np.random.Generator) -> bytes:
    """A copy with one random bit flipped."""
    changed = bytearray(content)
    changed[rng.integers(len(content))] ^= 1 << rng.integers(8)
    return bytes(changed)


def fill(folder: Path) -> None:
    (folder / "content").write_text("new")


def fail_if_called(folder: Path) -> None:
    pytest.fail("the entry is built again")


@pytest.mark.parametrize("damage", ["cut content", "cut key.json", "remove content"])
def test_incomplete_entry_is_rebuilt(damage: str) -> None:
    action, _, name = damage.partition(" ")
    damaged = cached("kind", {}, fill) / name
    whole = damaged.read_bytes()
    cached("kind", {}, fail_if_called)
    damaged.unlink() if action == "remove" else os.truncate(damaged, len(whole) // 2)
    assert cached("kind", {}, fill) == damaged.parent
    assert damaged.read_bytes() == whole


def test_exchanged_entries_are_rebuilt(capsys: pytest.CaptureFixture[str]) -> None:
    def fill_with(content: str) -> Path:
        return cached("kind", {"of": content}, lambda to: (to / "content").write_text(content))

    one, other = fill_with("one"), fill_with("other")
    for source, target in ((one, "aside"), (other, one), (one.with_name("aside"), other)):
        source.rename(one.with_name(target) if isinstance(target, str) else target)
    assert (fill_with("one") / "content").read_text() == "one"
    assert (fill_with("other") / "content").read_text() == "other"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("describes another folder's content" in line for line in lines)


def test_unknown_file_in_entry_is_not_read(
    options: TrainConfig, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = contents(options)
    (folder,) = own_cache.glob("corpus-*")
    labels = np.load(folder / "train.labels.npy")
    np.save(folder / "train.labels.7.npy", 1 - labels)
    assert contents(options) == expected
    (line,) = capsys.readouterr().err.splitlines()
    assert "train.labels.7.npy: is not a file of the cache; making it again" in line


def test_flipped_bit_in_any_file_is_detected_and_repaired(
    options: TrainConfig, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    expected, whole = contents(options), files_of(own_cache)
    kinds = {path.parent.name.partition("-")[0] for path in whole}
    assert kinds == {"corpus", "counts", "tokens", "vectors", "ratios", "plan"}
    for path, content in whole.items():
        path.write_bytes(flip_bit(content, rng))
        assert contents(options) == expected
        error = capsys.readouterr().err
        assert error.startswith(f"{path}: damaged") and error.endswith("; making it again\n")
        assert error.count("\n") == 1
        assert files_of(own_cache) == whole


def test_large_file_is_verified_while_it_is_read(
    options: TrainConfig, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "WHOLE", 0)
    monkeypatch.setattr(cache, "BLOCK", mmap.PAGESIZE)
    rng = np.random.default_rng(0)
    expected, whole = contents(options), files_of(own_cache)
    detected = set()
    for path in [path for path in whole if path.suffix in (".int32", ".float32")]:
        for _ in range(8):
            path.write_bytes(flip_bit(whole[path], rng))
            try:
                assert contents(options) == expected  # the bit belongs to a text that is not read
            except InputError as error:
                detected.add(path.parent)
                assert str(error).startswith(f"{path}: damaged")
                assert "the same command makes it again" in str(error)
                assert not path.parent.exists()
                assert contents(options) == expected
            path.write_bytes(whole[path])
    # A training reads renumbered tokens; it reads those of the corpus only for its example.
    kinds = sorted(folder.name.partition("-")[0] for folder in detected)
    assert [kind for kind in kinds if kind != "corpus"] == ["ratios", "tokens", "tokens", "tokens"]


def test_training_repairs_damaged_cache_and_gives_same_model(
    options: TrainConfig, own_cache: Path, tmp_path: Path, command: Command
) -> None:
    rng = np.random.default_rng(0)
    models = []
    for out in (tmp_path / "whole", tmp_path / "damaged"):
        status, _, error = train(options, out, command)
        assert status == 0
        models.append((out / "model.safetensors").read_bytes())
        for name in ("corpus-*/test.labels.npy", "tokens-*/tokens.int32", "ratios-*/train.float32"):
            path = next(own_cache.glob(name))
            path.write_bytes(flip_bit(path.read_bytes(), rng))
    assert models[0] == models[1]
    assert error.count("\n") == error.count("; making it again\n") == 3


def train(options: TrainConfig, out: Path, command: Command) -> tuple[int, str, str]:
    names = ("data", "vectors", *SIZES)
    arguments = [w for n in names for w in (f"--{n.replace('_', '-')}", getattr(options, n))]
    return command(train_torch, *arguments, "--out", out)


def test_one_of_two_threads_builds_the_entry() -> None:
    started, may_finish = Event(), Event()

    def build_slowly(folder: Path) -> None:
        started.set()
        assert may_finish.wait(10)
        fill(folder)

    with ThreadPoolExecutor() as threads:
        first = threads.submit(cached, "kind", {}, build_slowly)
        assert started.wait(10)
        second = threads.submit(cached, "kind", {}, fail_if_called)
        assert not wait([second], 0.2).done
        may_finish.set()
        assert first.result() == second.result()
    assert (first.result() / "content").read_text() == "new"
    assert len(list(cache_folder().iterdir())) == 1


def test_waiting_thread_builds_the_entry_if_the_first_fails() -> None:
    """The second thread waits for the first, the third for the second."""
    first_begun, may_fail, second_begun, may_finish = (Event() for _ in range(4))

    def fail(folder: Path) -> None:
        first_begun.set()
        assert may_fail.wait(10)
        raise ZeroDivisionError

    def build_slowly(folder: Path) -> None:
        second_begun.set()
        assert may_finish.wait(10)
        fill(folder)

    with ThreadPoolExecutor() as threads:
        first = threads.submit(cached, "kind", {}, fail)
        assert first_begun.wait(10)
        second = threads.submit(cached, "kind", {}, build_slowly)
        assert not wait([second], 0.2).done
        may_fail.set()
        assert second_begun.wait(10)
        third = threads.submit(cached, "kind", {}, fail_if_called)
        assert not wait([third], 0.2).done
        may_finish.set()
        assert second.result() == third.result()
    assert isinstance(first.exception(), ZeroDivisionError)
    assert len(list(cache_folder().iterdir())) == 1


@pytest.mark.parametrize("damaged", [False, True])
def test_two_processes_share_one_cache(
    damaged: bool, options: TrainConfig, own_cache: Path
) -> None:
    contents(options)
    rng, whole = np.random.default_rng(0), files_of(own_cache)
    to_flip = [path for path in whole if damaged and path.suffix in (".int32", ".safetensors")]
    for path in to_flip:
        path.write_bytes(flip_bit(whole[path], rng))
    if not damaged:
        shutil.rmtree(own_cache)
    arguments = {"data": options.data, "vectors": options.vectors, **SIZES}
    program = [sys.executable, "-c", LOAD, str(arguments)]
    both = [subprocess.Popen(program, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = "".join(process.communicate(timeout=60)[1] for process in both)
    assert [process.returncode for process in both] == [0, 0], errors
    assert errors.count("\n") == errors.count("; making it again\n") == len(to_flip)
    assert files_of(own_cache) == whole


def test_plan_removed_by_another_process_is_drawn_again(
    options: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = load_data(options, lambda line: None).train
    expected = train.plan(0)
    monkeypatch.setattr(batches, "cached", lambda *_: tmp_path / "gone")
    np.testing.assert_array_equal(train.plan(0), expected)


def test_full_disk_is_one_error_line_and_leaves_no_partial_entry(
    options: TrainConfig, own_cache: Path, command: Command
) -> None:
    """The last byte of each file of the cache does not fit."""
    expected, before = contents(options), resource.getrlimit(resource.RLIMIT_FSIZE)
    for path, content in files_of(own_cache).items():
        if not path.exists():
            contents(options)
        shutil.rmtree(path.parent)
        others = set(own_cache.iterdir())
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) - 1, before[1]))
        try:
            status, _, error = command(exit_on_input_error()(partial(contents, options)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        problem = "cannot write the cache (File too large)"
        assert (status, error) == (2, f"error: {own_cache}: {problem}; {ANOTHER}")
        assert set(own_cache.iterdir()) == others
    assert contents(options) == expected


@pytest.mark.usefixtures("unprivileged")
def test_read_only_cache_is_read_but_not_repaired(
    options: TrainConfig, own_cache: Path, command: Command
) -> None:
    def contents_error() -> str:
        error = refused(command(exit_on_input_error()(partial(contents, options))))
        line = f"{own_cache}: cannot write the cache (Permission denied); {ANOTHER}"
        assert error.endswith(line)
        return error.removesuffix(line)

    expected, folders = contents(options), [*own_cache.iterdir(), own_cache]
    for folder in folders:
        folder.chmod(0o500)
    assert contents(options) == expected
    (damaged,) = own_cache.glob("corpus-*/test.labels.npy")
    whole = damaged.read_bytes()
    damaged.write_bytes(flip_bit(whole, np.random.default_rng(0)))
    assert contents_error() == f"error: {damaged}: damaged (its checksum is not that in key.json); "
    damaged.write_bytes(whole)
    options = dataclasses.replace(options, validation_size=13)
    assert contents_error() == "error: "
    for folder in folders:
        folder.chmod(0o700)


@pytest.mark.usefixtures("unprivileged")
@pytest.mark.parametrize(
    ("parent", "problem"),
    [("reviews.jsonl", "Not a directory"), ("no rights", "Permission denied")],
)
def test_cache_folder_that_cannot_be_made_is_one_error_line(
    parent: str,
    problem: str,
    options: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Command,
) -> None:
    (tmp_path / "no rights").mkdir(0o000)
    cache = tmp_path / parent / "cache"
    monkeypatch.setenv("GRU_TWINS_CACHE", str(cache))
    error = refused(train(options, tmp_path / "run", command))
    assert error == f"error: {cache}: cannot write the cache ({problem}); {ANOTHER}"
