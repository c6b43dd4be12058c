"""Kills trainings, damages their files and fills their disk; prints the outcomes as a table.

Kills: a training is killed (SIGKILL) at a random moment and restarted. Its final parameters must
equal, bit for bit, those of an uninterrupted training. Because it writes a checkpoint after every
step, many kills interrupt the writing of a checkpoint.

Workers: the same for one of two workers, drawn at random; the other worker must exit within ten
seconds.

Damage: a file of the last checkpoint is truncated, has a bit flipped, or is replaced by that of the
previous checkpoint. Loading must detect this and return the previous checkpoint. The damaged files
of a finished run must be rejected.

Disk: a training writes to a file system that fills up (as root a tmpfs, otherwise a limit on file
sizes).

Cost: the duration of a checkpoint, with the default options and with trained word vectors, relative
to the default interval.
"""

import contextlib
import dataclasses
import io
import multiprocessing
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from common import files
from common.errors import InputError
from common.training import checkpoint, loop, run_directory
from common.training.options import TrainConfig
from common.training.world import joined
from tools.program import print_header, print_row, run_program

TINY = TrainConfig(
    data="rt",
    vectors="random:8",
    train_size=64,
    test_size=16,
    validation_size=16,
    max_length=2,
    batch_size=8,
    hidden_size=8,
    epochs=5,
    log_every=4,
    clip_norm=0.05,
    device="cpu",
    checkpoint_seconds=0,
)
LAST = f"{5 * 6:09d}"  # the checkpoint after the last step
# The models and implementations of consecutive kills.
KINDS = {
    "torch": [("gru", "fused"), ("gru", "scan"), ("bigru", "fused"), ("nn.bigru", "auto")],
    "jax": [("gru", "fused"), ("gru", "scan"), ("bigru", "fused"), ("bigru", "scan")],
}


def main(
    frameworks: tuple[str, ...] = tuple(KINDS),
    kills: int = 200,
    workers: int = 20,
    cuts: int = 50,
    flips: int = 500,
    seed: int = 0,
) -> int:
    """Run everything; return exit status 1 if a check fails.

    Args:
        frameworks: The frameworks whose trainings are killed.
        kills: The number of kills in each framework.
        workers: The number of kills of one of two workers in each framework.
        cuts: The number of truncations of each file.
        flips: The number of bit flips in a checkpoint and in a finished run.
        seed: The seed of the moments, places and bits.
    """
    rng, failed = random.Random(seed), False

    def report(event: str, count: int, outcome: str, passed: bool) -> None:
        nonlocal failed
        failed |= not passed
        print_row(event, count, outcome if passed else f"**FAILED** {outcome}")

    print_header("event", "count", "outcome")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        equal = "ended with exactly the numbers of the uninterrupted run"
        for framework in frameworks:
            same, halves, ends, _ = kill_many(framework, kills, rng, work / framework)
            outcome = f"{same} {equal}; {halves} kills left a half-written checkpoint, "
            outcome += f"{ends} came after the last step"
            report(f"{framework}: run killed and restarted", kills, outcome, same == kills)
            same, *_, longest = kill_many(framework, workers, rng, work / framework, workers=2)
            event = f"{framework}: one of two workers killed, both restarted"
            outcome = f"{same} {equal}; the other worker exited within {longest:.1f} s"
            report(event, workers, outcome, same == workers and longest < 10)
        train("torch", TINY, work / "run")
        for event, count, missed in damage(work / "run", cuts, flips, rng):
            report(event, count, f"{count - missed} detected", missed == 0)
        report("disk full while training", 1, *full_disk(work))
        for kind, vectors in (("default options", "word2vec"), ("random:300", "random:300")):
            count, seconds, share = cost(work / kind, vectors)
            outcome = f"{seconds * 1e3:.0f} ms, {share:.2%} of the default interval"
            report(f"saving a checkpoint, {kind}", count, outcome, share < 0.02)
    return failed


def train(framework: str, options: TrainConfig, out: Path) -> dict[str, Any]:
    """Train in this process without output."""
    twin = import_module(f"{framework}_impl.learner")
    with contextlib.redirect_stdout(io.StringIO()):
        return loop.train(twin, dataclasses.replace(options, out=out))


def _run(framework: str, options: TrainConfig, out: Path, environment: Mapping[str, str]) -> None:
    """Train in a forked process; environment: the variables of `launch`."""
    os.environ.update(environment)
    quiet(framework, out.parent / "compiled")
    twin = import_module(f"{framework}_impl.learner")
    with joined(twin) as world:
        loop.train(twin, dataclasses.replace(options, out=out), world)


def quiet(framework: str, compiled: Path) -> None:
    """Disable the output and the figures of a forked process, and set its XLA cache folder."""
    run_directory.draw = lambda folder, program=(): True  # slower than the training
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if framework == "torch":
        import torch

        torch.set_num_threads(1)
    else:  # otherwise compilation would take most of each run
        import jax

        jax.config.update("jax_disable_most_optimizations", True)
        jax.config.update("jax_compilation_cache_dir", str(compiled))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def forkserver() -> Any:
    """The context that forks processes from one that has imported everything.

    This saves the seconds of the imports in each process.
    """
    context: Any = multiprocessing.get_context("forkserver")
    slow = ["altair", "sklearn.metrics", "scipy.stats", "scipy.special", "torch._dynamo"]
    context.set_forkserver_preload(["torch_impl.learner", "jax_impl.learner", __name__, *slow])
    return context


def launch(count: int) -> list[dict[str, str]]:
    """The environment variables that torchrun would set for each worker."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    size = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    ranks = [{**size, "RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    return [
        {"MASTER_ADDR": "localhost"} | {name: str(value) for name, value in each.items()}
        for each in ranks
    ]


def start(context: Any, framework: str, options: TrainConfig, out: Path, count: int) -> list[Any]:
    """Start the workers of a training, each a process, and wait for the first step."""
    processes = []
    for environment in launch(count):
        arguments = framework, options, out, environment
        processes.append(context.Process(target=_run, args=arguments))
        processes[-1].start()
    while not (out / "log.jsonl").exists() and all(each.is_alive() for each in processes):
        time.sleep(0.001)
    return processes


def kill_many(
    framework: str, kills: int, rng: random.Random, work: Path, workers: int = 1
) -> tuple[int, int, int, float]:
    """Kill one of the workers of a training and restart all of them, `kills` times.

    Returns the number of trainings with the outcome of an uninterrupted one, the number of kills
    that left a half-written checkpoint, the number of kills after the last step, and the longest
    time in seconds that other workers took to exit.
    """
    context, out = forkserver(), work / "killed"
    kinds = KINDS[framework] if workers == 1 else KINDS[framework][:1]
    expected, seconds = {}, {}
    same = halves = ends = killed = 0
    longest = 0.0

    def run(kind: tuple[str, str]) -> list[Any]:
        options = dataclasses.replace(TINY, model=kind[0], implementation=kind[1])
        return start(context, framework, options, out, workers)

    for kind in kinds[:kills]:
        for _ in range(min(kills, 2)):  # the first one is a warm-up, unnecessary for a single kill
            shutil.rmtree(out, ignore_errors=True)
            processes, began = run(kind), time.perf_counter()
            while processes[0].is_alive() and not (out / "checkpoints" / LAST).exists():
                time.sleep(0.001)
            seconds[kind] = time.perf_counter() - began
            for process in processes:
                process.join()
                assert process.exitcode == 0, f"{framework} {kind} does not train"
        expected[kind] = outcome(out)
    while killed < kills:
        shutil.rmtree(out)
        kind = kinds[killed % len(kinds)]
        victim, *others = rng.sample(run(kind), workers)
        victim.join(rng.uniform(0, seconds[kind]))
        victim.kill()
        victim.join()
        began = time.perf_counter()
        for other in others:
            other.join(30)
        if victim.exitcode == 0:  # it ended before the kill
            continue
        killed += 1
        longest = max(longest, time.perf_counter() - began)
        for other in others:
            other.kill()
        halves += (out / "checkpoints" / ".partial").exists()
        ends += (out / "checkpoints" / LAST).exists()
        for process in (again := run(kind)):
            process.join()
        same += all(each.exitcode == 0 for each in again) and outcome(out) == expected[kind]
    return same, halves, ends, longest


def outcome(run: Path) -> tuple[bytes, bytes, list[float]]:
    """The kept parameters, the tensors of the last checkpoint, and the losses of all steps."""
    last = checkpoint.newest(run, warn=print)
    assert last is not None
    steps = [line.split(b'"step_losses": ')[1] for line in last.log.splitlines()]
    tensors = [(last.path / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")]
    return (
        (run / "model.safetensors").read_bytes(),
        b"".join(tensors + steps),
        [line.loss for line in last.lines()],
    )


def damage(run: Path, cuts: int, flips: int, rng: random.Random) -> Iterator[tuple[str, int, int]]:
    """Damage the files of a run; yield the event, its count, and how often it was not detected."""
    newest = checkpoint.last(run)
    assert newest is not None
    before = sorted((run / "checkpoints").iterdir())[-2]

    def goes_back(path: Path) -> bool:
        """Whether loading warns of this checkpoint and returns the previous one."""
        warnings: list[str] = []
        loaded = checkpoint.newest(run, warnings.append)
        return loaded is not None and loaded.path == before and str(newest) in warnings[0]

    def rejects(path: Path) -> bool:
        """Whether loading raises an error that names the run."""
        try:
            run_directory.load_run(run)
        except InputError as error:
            return str(run) in str(error)
        return False

    for kind, folder, names, detects in (
        ("checkpoint", newest, sorted(path.name for path in newest.iterdir()), goes_back),
        ("finished run", run, [*run_directory.RUN_FILES, files.SUMS], rejects),
    ):
        cases = []
        for name in names:
            content = (folder / name).read_bytes()
            places = rng.sample(range(len(content)), min(cuts, len(content)))
            cases += [(folder / name, content[:place]) for place in places]
        yield f"{kind}: file truncated", len(cases), undetected(cases, detects)
        cases = []
        for _ in range(flips):
            path = folder / rng.choice(names)
            content = bytearray(path.read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            cases.append((path, bytes(content)))
        yield f"{kind}: bit flipped", len(cases), undetected(cases, detects)
        others = before if folder == newest else newest
        common = [name for name in names if (others / name).exists()]
        cases = [(folder / name, (others / name).read_bytes()) for name in common]
        cases = [(path, content) for path, content in cases if content != path.read_bytes()]
        event = f"{kind}: file replaced by that of another checkpoint"
        yield event, len(cases), undetected(cases, detects)


def undetected(cases: list[tuple[Path, bytes]], detects: Callable[[Path], bool]) -> int:
    """The number of damages that are not detected; each one is undone."""
    count = 0
    for path, content in cases:
        original = path.read_bytes()
        path.write_bytes(content)
        count += not detects(path)
        path.write_bytes(original)
    return count


def full_disk(work: Path) -> tuple[str, bool]:
    """Train until the disk is full; return the outcome and whether it is correct."""
    with small_disk(work / "small") as (folder, limit):
        out = folder / "run"
        endless = dataclasses.replace(TINY, epochs=10_000, keep=10_000, log_every=1)
        try:
            train("torch", endless, out)
        except InputError as error:
            reason = str(error).replace(str(folder), "")
        else:
            return f"{limit}: no error", False
        loaded = checkpoint.newest(out, warn=lambda line: None)
        loads = loaded is not None and loaded.path == checkpoint.last(out)
        outcome = f"{limit}: `{reason}`, which {'loads' if loads else 'does not load'}"
        return outcome, loads and "cannot be written" in reason


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[tuple[Path, str]]:
    """A folder of limited space, and the description of the limit."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if (
        os.geteuid() == 0
        and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    ):
        try:
            yield folder, "a tmpfs of 2 MiB"
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        yield folder, "files limited to 300 kB"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def cost(out: Path, vectors: str) -> tuple[int, float, float]:
    """The checkpoints of a training, their mean duration, and its share of the interval."""
    spent: list[float] = []
    save = loop.Trainer.save

    def timed(trainer: loop.Trainer) -> None:
        before, began = trainer.saved_step, time.perf_counter()
        save(trainer)
        if trainer.saved_step != before:
            spent.append(time.perf_counter() - began)

    options = TrainConfig(vectors=vectors, epochs=1, checkpoint_seconds=0.2)
    loop.Trainer.save = timed  # type: ignore[method-assign]
    try:
        train("torch", options, out)
    finally:
        loop.Trainer.save = save  # type: ignore[method-assign]
    seconds = float(np.mean(spent))
    return len(spent), seconds, seconds / TrainConfig().checkpoint_seconds


if __name__ == "__main__":
    run_program(main)
