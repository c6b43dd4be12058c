"""The duration of a training on a busy machine, and what the countermeasures cost on an idle one.

Trains an epoch of the preset quick in PyTorch while other programs run endless loops: with the
project's program, on one thread, and in a program that imports PyTorch first, whose threads
therefore spin while they wait. Prints the seconds of training.
"""

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from tyro.conf import Positional

from benchmarks.timing import medians
from tools.program import run_program

ROOT = Path(__file__).parents[1]
OTHER_PROGRAM = (
    "import torch; torch.set_flush_denormal(True); from common.training import loop; "
    "from torch_impl import learner; loop.main(learner)"
)
VARIANTS = {
    "python -m torch_impl.train": (["-m", "torch_impl.train"], {}),
    "on one thread": (["-m", "torch_impl.train"], {"OMP_NUM_THREADS": "1"}),
    "inside another program": (["-c", OTHER_PROGRAM], {}),
}


def train_seconds(arguments: list[str], environment: dict[str, str], model: str) -> float:
    """The duration of a training in a child process."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, *arguments, "--model", model, "--epochs", "1", "--out", folder],
            check=True,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
        )
        return json.loads(Path(folder, "metrics.json").read_text())["train_seconds"]


def main(programs: Positional[int] = 4, models: Positional[tuple[str, ...]] = ("gru",)) -> None:
    """Measure and print.

    Args:
        programs: The number of other programs.
        models: The models to train.
    """
    command = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in range(programs)]
    try:
        for model in models:
            trainings = {
                name: partial(train_seconds, *each, model) for name, each in VARIANTS.items()
            }
            seconds = (f"{name} {each:.1f}" for name, each in medians(trainings, 3).items())
            print(f"{model}, {programs} other programs: {', '.join(seconds)}", flush=True)
    finally:
        for other in others:
            other.kill()


if __name__ == "__main__":
    run_program(main)
