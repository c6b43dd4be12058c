"""Training on two machines: here, two network namespaces with addresses and names of their own."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.errors import InputError
from common.training.world import bind_to_cores, check_launch, launched
from tests import ROOT

ADDRESSES = ("10.209.0.1", "10.209.0.2")
SIZES = ["--data", "rt", "--vectors", "random:8", "--train-size", "64", "--test-size", "16"]
SIZES += ["--max-length", "9", "--batch-size", "8", "--hidden-size", "8", "--epochs", "2"]
SIZES += ["--shares", "2", "--out"]
# Within, the machine has a name, and a file of names.
SETTLE = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'

Start = Callable[[list[str]], list[subprocess.Popen[str]]]


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Start]:
    """Starts a command on two machines; their number stands for {}."""
    names = [f"gru-{os.getpid()}-{number}" for number in range(2)]
    hosts = tmp_path / "hosts"
    entries = zip(ADDRESSES, names, strict=True)
    hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{a} {name}\n" for a, name in entries))
    ends = [f"gru{os.getpid()}{number}" for number in range(2)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def start(command: list[str]) -> list[subprocess.Popen[str]]:
        result = []
        for number, name in enumerate(names):
            inside = ["unshare", "--mount", "--uts", "bash", "-c", SETTLE, "-", name, str(hosts)]
            words = [word.format(number) for word in command]
            result.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, *inside, sys.executable, *words],
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        return result

    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("needs iproute2, and the right to make network namespaces")
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            for each in (end, "lo"):
                ip("-n", name, "link", "set", each, "up")
        yield start
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.long
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_two_machines_compute_the_result_of_one(name: str, machines: Start, tmp_path: Path) -> None:
    """The store may run on another machine than the first worker."""
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", f"{ADDRESSES[1]}:29500", "-m", f"{name}_impl.train", *SIZES]
    both = machines([*torchrun, str(tmp_path / "two")])
    output = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], output
    assert "".join(output).count("Accuracy") == 1
    alone = [sys.executable, "-m", f"{name}_impl.train", *SIZES, str(tmp_path / "one")]
    subprocess.run(alone, cwd=ROOT, check=True, capture_output=True)
    one, two = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("one", "two"))
    assert one == two


LAUNCHED = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("WORLD_SIZE", "x", "WORLD_SIZE: expected a number >= 1, as torchrun sets it, found x"),
        ("WORLD_SIZE", "0", "WORLD_SIZE: expected a number >= 1, as torchrun sets it, found 0"),
        ("RANK", "", "RANK: expected a number >= 0, as torchrun sets it, found nothing"),
        ("RANK", "5", "RANK: expected less than WORLD_SIZE, 2, found 5"),
        ("LOCAL_RANK", "x", "LOCAL_RANK: expected a number >= 0, as torchrun sets it, found x"),
        ("LOCAL_WORLD_SIZE", "x", "LOCAL_WORLD_SIZE: expected a number >= 1"),
        ("MASTER_PORT", "abc", "MASTER_PORT: expected a number >= 0, as torchrun sets it"),
        ("MASTER_ADDR", "", "MASTER_ADDR: expected the first worker's machine, found nothing"),
    ],
)
def test_invalid_variables_of_launchers(
    framework: str, name: str, value: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each, output in (LAUNCHED | {name: value}).items():
        monkeypatch.setenv(each, output)
    with pytest.raises(InputError, match=f"^{line}"):
        launched()
        check_launch(framework)
        bind_to_cores()


@pytest.mark.parametrize("address", ["127.0.1.1", None])
def test_unreachable_machine(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> str:
        if address is None:
            raise socket.gaierror
        return address

    monkeypatch.setattr(socket, "gethostbyname", find)
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    check_launch("torch")  # both here, for all that is known
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    for framework in ("torch", "jax"):
        with pytest.raises(InputError, match=f"resolves to {address or 'nothing'}, "):
            check_launch(framework)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    check_launch("torch")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: ADDRESSES[0])
    check_launch("jax")
