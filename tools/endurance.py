"""What training survives, as a table: kills, damaged files, a full disk, and what it costs.

python -m tools.endurance                        all of it, some 20 minutes on two cores
python -m tools.endurance --kills 20 --flips 50  shorter
python -m tools.endurance --help

Kills: a training run is killed (SIGKILL) at a random moment, started again, and its final
parameters compared, bit for bit, with those of a run that nobody killed. It writes a checkpoint
after every step, so that many a kill falls into the writing of one. The processes are forked from
one that has imported everything, which saves the seconds that an import takes.

Workers: the same of a training by two workers, of which one, drawn at random, is killed; the other
has to end by itself within ten seconds.

Damage: each file of the last of three checkpoints is cut short, has bits flipped, or is swapped for
that of the checkpoint before; loading has to notice and return the checkpoint before. The same for
the files of a finished run, which have to be refused.

Disk: training into a file system that fills up (a tmpfs, for root; else a limit on file sizes).

Cost: how long a checkpoint takes while training with the default options, and with word vectors
trained along, as a share of the default interval.
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
import tyro

from common import files
from common.errors import InputError
from common.training import checkpoint, loop, run_directory
from common.training.options import TrainConfig
from common.training.world import joined

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
# Kills go round these: both directions, the kernel and the framework's own steps, nn.GRU.
KINDS = {
    "torch": [("gru", "fused"), ("gru", "scan"), ("bigru", "fused"), ("nn.bigru", "auto")],
    "jax": [("gru", "fused"), ("gru", "scan"), ("bigru", "fused"), ("bigru", "scan")],
}


@dataclasses.dataclass(frozen=True)
class Endurance:
    """Kill, damage and starve training, and print what became of it as a Markdown table."""

    frameworks: tuple[str, ...] = tuple(KINDS)
    """Those to be killed."""
    kills: int = 200
    """Kills in each framework."""
    workers: int = 20
    """Kills in each framework of one of two workers."""
    cuts: int = 50
    """Places at which each file is cut short."""
    flips: int = 500
    """Random bit flips in a checkpoint, and as many in a finished run."""
    seed: int = 0
    """Of the moments, places and bits."""


def main() -> None:
    """Run everything; exit status 1 where something was lost."""
    options = tyro.cli(Endurance, description=__doc__)
    rng = random.Random(options.seed)
    failed = False
    print("| what | how often | outcome |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for what, count, outcome, good in rows(options, rng, work):
            failed |= not good
            print(f"| {what} | {count} | {'' if good else '**FAILED** '}{outcome} |", flush=True)
    raise SystemExit(failed)


def rows(
    options: Endurance, rng: random.Random, work: Path
) -> Iterator[tuple[str, int, str, bool]]:
    """The lines of the table: what, how often, outcome, whether that is as it should be."""
    for framework in options.frameworks:
        same, halves, ends, _ = kill_many(framework, options.kills, rng, work / framework)
        yield (
            f"{framework}: killed, started again",
            options.kills,
            f"{same} ended with the very numbers of the run nobody killed; {halves} kills left a "
            f"half-written checkpoint, {ends} came after the last step",
            same == options.kills,
        )
        same, *_, longest = kill_many(framework, options.workers, rng, work / framework, workers=2)
        yield (
            f"{framework}: one of two workers killed, both started again",
            options.workers,
            f"{same} ended with the very numbers of the run nobody killed; the other one was gone "
            f"{longest:.1f} s after it at the latest",
            same == options.workers and longest < 10,
        )
    run = work / "run"
    train("torch", TINY, run)
    for what, count, missed in damage(run, options, rng):
        yield what, count, f"{count - missed} noticed", missed == 0
    yield "the disk fills up while training", 1, *full_disk(work)
    for what, vectors in (("default options", "word2vec"), ("random:300", "random:300")):
        count, seconds, share = cost(work / what, vectors)
        yield (
            f"time for a checkpoint, {what}",
            count,
            f"{seconds * 1e3:.0f} ms, {share:.2%} of the default interval",
            share < 0.02,
        )


def train(framework: str, options: TrainConfig, out: Path) -> dict[str, Any]:
    """A training run in this process, its lines dropped."""
    twin = import_module(f"{framework}_impl.learner")
    with contextlib.redirect_stdout(io.StringIO()):
        return loop.train(twin, dataclasses.replace(options, out=out))


def _run(framework: str, options: TrainConfig, out: Path, launched: Mapping[str, str]) -> None:
    """The same in a forked process; launched: what a launcher tells a worker."""
    os.environ.update(launched)
    quiet(framework, out.parent / "compiled")
    twin = import_module(f"{framework}_impl.learner")
    with joined(twin) as world:
        loop.train(twin, dataclasses.replace(options, out=out), world)


def quiet(framework: str, compiled: Path) -> None:
    """Let a forked process print and draw nothing, and compile nothing that is in that folder."""
    run_directory.draw = lambda folder, program=(): True  # takes longer than the training
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if framework == "torch":
        import torch

        torch.set_num_threads(1)
    else:  # it would spend most of each run on compiling the same again
        import jax

        jax.config.update("jax_disable_most_optimizations", True)
        jax.config.update("jax_compilation_cache_dir", str(compiled))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def forkserver() -> Any:
    """Where processes are forked from one that has imported everything and computed nothing."""
    context: Any = multiprocessing.get_context("forkserver")
    slow = ["altair", "sklearn.metrics", "scipy.stats", "scipy.special", "torch._dynamo"]
    context.set_forkserver_preload(["torch_impl.learner", "jax_impl.learner", __name__, *slow])
    return context


def launch(count: int) -> list[dict[str, str]]:
    """What torchrun would tell each of so many workers."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    size = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    ranks = [{**size, "RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    told = [{name: str(number) for name, number in about.items()} for about in ranks]
    return [{**about, "MASTER_ADDR": "localhost"} for about in told]


def start(context: Any, framework: str, options: TrainConfig, out: Path, count: int) -> list[Any]:
    """A training by so many workers, each a process, that has come as far as its first step."""
    processes = []
    for launched in launch(count):
        given = framework, options, out, launched
        processes.append(context.Process(target=_run, args=given))
        processes[-1].start()
    while not (out / "log.jsonl").exists() and all(each.is_alive() for each in processes):
        time.sleep(0.001)
    return processes


def kill_many(
    framework: str, kills: int, rng: random.Random, work: Path, workers: int = 1
) -> tuple[int, int, int, float]:
    """Kill one of the workers of so many trainings and start all of them again.

    Returns how many trainings ended as if nothing had happened; how many kills left a half-written
    checkpoint; how many came when all was trained and only the end of the run was missing; and how
    many seconds the other workers lived on at most.
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
        for _ in range(min(kills, 2)):  # the first warms up, which is not worth it for one kill
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
        if victim.exitcode == 0:  # it was done before
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
    """What has to be the same: the parameters kept, the last checkpoint's, every step's loss."""
    last = checkpoint.newest(run, warn=print)
    assert last is not None
    steps = [line.split(b'"step_losses": ')[1] for line in last.log.splitlines()]
    tensors = [(last.path / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")]
    return (
        (run / "model.safetensors").read_bytes(),
        b"".join(tensors + steps),
        [line.loss for line in last.lines()],
    )


def damage(run: Path, options: Endurance, rng: random.Random) -> Iterator[tuple[str, int, int]]:
    """What was done to the files of a run, how often, and how often nobody noticed."""
    newest = checkpoint.last(run)
    assert newest is not None
    before = sorted((run / "checkpoints").iterdir())[-2]

    def goes_back(path: Path) -> bool:
        """Loading warns of this checkpoint and returns the one before, as it was."""
        warnings: list[str] = []
        loaded = checkpoint.newest(run, warnings.append)
        return loaded is not None and loaded.path == before and str(newest) in warnings[0]

    def refuses(path: Path) -> bool:
        try:
            run_directory.load_run(run)
        except InputError as error:
            return str(run) in str(error)
        return False

    for what, folder, names, notices in (
        ("checkpoint", newest, sorted(path.name for path in newest.iterdir()), goes_back),
        ("finished run", run, [*run_directory.RUN_FILES, files.SUMS], refuses),
    ):
        cases = []
        for name in names:
            content = (folder / name).read_bytes()
            sizes = range(len(content))
            places = rng.sample(sizes, min(options.cuts, len(content)))
            cases += [(folder / name, content[:place]) for place in places]
        yield f"{what}: a file cut short", len(cases), missed(cases, notices)
        cases = []
        for _ in range(options.flips):
            path = folder / rng.choice(names)
            content = bytearray(path.read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            cases.append((path, bytes(content)))
        yield f"{what}: a bit flipped", len(cases), missed(cases, notices)
        others = before if folder == newest else newest
        cases = [
            (folder / name, (others / name).read_bytes())
            for name in names
            if (others / name).exists()
            and (others / name).read_bytes() != (folder / name).read_bytes()
        ]
        yield f"{what}: a file of another checkpoint", len(cases), missed(cases, notices)


def missed(cases: list[tuple[Path, bytes]], notices: Callable[[Path], bool]) -> int:
    """How many of the damages, each done and undone, go unnoticed."""
    count = 0
    for path, content in cases:
        right = path.read_bytes()
        path.write_bytes(content)
        count += not notices(path)
        path.write_bytes(right)
    return count


def full_disk(work: Path) -> tuple[str, bool]:
    """Train until the disk is full; what happened, and whether that is as it should be."""
    with little_space(work / "small") as (folder, how):
        out = folder / "run"
        endless = dataclasses.replace(TINY, epochs=10_000, keep=10_000, log_every=1)
        try:
            train("torch", endless, out)
        except InputError as error:
            reason = str(error).replace(str(folder), "")
        else:
            return f"{how}: nothing", False
        loaded = checkpoint.newest(out, warn=lambda line: None)
        good = loaded is not None and loaded.path == checkpoint.last(out)
        return f"{how}: `{reason}`, which loads", good and "cannot be written" in reason


@contextlib.contextmanager
def little_space(folder: Path) -> Iterator[tuple[Path, str]]:
    """A folder in which the space runs out, and how that is done."""
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
    """Checkpoints written while training, the seconds that one takes, its share of the interval."""
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
    main()
