"""The speed of training on IMDB with one and with two workers, in tokens per second."""

import json
import subprocess
import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.timing import medians
from tools.program import print_header, print_row, run_program

ROOT = Path(__file__).parents[1]
TRAINING = ["--data", "imdb", "--train-size", "6000", "--test-size", "100", "--epochs", "5"]


class Setting(NamedTuple):
    """The number of workers, the number of cores of each, and the batch size."""

    workers: int
    cores: int
    batch_size: int


SETTINGS = [
    Setting(1, 1, 128),
    Setting(2, 1, 256),
    Setting(1, 1, 256),
    Setting(1, 2, 256),
    Setting(1, 2, 32),
    Setting(2, 1, 32),
]


def tokens_per_second(framework: str, setting: Setting, out: Path) -> float:
    """The median over the epochs without the first two."""
    command = [sys.executable, "-m"]
    if setting.workers > 1:
        command += ["torch.distributed.run", "--nproc-per-node", str(setting.workers), "-m"]
    last = setting.workers * setting.cores - 1
    options = ["--batch-size", setting.batch_size, "--log-every", 10_000, "--out", out, "--restart"]
    subprocess.run(
        ["taskset", "-c", f"0-{last}", *command, f"{framework}_impl.train", *TRAINING]
        + [str(option) for option in options],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    speed = median(line["tokens_per_second"] for line in lines[2:])
    print(f"{framework} {setting}: {speed:,.0f} tokens/s", file=sys.stderr)
    return speed


def main(repetitions: int = 3) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainings = {
            key: partial(tokens_per_second, *key, Path(folder))
            for key in product(("torch", "jax"), SETTINGS)
        }
        speeds = medians(trainings, repetitions)
    columns = ("PyTorch, tokens/s", "speed-up", "JAX, tokens/s", "speed-up")
    print_header("workers", "cores of each", "batch", *columns)
    for setting in SETTINGS:
        cells = []
        for framework in ("torch", "jax"):
            speed = speeds[framework, setting]
            cells += [f"{speed:,.0f}", f"{speed / speeds[framework, SETTINGS[0]]:.2f} x"]
        print_row(*setting, *cells)


if __name__ == "__main__":
    run_program(main)
