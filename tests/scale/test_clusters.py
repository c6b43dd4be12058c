"""compare.py's trainings on other machines: Dask with two workers, and what Slurm is told.

The machines are this one. Dask is the real one; of Slurm there is a stub that runs the scripts.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from common.errors import InputError
from common.training import loop
from common.training.options import to_arguments
from comparison import processes, runs
from comparison.processes import Job, Place
from comparison.runs import Training
from tests import ROOT
from tools import endurance

LONG = dataclasses.replace(endurance.TINY, epochs=20, validation_size=0)


@pytest.fixture
def chosen(tmp_path: Path) -> Training:
    """What is to be trained elsewhere."""
    return Training.of("torch", "gru", LONG, tmp_path / "run", "elsewhere")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The parameters that it comes to here."""
    import torch_impl.learner

    out = tmp_path_factory.mktemp("here")
    loop.train(torch_impl.learner, dataclasses.replace(LONG, out=out))  # type: ignore[arg-type]
    return (out / "model.safetensors").read_bytes()


def train_and_disturb(chosen: Training, place: Place) -> list[str]:
    """Train it; in its third epoch, once, kill who runs it. What was printed."""
    lines: list[str] = []
    killed: list[int] = []

    def say(name: str, line: str) -> None:
        lines.append(line)
        if line.startswith("[epoch:3/") and not killed:
            killed.append(parent(running(chosen.folder)))
            os.kill(killed[0], signal.SIGKILL)

    runs.train([chosen], place, say, lambda name, run: lines.append(f"{name} ended"))
    assert killed
    assert [line for line in lines if "going on after step" in line], "it began anew"
    return lines


def running(out: Path) -> int:
    """The process that trains into this folder."""
    words = f"--out\0{out}\0".encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if words in (said := path.read_bytes()) and b"torch_impl.train" in said:
                return int(path.parent.name)
        except OSError:
            continue
    raise AssertionError(f"nothing trains into {out}")


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def test_dask_has_another_worker_go_on(
    chosen: Training,
    undisturbed: bytes,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import dask
    from distributed import LocalCluster

    with (
        LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address=None) as cluster,
        dask.config.set({"scheduler-address": cluster.scheduler_address}),
    ):

        def grow() -> None:  # once we have come; one of its clients is its own
            while len(cluster.scheduler.clients) < 2:
                time.sleep(0.05)
            cluster.scale(2)

        threading.Thread(target=grow, daemon=True).start()
        lines = train_and_disturb(chosen, Place("dask", folder=tmp_path))
    assert "has no workers yet: waiting for some" in capsys.readouterr().out
    assert [line for line in lines if line.endswith(" ended")] == ["elsewhere ended"]
    assert (chosen.folder / "model.safetensors").read_bytes() == undisturbed
    assert not list(tmp_path.glob(".jobs-*"))


SLURM = {
    # Runs the script, and again where it was "preempted"; tells what it was given.
    "sbatch": """
cp "$1" "$STUB/script"
id=$(ls "$STUB"/job-* 2> /dev/null | wc -l)
touch "$STUB/job-$id"
(
    export SLURM_JOB_ID=$id SLURM_JOB_NUM_NODES=1 SLURM_NTASKS=1 SLURM_NODEID=0 SLURM_PROCID=0
    export SLURM_LOCALID=0 SLURM_JOB_NODELIST=here
    while :; do
        bash "$1" > "$STUB/output" 2>&1
        [ -e "$STUB/requeue" ] || break
        rm "$STUB/requeue"
    done
    echo over > "$STUB/job-$id"
) > /dev/null 2>&1 &
echo "Submitted batch job $id"
""",
    "srun": "exit 1\n",
    "sacct": """
echo 'JobID|State|NodeList'
for job in "$STUB"/job-*; do
    state=RUNNING
    [ -s "$job" ] && state=COMPLETED
    echo "${job##*-}|$state|here"
done
""",
    "scancel": 'touch "$STUB/cancelled"\n',
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the stub of Slurm leaves."""
    stub = tmp_path / "slurm"
    stub.mkdir()
    for name, script in SLURM.items():
        (stub / name).write_text(f"#!/bin/bash\n{script}")
        (stub / name).chmod(0o755)
    monkeypatch.setenv("STUB", str(stub))
    monkeypatch.setenv("PATH", f"{stub}{os.pathsep}{os.environ['PATH']}")
    return stub


def test_slurm_gets_a_script_and_may_run_it_again(
    slurm: Path, chosen: Training, undisturbed: bytes, tmp_path: Path
) -> None:
    (slurm / "requeue").touch()
    place = Place("slurm", slurm=("partition=long", "cpus-per-task=2"), folder=tmp_path)
    train_and_disturb(chosen, place)
    script = (slurm / "script").read_text().splitlines()
    assert {"#SBATCH --partition=long", "#SBATCH --cpus-per-task=2"} <= {*script}
    assert (chosen.folder / "model.safetensors").read_bytes() == undisturbed


@pytest.mark.long
def test_a_stop_reaches_what_slurm_runs(slurm: Path, tmp_path: Path) -> None:
    """As does Ctrl-C: the training saves, and says so."""
    arguments = ["accuracy", "--frameworks", "torch", "--models", "gru", "--data", "rt"]
    arguments += ["--vectors", "random:8", "--train-size", "64", "--test-size", "16", "--epochs"]
    arguments += ["5000", "--batch-size", "8", "--on", "slurm", "--out", str(tmp_path / "results")]
    command = [sys.executable, "-u", "compare.py", *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "[epoch:3/" in line:
                process.send_signal(signal.SIGINT)
                break
        _, error = process.communicate(timeout=100)
    assert process.returncode == 130, error
    assert "torch gru: stopped by SIGINT after step" in error
    assert list((tmp_path / "results" / "torch-gru" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("place", "line"),
    [
        (Place("slurm", slurm=("partition",)), "--slurm partition: expected NAME=VALUE"),
        (Place("slurm"), "--on slurm: there is no sbatch here"),
        (Place("dask"), "--on dask: DASK_SCHEDULER_ADDRESS has to name a scheduler"),
    ],
)
def test_what_is_not_there(place: Place, line: str) -> None:
    with pytest.raises(InputError, match=f"^{line}"):
        processes.run([Job("never", "never", ())], place, lambda *_: None, lambda _: None)


@pytest.mark.long  # or else nobody could go on, above
def test_what_it_runs_dies_with_the_one_who_started_it(tmp_path: Path) -> None:
    log, stop = tmp_path / "log", tmp_path / "stop"
    options = dataclasses.replace(LONG, epochs=5000, out=tmp_path / "run")
    job = Job("long", "torch_impl.train", tuple(to_arguments(options)))
    worker = endurance.forkserver().Process(target=processes.work, args=(job, log, stop, str(ROOT)))
    worker.start()
    while not log.exists() or "[epoch:2/" not in log.read_text():
        time.sleep(0.05)
        assert worker.is_alive()
    child = Path(f"/proc/{running(tmp_path / 'run')}/cmdline")
    worker.kill()
    worker.join()
    for _ in range(100):
        if not child.exists() or not child.read_bytes():  # a zombie has none
            return
        time.sleep(0.05)
    raise AssertionError("it lives on")
