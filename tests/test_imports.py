"""The import graph of the product has no cycles, and lower layers import no higher ones."""

import ast
import runpy
import signal
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter

import pytest

from tests import ROOT

FOLDERS = ("common", "torch_impl", "jax_impl", "comparison")
PRODUCT = (*FOLDERS, "compare", "gru_twins", "setup")
FORBIDDEN = {
    "common": {"torch", "jax", "flax", "optax", "torch_impl", "jax_impl", "comparison", "compare"},
    "torch_impl": {"jax", "flax", "optax", "jax_impl", "comparison", "compare"},
    "jax_impl": {"torch", "torch_impl", "comparison", "compare"},
}
ASKED = ("predict", "explain", "export", "serve")
PATHS = [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PATHS
}


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text())


@cache
def imported(name: str, *, top_level: bool = False) -> frozenset[str]:
    """The full names of the modules and objects that a file imports."""
    tree = tree_of(name)
    result: set[str] = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            result |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(result)


def file_of(name: str) -> str:
    """The file that defines an imported name; "" if it is not one of the product's."""
    while name and name not in FILES:
        name = name.rpartition(".")[0]
    return name


def test_no_two_files_import_each_other_even_within_functions() -> None:
    graph = {name: {*map(file_of, imported(name))} - {"", name} for name in FILES}
    assert len(graph) > 100
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_prediction_needs_no_learner() -> None:
    """The programs that predict import neither a learner nor the training loop."""
    starts = [f"{twin}_impl.{name}" for twin in ("torch", "jax") for name in ASKED]
    reached, left = set[str](), [*starts, "common.serve.server"]
    while left:
        name = left.pop()
        new = {*map(file_of, imported(name))} - reached - {""}
        reached |= new
        left += new
    assert "torch_impl.predictor" in reached and "jax_impl.predictor" in reached
    assert not reached & {"torch_impl.learner", "jax_impl.learner", "common.training.loop"}


def test_common_imports_no_framework_and_no_twin_the_other() -> None:
    for name in FILES:
        above = FORBIDDEN.get(name.partition(".")[0], set())
        roots = {each.partition(".")[0] for each in imported(name, top_level=True)}
        assert not roots & above, name


def test_the_product_imports_neither_tests_nor_tools() -> None:
    for name in FILES:
        assert name.partition(".")[0] in PRODUCT
        roots = {each.partition(".")[0] for each in imported(name)}
        assert not roots & {"tests", "tools", "benchmarks"}, name


def test_the_bottom_of_common_imports_none_of_its_folders_and_kernels_no_data() -> None:
    folders = {f"common.{path.parent.name}" for path in ROOT.glob("common/*/__init__.py")}
    bottom = [name for name in FILES if name.startswith("common.") and name.count(".") == 1]
    forbidden = {name: folders for name in bottom if name not in folders}
    assert {"common.cache", "common.cores", "common.signals"} <= forbidden.keys()
    forbidden |= {
        name: folders - {"common.kernels"} for name in FILES if name.startswith("common.kernels")
    }
    for name, above in forbidden.items():
        imports = {*map(file_of, imported(name))}
        assert not {each for each in imports if ".".join(each.split(".")[:2]) in above}, name


def test_an_import_changes_neither_signal_handlers_nor_the_environment() -> None:
    """Changes by the import of a framework do not count."""
    code = """
import os, signal, sys
import flax, jax, torch
sys.argv = ["-m"]  # as in the first imports of one of the project's programs
sys.orig_argv = ["python", "-m", "torch_impl.train"]
def state(): return [*map(signal.getsignal, signal.valid_signals())], dict(os.environ)
before = state()
import common, common.program, comparison
from jax_impl import GRU
from torch_impl import GRU
assert state() == before
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


TRAINING = [f"{name}.train" for name in ("torch_impl", "jax_impl", "common.linear")]
OTHERS = [f"{twin}_impl.{name}" for twin in ("torch", "jax") for name in ASKED]
OTHERS += ["common.linear.predict", "comparison.checks", "comparison.tuning"]


PROGRAMS = [*TRAINING, *OTHERS, "common.convert", "common.report", "compare"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_prepares_its_process_before_its_long_imports(name: str) -> None:
    code = f"""
import os, runpy, signal, sys
class Finder:
    def find_spec(name, *_):
        if name in ("torch", "jax", "tyro", "altair"):
            print(name, signal.getsignal(2) is signal.SIG_DFL, os.environ.get("GOMP_SPINCOUNT"))
            os._exit(sys.stdout.flush() or 0)
signal.signal(2, signal.default_int_handler)
sys.meta_path.insert(0, Finder)
runpy.run_module("{name}", run_name="__main__")
"""
    output = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT)
    assert output.split()[1:] == [b"True", b"None" if name == "compare" else b"10000"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_program_has_a_help_text(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")  # so that the program does not set it
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            runpy.run_module(name, run_name="__main__")
    finally:
        signal.signal(signal.SIGINT, handler)
    program = f"{name}.py" if name == "compare" else f"-m {name}"
    assert f"usage: python {program} " in "".join(capsys.readouterr())


MOST_LINES, MOST_PARAMETERS = 60, 9
# Public functions and calls whose options users type by keyword; constructors may have more, too.
PUBLIC = {
    *("torch_impl.gru.gru", "torch_impl.classifier.classify"),
    *("jax_impl.gru.gru", "jax_impl.classifier.classify", "jax_impl.modules.__call__"),
}


def test_functions_are_short_and_take_few_parameters() -> None:
    """Docstrings count; self and cls do not."""
    for file in FILES:
        for node in ast.walk(tree_of(file)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            name, arguments = f"{file}.{node.name}", node.args
            own = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            own += filter(None, (arguments.vararg, arguments.kwarg))
            parameters = [each for each in own if each.arg not in ("self", "cls")]
            assert node.end_lineno - node.lineno < MOST_LINES, name
            if node.name != "__init__" and name not in PUBLIC:
                assert len(parameters) <= MOST_PARAMETERS, name
