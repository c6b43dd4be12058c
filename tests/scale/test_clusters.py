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
from common.training.options import to_arguments
from comparison import processes
from comparison.processes import Job, Place
from tests import ROOT
from tools import endurance

LONG = dataclasses.replace(endurance.TINY, epochs=20, validation_size=0)
# A program that prints, goes on after a kill and leaves a file as a training does, but starts fast.
QUICK = """
import pathlib, sys, time
from common.program import start
start()
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(exist_ok=True)
steps = out / "model.safetensors"
begun = steps.read_text().split() if steps.exists() else []
if begun:
    print(f"going on after step {len(begun)}")
for step in range(len(begun) + 1, 21):
    print(f"[epoch:{step}/20]", flush=True)
    # On a busy machine, the test reads the third line late; the first process waits to be killed.
    time.sleep(60 if step == 5 and not begun else 0.05)
    steps.open("a").write(f"{step}\\n")
"""


@pytest.fixture(params=["quick_train", pytest.param("torch_impl.train", marks=pytest.mark.long)])
def module(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The program that another process runs."""
    (tmp_path / "quick_train.py").write_text(QUICK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return str(request.param)


def run_and_disturb(module: str, place: Place) -> None:
    """Kill the process of the program in its third epoch; another process continues it."""
    assert place.folder is not None
    options = dataclasses.replace(LONG, out=place.folder / "run")
    lines: list[str] = []
    killed: list[int] = []
    ended: list[Job] = []

    def say(job: Job, line: str) -> None:
        lines.append(line)
        if line.startswith("[epoch:3/") and not killed:
            killed.append(parent(running(place.folder / "run", module)))
            os.kill(killed[0], signal.SIGKILL)

    job = Job("elsewhere", module, tuple(to_arguments(options)))
    processes.run([job], place, say, ended.append)
    assert killed and ended == [job]
    assert [line for line in lines if "going on after step" in line], "it began anew"
    expected = "".join(f"{step}\n" for step in range(1, 21)).encode()
    if module != "quick_train":
        alone = place.folder / "alone"
        endurance.train("torch", LONG, alone)
        expected = (alone / "model.safetensors").read_bytes()
    assert (place.folder / "run" / "model.safetensors").read_bytes() == expected
    assert not list(place.folder.glob(".jobs-*"))


def running(out: Path, module: str = "torch_impl.train") -> int:
    """The process of the program that writes to this folder."""
    words = f"--out\0{out}\0".encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if words in (output := path.read_bytes()) and module.encode() in output:
                return int(path.parent.name)
        except OSError:
            continue
    raise AssertionError(f"nothing trains into {out}")


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def test_dask_continues_on_another_worker(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import dask
    from distributed import LocalCluster

    with (
        LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address=None) as cluster,
        dask.config.set({"scheduler-address": cluster.scheduler_address}),
    ):

        def grow() -> None:  # once the client of the run, the second one, has come
            while len(cluster.scheduler.clients) < 2:
                time.sleep(0.05)
            cluster.scale(2)

        threading.Thread(target=grow, daemon=True).start()
        run_and_disturb(module, Place("dask", folder=tmp_path))
    assert "has no workers yet; waiting" in capsys.readouterr().out


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
    """A folder with the files of the stub of Slurm."""
    stub = tmp_path / "slurm"
    stub.mkdir()
    for name, script in SLURM.items():
        (stub / name).write_text(f"#!/bin/bash\n{script}")
        (stub / name).chmod(0o755)
    monkeypatch.setenv("STUB", str(stub))
    monkeypatch.setenv("PATH", f"{stub}{os.pathsep}{os.environ['PATH']}")
    return stub


def test_slurm_gets_a_script_and_may_run_it_again(slurm: Path, module: str, tmp_path: Path) -> None:
    (slurm / "requeue").touch()
    options = ("partition=long", "cpus-per-task=2")
    run_and_disturb(module, Place("slurm", slurm=options, folder=tmp_path))
    script = (slurm / "script").read_text().splitlines()
    assert {"#SBATCH --partition=long", "#SBATCH --cpus-per-task=2"} <= {*script}


@pytest.mark.long
def test_stop_signal_reaches_the_slurm_job(slurm: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches the job, too: the training saves a checkpoint and reports it."""
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
        (Place("slurm"), "--on slurm: sbatch is not installed"),
        (Place("dask"), "--on dask: DASK_SCHEDULER_ADDRESS must name a scheduler"),
    ],
)
def test_missing_scheduler_or_package_is_named(place: Place, line: str) -> None:
    with pytest.raises(InputError, match=f"^{line}"):
        processes.run([Job("never", "never", ())], place, lambda *_: None, lambda _: None)


@pytest.mark.long  # otherwise, no other process could continue
def test_training_dies_with_its_parent(tmp_path: Path) -> None:
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
