"""The commands that a user types: gru-twins, help, versions, misspellings; the package files."""

import os
import re
import sys
import tomllib
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import pairwise

import pytest
import tyro

import common
import compare
import gru_twins
import torch_impl.export
import torch_impl.learner
from common.convert import __main__ as convert
from common.inference import explanation, export, prediction
from common.linear import train as linear
from common.serve import server
from common.training import loop
from tests import ROOT
from tests.training.cases import Command, refused_at_once

MAINS: dict[str, Callable[[], None]] = {
    "gru-twins": gru_twins.main,
    "python compare.py": compare.main,
    "python -m torch_impl.train": partial(loop.main, torch_impl.learner),
    "python -m torch_impl.predict": partial(prediction.main, torch_impl.learner),
    "python -m torch_impl.explain": partial(explanation.main, torch_impl.learner),
    "python -m torch_impl.export": partial(
        export.main, torch_impl.learner, "torch", torch_impl.export.save, torch_impl.export.load
    ),
    "python -m torch_impl.serve": partial(server.main, torch_impl.learner),
    "python -m common.convert": convert.main,
    "python -m common.linear.train": linear.main,
    "python -m common.linear.predict": prediction.main,
}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines that gru-twins would execute."""
    lines: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, line: lines.append(line))
    return lines


@pytest.mark.parametrize("name", MAINS)
def test_help_fits_80_columns(name: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, output, error = command(MAINS[name], "--help")
    assert (status, error) == (0, "")
    assert output.startswith(f"usage: {name} ")
    lines = output.splitlines()
    assert max(map(len, lines)) <= 80
    for line, following in pairwise(lines):  # no line ends where more would have fitted
        text, more = line[1:-1].rstrip(), re.match(r". {5,}(\S+)", following)
        if more and "  " in text:  # no option alone
            assert len(text) + 1 + len(more[1]) > 77, line


@pytest.mark.parametrize("name", MAINS)
def test_every_command_prints_its_version(name: str, command: Command) -> None:
    assert command(MAINS[name], "--version") == (0, f"gru-twins {common.__version__}\n", "")


@pytest.mark.parametrize(
    ("name", "arguments", "intended"),
    [
        ("gru-twins", ["trian"], "train"),
        ("python -m torch_impl.train", ["--epoch", "3"], "--epochs"),
        ("python -m torch_impl.train", ["--bach-size=3"], "--batch-size"),
        ("python -m torch_impl.train", ["--no-tensorbord"], "--tensorboard"),
        ("python compare.py", ["--framework", "jax"], "--frameworks"),
        ("python compare.py", ["parity", "--modles", "gru"], "--models"),
        ("python -m torch_impl.predict", ["run", "text", "--devise", "cpu"], "--device"),
        ("python -m torch_impl.explain", ["run", "text", "--jsn", "a"], "--json"),
        ("python -m common.linear.train", ["--min-review", "3"], "--min-reviews"),
    ],
)
def test_misspelt_option_suggests_the_right_one(
    name: str, arguments: list[str], intended: str, command: Command
) -> None:
    error = refused_at_once(command(MAINS[name], *arguments))
    assert re.fullmatch(rf"error: .+; did you mean {intended}\?( \(see {name} --help\))?\n", error)


def test_missing_argument_is_named(command: Command) -> None:
    status, _, error = command(convert.main, "a", "b", "--form", "keras")
    assert status == 2
    missing = "missing: --from, --to; unrecognized: --form"
    assert error == f"error: {missing} (see python -m common.convert --help)\n"


@pytest.mark.parametrize("name", ["python compare.py", "python -m torch_impl.train"])
def test_a_preset_without_its_name_is_named(name: str, command: Command) -> None:
    error = refused_at_once(command(MAINS[name], "--preset"))
    assert error.startswith("error: Missing value for argument '--preset'")


def test_an_error_of_another_tyro_is_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text of tyro's errors is no supported interface: a release may draw no box."""

    def cli(*_: object, **options: object) -> None:
        print("no such option:\n  --epoch", file=sys.stderr)
        sys.exit(2)

    monkeypatch.setattr(tyro, "cli", cli)
    status, output, error = command(convert.main, "a", "b")
    assert (status, output) == (2, "")
    assert error == "error: no such option: --epoch (see python -m common.convert --help)\n"


@pytest.mark.parametrize("framework", [[], ["--framework", "torch"], ["--framework=jax"]])
def test_gru_twins_becomes_the_program(
    framework: list[str], command: Command, started: list[list[str]]
) -> None:
    arguments = ["--data", "csv:a b.csv", "--", "--framework", "-x"]
    assert command(gru_twins.main, "train", *framework, *arguments)[0] == 0
    module = f"{'jax' if '--framework=jax' in framework else 'torch'}_impl.train"
    name = "gru_twins=gru-twins train"
    assert started == [[sys.executable, "-X", name, "-P", "-m", module, *arguments]]


@pytest.mark.parametrize("name", sorted({*gru_twins.COMMANDS}))
def test_programs_of_gru_twins_exist(name: str, command: Command, started: list[list[str]]) -> None:
    command(gru_twins.main, name)
    assert find_spec(started[0][-1])


def test_gru_twins_has_no_program_encode(command: Command, started: list[list[str]]) -> None:
    """There is no program for encoding: a training encodes its data once, on all cores."""
    status, _, error = command(gru_twins.main, "encode", "part")
    assert (status, started) == (2, [])
    assert error.startswith("error: encode: expected one of compare, train, ")


@pytest.mark.parametrize("arguments", [["keras"], []])
def test_gru_twins_knows_two_frameworks(
    arguments: list[str], command: Command, started: list[list[str]]
) -> None:
    status, _, error = command(gru_twins.main, "train", "--framework", *arguments)
    assert (status, started) == (2, [])
    assert error == f"error: --framework {''.join(arguments)}: expected torch or jax\n"


def test_program_of_gru_twins_prints_its_name(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys._xoptions, "gru_twins", "gru-twins train")
    main = MAINS["python -m torch_impl.train"]
    assert command(main, "--help")[1].startswith("usage: gru-twins train ")
    assert command(main, "--epoch", 3)[2].endswith("(see gru-twins train --help)\n")


def test_distribution_contains_all_packages() -> None:
    """The wheel has all packages and their types, the container all that the wheel needs."""
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages, modules = about["packages"], about["py-modules"]
    roots = {name for name in packages if "." not in name}
    result = [path.parent for root in roots for path in (ROOT / root).rglob("__init__.py")]
    assert {".".join(path.relative_to(ROOT).parts) for path in result} == {*packages}
    assert all((ROOT / root / "py.typed").exists() for root in roots)
    lines = re.findall("^COPY (.+) .+$", (ROOT / "Containerfile").read_text(), re.MULTILINE)
    files = {"pyproject.toml", "setup.py", "README.md", "LICENSE", *(f"{m}.py" for m in modules)}
    assert {*" ".join(lines).split()} == roots | files
