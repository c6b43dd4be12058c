"""Training by several workers: real processes, which speak over gloo, started as torchrun would.

tools/endurance.py kills more of them.
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from common.data.batches import Batch, Batches
from common.data.corpus import EncodedSplit, join
from common.errors import LOST
from common.training import checkpoint, dropout, loop
from common.training.options import TrainConfig
from common.training.recipe import Recipe
from common.training.world import ALONE, World, joined
from tests import ROOT
from tools import endurance

FRAMEWORKS = ("torch", "jax")
D, V, B = 6, 40, 8
# Models, and whether their vectors are trained; each once, because XLA compiles for long.
MODELS = {
    "torch": [*product(("gru", "bigru", "nn.gru"), (False, True))],
    "jax": [("gru", False), ("bigru", True)],
}
RAGGED, SHORT, ONE = np.arange(B), np.array([8, 9, 10, *[-1] * 5]), np.array([11, *[-1] * 7])
TINY = dataclasses.replace(endurance.TINY, epochs=2, shares=4)
long = pytest.mark.long
each_framework = pytest.mark.parametrize("name", FRAMEWORKS)


def split() -> EncodedSplit:
    """Reviews of 0 to 9 words, the longest of a batch first.

    Each share but the empty ones has 9 steps, because XLA compiles anew for every shape.
    """
    rng = np.random.default_rng(0)
    lengths = [9, 9, 9, 9, 4, 3, 1, 0, 9, 9, 9, 9]
    return join([rng.integers(0, V, n) for n in lengths], rng.integers(0, 3, len(lengths)))


def gradients(name: str, world: World, shares: int) -> dict[str, np.ndarray]:
    """Loss and gradients in float64 of batches that are divided into shares."""
    framework = import_module(f"{name}_impl.learner")
    batches = Batches(split(), B, shares=shares)
    vectors = np.random.default_rng(1).standard_normal((V, D))
    recipe = Recipe(class_weights=(1.0, 2.0, 0.5))
    result = {}
    for model, trained in MODELS[name]:
        options = TrainConfig(model=model, hidden_size=5, shares=shares)
        config = options.model_config((V, D), 3, trained)
        arguments = config, options, vectors
        learner = framework.Learner(*arguments, dtype="float64", recipe=recipe, world=world)
        for rows in (RAGGED, SHORT, ONE):
            mine = [batches.share(rows, k) for k in world.shares(shares)]
            loss, values = learner.gradients(*mine)
            about = f"{model} {trained} {len(rows[rows >= 0])}"
            result |= {f"{about} {of}": value for of, value in values.items()}
            result[f"{about} loss"] = np.array(loss)
    return result


@cache
def whole(name: str) -> dict[str, np.ndarray]:
    """The loss and gradients of one worker for undivided batches."""
    with jax.enable_x64(True):
        return gradients(name, ALONE, 1)


def assert_near(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(float(np.abs(value).max()), 1.0)
        assert np.abs(found[name] - value).max() <= 1e-12 * scale, name


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        pytest.param(*each, marks=() if each == ("torch", 8) else long)
        for each in product(FRAMEWORKS, (2, 4, 8))
    ],
)
def test_gradients_of_shares_sum_to_that_of_the_batch(name: str, shares: int, x64: None) -> None:
    assert_near(gradients(name, ALONE, shares), whole(name))


def worker(name: str, out: Path, launched: dict[str, str], shares: int, devices: int) -> None:
    """Train, in JAX on this number of devices, and write the gradients."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    os.environ.update(launched, XLA_FLAGS=flags)
    endurance.quiet(name, out.parents[1] / "compiled")
    framework = import_module(f"{name}_impl.learner")
    with joined(framework) as world:
        assert name == "torch" or len(jax.local_devices()) == devices
        with jax.enable_x64(True):
            np.savez(out / f"{world.rank}.npz", **gradients(name, world, shares))
        loop.train(framework, dataclasses.replace(TINY, out=out / "run"), world)


def start(target: Callable[..., None], name: str, out: Path, count: int, *more: Any) -> list[Any]:
    out.mkdir(exist_ok=True)
    launched = endurance.launch(count)
    started = [
        endurance.forkserver().Process(target=target, args=(name, out, each, *more))
        for each in launched
    ]
    for process in started:
        process.start()
    return started


def end(processes: list[Any]) -> list[int]:
    for process in processes:
        process.join(100)
    return [process.exitcode for process in processes]


def log(run: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl without the times."""
    timed = ("seconds", "tokens_per_second")
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [{key: line[key] for key in line if key not in timed} for line in lines]


def train_alone(name: str, out: Path, launched: dict[str, str]) -> None:
    """A single worker imports nothing distributed, unless --shares is given."""
    training(name, out / "plain", launched, dataclasses.replace(TINY, shares=None, epochs=1))
    assert f"{name}_impl.world" not in sys.modules
    training(name, out / "run", launched, TINY)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("torch", 2),
        pytest.param("torch", 4, marks=long),
        pytest.param("jax", 1, marks=long),
        pytest.param("jax", 2, marks=long),
    ],
)
def test_workers_write_the_files_of_one_worker(name: str, count: int, tmp_path: Path) -> None:
    devices = 2 if name == "jax" else 1
    many = start(worker, name, tmp_path / "many", count, devices * count, devices)
    alone = start(train_alone, name, tmp_path / "alone", 1)
    assert end(many + alone) == [0] * (count + 1)
    for rank in range(count):
        with np.load(tmp_path / "many" / f"{rank}.npz") as result:
            assert_near(dict(result), whole(name))
    one, other = (tmp_path / folder / "run" for folder in ("alone", "many"))
    for file in ("model.safetensors", "vectors.safetensors", "vocabulary.txt"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
    assert log(one) == log(other)


def training(name: str, out: Path, launched: dict[str, str], options: TrainConfig) -> None:
    """Train as `python -m torch_impl.train`, without output."""
    os.environ.update(launched)
    endurance.quiet(name, out.parents[1] / "compiled")
    framework = import_module(f"{name}_impl.learner")
    with joined(framework) as world:
        loop.train(framework, dataclasses.replace(options, out=out), world)


@pytest.mark.parametrize(("name", "others"), [("torch", 3), pytest.param("jax", 1, marks=long)])
def test_workers_stop_at_one_step_and_another_number_continues(
    name: str, others: int, tmp_path: Path
) -> None:
    out, endless = tmp_path / "run", dataclasses.replace(TINY, epochs=1000)
    processes = start(training, name, out, 2, endless)
    while not (last := checkpoint.last(out)) or int(last.name) < 3:
        time.sleep(0.01)
        assert all(process.is_alive() for process in processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert end(processes) == [143, 143]
    last = checkpoint.last(out)
    assert last is not None
    stopped = checkpoint.load_checkpoint(last).state
    rest = dataclasses.replace(TINY, epochs=stopped.epoch + 1, shares=None)
    assert end(start(training, name, out, others, rest)) == [0] * others
    endurance.train(name, dataclasses.replace(rest, shares=4), tmp_path / "other")
    runs = [run / "model.safetensors" for run in (out, tmp_path / "other")]
    assert runs[0].read_bytes() == runs[1].read_bytes()


@pytest.mark.parametrize("name", ["torch", pytest.param("jax", marks=long)])
def test_killed_worker_ends_the_other(name: str, tmp_path: Path) -> None:
    same, *_, longest = endurance.kill_many(name, 1, random.Random(0), tmp_path, workers=2)
    assert same == 1
    assert longest < 10


@long  # a killed worker and a resumed training: test_killed_worker_ends_the_other
def test_torchrun_restarts_all_workers(tmp_path: Path) -> None:
    """--restart deletes the run only at the first start."""
    sizes = ["--data", "rt", "--vectors", "random:8", "--train-size", "64", "--test-size", "16"]
    sizes += ["--max-length", "2", "--batch-size", "8", "--hidden-size", "8", "--epochs", "8"]
    sizes += ["--checkpoint-seconds", "0", "--shares", "2", "--restart"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--master-port", endurance.launch(1)[0]["MASTER_PORT"], "--max-restarts", "1"]
    program = ["-m", "torch_impl.train", *sizes, "--out"]
    with subprocess.Popen(
        [*torchrun, *program, str(tmp_path / "killed")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not (last := checkpoint.last(tmp_path / "killed")) or int(last.name) < 20:
            time.sleep(0.01)
            assert process.poll() is None
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [
            child
            for child in children
            if b"torch_impl.train" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]
        assert len(workers) == 2
        os.kill(int(workers[1]), signal.SIGKILL)
        output, error = process.communicate(timeout=100)
    assert process.returncode == 0, error
    assert error.count("error: ") == 1
    assert "error: another worker was lost; the same command resumes" in error
    assert "resuming after step" in output
    assert output.count("Accuracy") == 1
    saved = checkpoint.newest(tmp_path / "killed", print)
    assert saved is not None
    alone = dataclasses.replace(saved.about.options, out=None)
    assert end(start(training, "torch", tmp_path / "alone", 1, alone)) == [0]
    runs = [tmp_path / run / "model.safetensors" for run in ("killed", "alone")]
    assert runs[0].read_bytes() == runs[1].read_bytes()


def wrong(name: str, out: Path, launched: dict[str, str], options: dict[str, Any]) -> None:
    """One worker has other options than the first."""
    own = options if launched["RANK"] == "1" else {}
    sys.stderr = (out / launched["RANK"]).open("w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    training(name, out / "run", launched, dataclasses.replace(TINY, **own))


@pytest.mark.parametrize(
    ("name", "options"), [("torch", {"seed": 7}), ("jax", {"data": "csv:/nowhere.csv"})]
)
def test_error_of_several_workers_is_printed_once(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert end(start(wrong, name, out, 2, options)) == [2, 2]
    output = [(out / str(rank)).read_text() for rank in range(2)]
    assert output == ["error: worker 1 has other options than the first\n", ""]
    assert not (out / "run").exists()


def broken(name: str, out: Path, launched: dict[str, str]) -> None:
    """The second worker raises an unexpected exception."""
    sys.stderr = (out / launched["RANK"]).open("w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)

    def step(*_: Any, **__: Any) -> None:
        raise KeyError("a fault")

    if launched["RANK"] == "1":
        import_module(f"{name}_impl.learner").Learner.step = step  # type: ignore[attr-defined]
    training(name, out / "run", launched, TINY)


@each_framework
def test_a_fault_in_one_ends_both(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert end(start(broken, name, out, 2)) == [LOST, 1]
    assert "KeyError: 'a fault'" in (out / "1").read_text()
    assert "error: another worker was lost" in (out / "0").read_text()


def test_too_few_shares(tmp_path: Path) -> None:
    framework = import_module("torch_impl.learner")
    options = dataclasses.replace(TINY, shares=1, out=tmp_path)
    with pytest.raises(ValueError, match="--shares 1: fewer than the 2 workers"):
        loop.Trainer(framework, options, tmp_path, None, World(0, 2))


def test_shares_have_their_own_dropout_masks() -> None:
    options = TrainConfig(word_dropout=0.5, shares=2)
    batches = Batches(split(), B, shares=2)
    config = options.model_config((V, D), 3, False)

    def words(batch: Batch) -> np.ndarray:
        return dropout.masks(config, options, batch, 3)["words"]

    first = batches.share(RAGGED, 0)
    other = dataclasses.replace(first, share=1)
    assert (words(first) != words(other)).any()
    assert (words(first) == words(dataclasses.replace(first))).all()
