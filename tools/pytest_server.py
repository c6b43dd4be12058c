"""Runs pytest in forks of a process that has imported the packages that the tests need.

tools/mutate.py starts this program in a copy of the working tree, whose own modules only the forks
import. Each line of standard input is a JSON list: the arguments of pytest, the time limits of test
functions in seconds, and the seconds after which the fork is killed, or null. The answer is a line
with the exit status, or null if the fork was killed. OUTPUT receives the output of the fork.
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
    """Sets time limits of test functions, and a cache of compiled XLA programs for later forks."""

    def __init__(self, limits: dict[str, float]) -> None:
        self.limits = limits

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        COMPILED.mkdir(exist_ok=True)
        base = session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        (base / "compiled").symlink_to(COMPILED.resolve())  # the cache folder of conftest.py

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if limit := self.limits.get(item.nodeid.partition("[")[0]):
            faulthandler.dump_traceback_later(limit, exit=True)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()


def run(arguments: list[str], limits: dict[str, float], seconds: float | None) -> int | None:
    """The exit status of pytest in a fork, or None if the fork was killed; kills its children."""
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setsid()
            output = os.open(OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream, file in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
                os.dup2(file, stream)
            # The bytecode that a collection writes serves all later forks.
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
