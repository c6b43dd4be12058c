"""What a training takes on a busy machine, and what that costs on a quiet one.

    python -m benchmarks.busy [PROGRAMS] [MODEL ...]

Trains an epoch of the preset quick in PyTorch, beside so many programs (4) that do nothing but
count: as it is, on one thread, and as a program of somebody else's would that imports PyTorch
first, whose threads spin. Prints seconds of training, medians of three that take turns.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
OTHERS = (
    "import torch; torch.set_flush_denormal(True); from common.training import loop; "
    "from torch_impl import learner; loop.main(learner)"
)
WAYS = {
    "python -m torch_impl.train": (["-m", "torch_impl.train"], {}),
    "on one thread": (["-m", "torch_impl.train"], {"OMP_NUM_THREADS": "1"}),
    "in another's program": (["-c", OTHERS], {}),
}


def seconds(arguments: list[str], environment: dict[str, str], model: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, *arguments, "--model", model, "--epochs", "1", "--out", folder],
            check=True,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
        )
        return json.loads(Path(folder, "metrics.json").read_text())["train_seconds"]


def main() -> None:
    programs = int(sys.argv[1]) if sys.argv[1:] else 4
    count = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(count) for _ in range(programs)]
    try:
        for model in sys.argv[2:] or ["gru"]:
            taken: dict[str, list[float]] = {name: [] for name in WAYS}
            for _ in range(3):
                for name, way in WAYS.items():
                    taken[name].append(seconds(*way, model))
            found = (f"{name} {statistics.median(each):.1f}" for name, each in taken.items())
            print(f"{model} beside {programs} programs: {', '.join(found)}", flush=True)
    finally:
        for other in others:
            other.kill()


if __name__ == "__main__":
    main()
