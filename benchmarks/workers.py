"""What workers gain: tokens a second of trainings on IMDB, in turns, as a Markdown table.

python -m benchmarks.workers        ten minutes on two cores
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import NamedTuple

import tyro

ROOT = Path(__file__).parents[1]
TRAINING = ["--data", "imdb", "--train-size", "6000", "--test-size", "100", "--epochs", "5"]


class Setting(NamedTuple):
    """How many workers with how many cores each, and how many reviews a batch has."""

    workers: int
    cores: int
    batch_size: int


ONE = Setting(1, 1, 128)
SETTINGS = [
    ONE,
    Setting(2, 1, 256),
    Setting(1, 1, 256),
    Setting(1, 2, 256),
    Setting(1, 2, 32),
    Setting(2, 1, 32),
]


def tokens_per_second(framework: str, setting: Setting, out: Path) -> float:
    """The median over the epochs but for the first two."""
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
    return median(line["tokens_per_second"] for line in lines[2:])


def main(repetitions: int = 3) -> None:
    """Print how fast each setting is.

    repetitions: of each setting; the settings take turns.
    """
    found: dict[tuple[str, Setting], list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for _ in range(repetitions):
            for framework in ("torch", "jax"):
                for setting in SETTINGS:
                    speed = tokens_per_second(framework, setting, Path(name))
                    found.setdefault((framework, setting), []).append(speed)
                    print(f"{framework} {setting}: {speed:,.0f} tokens/s", file=sys.stderr)
    print("| workers | cores of each | batch | PyTorch, tokens/s | | JAX, tokens/s | |")
    print("|---|---|---|---|---|---|---|")
    for setting in SETTINGS:
        cells = [str(number) for number in setting]
        for framework in ("torch", "jax"):
            speed, one = (median(found[framework, each]) for each in (setting, ONE))
            cells += [f"{speed:,.0f}", f"{speed / one:.2f} x"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    tyro.cli(main)
