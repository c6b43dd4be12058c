"""Runs pytest in forks of one process that has imported the packages which the tests need.

tools/mutate.py starts it in a copy of the working tree, whose own modules only the forks import.
Each line of standard input is a JSON list: pytest's arguments, the seconds that each test function
may take, and those after which the fork is killed, or null. The answer is a line: the exit status,
or null where the fork was killed. OUTPUT has what the fork prints.
"""

import faulthandler
import importlib
import json
import os
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = ("hypothesis", "scipy.stats", "sklearn.metrics", "altair", "tyro", "gensim.models")
PACKAGES += ("pyarrow.parquet", "torch._dynamo", "flax.nnx", "optax")
OUTPUT, COMPILED = Path("../output"), Path("../compiled")


class Plugin:
    """Time limits of test functions, and a folder that keeps what XLA compiles for later forks."""

    def __init__(self, limits: dict[str, float]) -> None:
        self.limits = limits

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        COMPILED.mkdir(exist_ok=True)
        base = session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        (base / "compiled").symlink_to(COMPILED.resolve())  # where conftest.py has it compile to

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if limit := self.limits.get(item.nodeid.partition("[")[0]):
            faulthandler.dump_traceback_later(limit, exit=True)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()


def run(arguments: list[str], limits: dict[str, float], seconds: float | None) -> int | None:
    """The exit status of pytest in a fork, which leaves no process behind."""
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setsid()
            output = os.open(OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream, to in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
                os.dup2(to, stream)
            # What is imported for a collection is compiled for all forks to come.
            sys.dont_write_bytecode = "--collect-only" not in arguments
            status = int(pytest.main(arguments, plugins=[Plugin(limits)]))
            sys.stdout.flush()
        finally:
            os._exit(status)
    ended = os.pidfd_open(child)
    try:
        in_time = select.select([ended], [], [], seconds)[0]
    finally:
        os.close(ended)
        os.killpg(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if in_time else None


if __name__ == "__main__":
    for name in PACKAGES:
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), flush=True)
