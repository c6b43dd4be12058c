"""What the tests of compare.py share."""

import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module

import pytest

from common.training import loop
from comparison import processes
from comparison.processes import Job, Place


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs run in the process of the tests: an import of a framework takes seconds."""

    def run(
        jobs: Sequence[Job],
        place: Place,
        say: Callable[[Job, str], None],
        ended: Callable[[Job], None],
    ) -> None:
        for job in jobs:
            module = import_module(job.module)
            is_training = job.module in ("torch_impl.train", "jax_impl.train")
            main = partial(loop.main, module.learner) if is_training else module.main
            with (
                contextlib.redirect_stdout(io.StringIO()) as output,
                monkeypatch.context() as patch,
            ):
                patch.setattr(sys, "argv", [job.name, *job.arguments])
                main()
            for line in output.getvalue().splitlines():
                say(job, line)
            ended(job)

    monkeypatch.setattr(processes, "run", run)
