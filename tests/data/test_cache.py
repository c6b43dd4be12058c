"""The cache: whole, verified, made by one of several processes, on a disk that may fail."""

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
from tests.training.cases import Command, train_torch
from tests.training.cases import refused as refused_line

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
    """A training whose data take every kind of cache."""
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
    """All that a training reads of its data."""
    data = load_data(options, lambda line: None)
    assert data.ratios and data.validation
    found: list[object] = [data.name, data.classes, data.categories, data.vectors.words]
    found += [data.vectors.matrix.tobytes()]
    found += [each.tobytes() for each in data.ratios.tensors().values()]
    for part in (data.train, data.test, data.validation):
        for batch in part.epoch():
            found += [np.asarray(value).tobytes() for value in vars(batch).values()]
        assert part.split.categories is not None
        found.append(part.split.categories.tobytes())
    return found


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def flipped(content: bytes, rng: np.random.Generator) -> bytes:
    """With one bit flipped, anywhere."""
    changed = bytearray(content)
    changed[rng.integers(len(content))] ^= 1 << rng.integers(8)
    return bytes(changed)


def fill(folder: Path) -> None:
    (folder / "content").write_text("new")


@pytest.mark.parametrize("damage", ["cut content", "cut key.json", "remove content"])
def test_what_was_cut_short_is_made_anew(damage: str) -> None:
    how, _, name = damage.partition(" ")
    damaged = cached("kind", {}, fill) / name
    whole = damaged.read_bytes()
    cached("kind", {}, lambda folder: pytest.fail("filled again"))
    damaged.unlink() if how == "remove" else os.truncate(damaged, len(whole) // 2)
    assert cached("kind", {}, fill) == damaged.parent
    assert damaged.read_bytes() == whole


def test_folders_that_were_exchanged_are_made_anew(capsys: pytest.CaptureFixture[str]) -> None:
    def fill_with(content: str) -> Path:
        return cached("kind", {"of": content}, lambda to: (to / "content").write_text(content))

    one, other = fill_with("one"), fill_with("other")
    for source, target in ((one, "aside"), (other, one), (one.with_name("aside"), other)):
        source.rename(one.with_name(target) if isinstance(target, str) else target)
    assert (fill_with("one") / "content").read_text() == "one"
    assert (fill_with("other") / "content").read_text() == "other"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("describes another folder's content" in line for line in said)


def test_a_file_that_is_none_of_the_cache_s_is_not_read(
    options: TrainConfig, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = contents(options)
    (folder,) = own_cache.glob("corpus-*")
    labels = np.load(folder / "train.labels.npy")
    np.save(folder / "train.labels.7.npy", 1 - labels)
    assert contents(options) == wanted
    (said,) = capsys.readouterr().err.splitlines()
    assert "train.labels.7.npy: is not a file of the cache; making it anew" in said


def test_a_flipped_bit_in_any_file_is_noticed_and_the_file_made_anew(
    options: TrainConfig, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    expected, whole = contents(options), files_of(own_cache)
    kinds = {path.parent.name.partition("-")[0] for path in whole}
    assert kinds == {"corpus", "counts", "tokens", "vectors", "ratios", "plan"}
    for path, content in whole.items():
        path.write_bytes(flipped(content, rng))
        assert contents(options) == expected
        error = capsys.readouterr().err
        assert error.startswith(f"{path}: damaged") and error.endswith("; making it anew\n")
        assert error.count("\n") == 1
        assert files_of(own_cache) == whole


def test_a_large_file_is_verified_as_it_is_read(
    options: TrainConfig, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "WHOLE", 0)
    monkeypatch.setattr(cache, "BLOCK", mmap.PAGESIZE)
    rng = np.random.default_rng(0)
    expected, whole = contents(options), files_of(own_cache)
    noticed = set()
    for path in [path for path in whole if path.suffix in (".int32", ".float32")]:
        for _ in range(8):
            path.write_bytes(flipped(whole[path], rng))
            try:
                assert contents(options) == expected  # of texts that are not read
            except InputError as error:
                noticed.add(path.parent)
                assert str(error).startswith(f"{path}: damaged")
                assert "the same command makes it anew" in str(error)
                assert not path.parent.exists()
                assert contents(options) == expected
            path.write_bytes(whole[path])
    # Once words have the numbers of the vectors, only the example is read as it was encoded.
    kinds = sorted(folder.name.partition("-")[0] for folder in noticed)
    assert [kind for kind in kinds if kind != "corpus"] == ["ratios", "tokens", "tokens", "tokens"]


def test_training_on_a_damaged_cache_gives_the_same_model(
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
            path.write_bytes(flipped(path.read_bytes(), rng))
    assert models[0] == models[1]
    assert error.count("\n") == error.count("; making it anew\n") == 3


def train(options: TrainConfig, out: Path, command: Command) -> tuple[int, str, str]:
    names = ("data", "vectors", *SIZES)
    given = [w for n in names for w in (f"--{n.replace('_', '-')}", getattr(options, n))]
    return command(train_torch, *given, "--out", out)


def test_of_two_that_want_the_same_one_fills_the_cache() -> None:
    begun, going_on = Event(), Event()

    def slow(folder: Path) -> None:
        begun.set()
        assert going_on.wait(10)
        (folder / "content").write_text("of the first")

    with ThreadPoolExecutor() as threads:
        first = threads.submit(cached, "kind", {}, slow)
        assert begun.wait(10)
        second = threads.submit(cached, "kind", {}, lambda folder: pytest.fail("filled again"))
        assert not wait([second], 0.2).done
        going_on.set()
        assert first.result() == second.result()
    assert (first.result() / "content").read_text() == "of the first"
    assert len(list(cache_folder().iterdir())) == 1


def test_where_the_first_fails_one_of_the_others_fills_the_cache() -> None:
    """The second has waited for the first; the third comes after the first has gone."""
    steps = {name: Event() for name in ("begun", "fail", "second begun", "go on")}

    def fails(folder: Path) -> None:
        steps["begun"].set()
        assert steps["fail"].wait(10)
        raise ZeroDivisionError

    def slow(folder: Path) -> None:
        steps["second begun"].set()
        assert steps["go on"].wait(10)
        fill(folder)

    with ThreadPoolExecutor() as threads:
        first = threads.submit(cached, "kind", {}, fails)
        assert steps["begun"].wait(10)
        second = threads.submit(cached, "kind", {}, slow)
        assert not wait([second], 0.2).done
        steps["fail"].set()
        assert steps["second begun"].wait(10)
        third = threads.submit(cached, "kind", {}, lambda folder: pytest.fail("filled again"))
        assert not wait([third], 0.2).done
        steps["go on"].set()
        assert second.result() == third.result()
    assert isinstance(first.exception(), ZeroDivisionError)
    assert len(list(cache_folder().iterdir())) == 1


@pytest.mark.parametrize("damaged", [False, True])
def test_two_processes_make_one_cache_at_once(
    damaged: bool, options: TrainConfig, own_cache: Path
) -> None:
    contents(options)
    rng, whole = np.random.default_rng(0), files_of(own_cache)
    to_flip = [path for path in whole if damaged and path.suffix in (".int32", ".safetensors")]
    for path in to_flip:
        path.write_bytes(flipped(whole[path], rng))
    if not damaged:
        shutil.rmtree(own_cache)
    asked = {"data": options.data, "vectors": options.vectors, **SIZES}
    program = [sys.executable, "-c", LOAD, str(asked)]
    both = [subprocess.Popen(program, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = "".join(process.communicate(timeout=60)[1] for process in both)
    assert [process.returncode for process in both] == [0, 0], said
    assert said.count("\n") == said.count("; making it anew\n") == len(to_flip)
    assert files_of(own_cache) == whole


def test_a_plan_that_another_process_has_removed_is_drawn_again(
    options: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = load_data(options, lambda line: None).train
    expected = train.plan(0)
    monkeypatch.setattr(batches, "cached", lambda *given: tmp_path / "gone")
    np.testing.assert_array_equal(train.plan(0), expected)


def test_a_full_disk_gets_one_clear_line_and_leaves_nothing_half_written(
    options: TrainConfig, own_cache: Path, command: Command
) -> None:
    """Of each file of the cache, the last byte does not fit."""
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
def test_a_cache_that_is_read_only_is_read_but_not_mended(
    options: TrainConfig, own_cache: Path, command: Command
) -> None:
    def refused() -> str:
        error = refused_line(command(exit_on_input_error()(partial(contents, options))))
        line = f"{own_cache}: cannot write the cache (Permission denied); {ANOTHER}"
        assert error.endswith(line)
        return error.removesuffix(line)

    expected, folders = contents(options), [*own_cache.iterdir(), own_cache]
    for folder in folders:
        folder.chmod(0o500)
    assert contents(options) == expected
    (damaged,) = own_cache.glob("corpus-*/test.labels.npy")
    whole = damaged.read_bytes()
    damaged.write_bytes(flipped(whole, np.random.default_rng(0)))
    assert refused() == f"error: {damaged}: damaged (its checksum is not that in key.json); "
    damaged.write_bytes(whole)
    options = dataclasses.replace(options, validation_size=13)
    assert refused() == "error: "
    for folder in folders:
        folder.chmod(0o700)


@pytest.mark.usefixtures("unprivileged")
@pytest.mark.parametrize(
    ("above", "problem"), [("reviews.jsonl", "Not a directory"), ("no rights", "Permission denied")]
)
def test_a_cache_in_no_folder_gets_one_clear_line(
    above: str,
    problem: str,
    options: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Command,
) -> None:
    (tmp_path / "no rights").mkdir(0o000)
    cache = tmp_path / above / "cache"
    monkeypatch.setenv("GRU_TWINS_CACHE", str(cache))
    error = refused_line(train(options, tmp_path / "run", command))
    assert error == f"error: {cache}: cannot write the cache ({problem}); {ANOTHER}"
