"""Fixtures of the tests of compare.py."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module

import pytest

from common.report import figures
from common.training import loop, run_directory
from comparison import processes
from comparison.processes import Job, Place

SAVE = figures.Figure.save


@pytest.fixture(scope="module", autouse=True)
def without_figures(draw_in_process: None) -> Iterator[None]:
    """Reports and runs are written without figures, because drawing takes longer than the
    trainings of these tests. The fixture `drawing` enables the figures of reports."""
    draw = run_directory.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures.Figure, "save", lambda *_: None)
        patch.setattr(
            run_directory, "draw", lambda folder, *program: not program or draw(folder, *program)
        )
        yield


@pytest.fixture
def drawing(without_figures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures.Figure, "save", SAVE)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs run in this process, because importing a framework takes seconds."""

    def run(
        jobs: Sequence[Job],
        place: Place,
        on_line: Callable[[Job, str], None],
        on_success: Callable[[Job], None],
    ) -> None:
        for job in jobs:
            if job.module in ("torch_impl.train", "jax_impl.train"):
                main = partial(loop.main, import_module(job.module.replace("train", "learner")))
            else:
                main = import_module(job.module).main
            with (
                contextlib.redirect_stdout(io.StringIO()) as output,
                monkeypatch.context() as patch,
            ):
                patch.setattr(sys, "argv", [job.name, *job.arguments])
                main()
            for line in output.getvalue().splitlines():
                on_line(job, line)
            on_success(job)

    monkeypatch.setattr(processes, "run", run)
