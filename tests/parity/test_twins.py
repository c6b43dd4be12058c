"""The twins stay twins: the same files with the same names in the same order.

And docs/twins.md shows how they differ.
"""

import ast
import difflib
import re
import subprocess
import sys
from collections.abc import Iterator
from html import unescape

import pytest

from comparison import twins
from tests import ROOT

FILES = (
    *("layers", "bfloat16", "gru", "scan", "rnn", "fused", "cuda", "classifier"),
    *("trace", "predictor", "learner", "train", "predict", "explain"),
)
# What only one has: how autograd, torch.func and torch.compile are told of the kernel, and what
# they are asked; how JAX is.
ONLY = {
    "torch": {
        *("is_eager", "without_autocast", "dense"),
        *("forward_of_arrays", "backward_of_arrays", "_"),
        *("save_for_gradient", "differentiate", "raise_no_derivative", "gradients_of"),
        *("vmap_by_loop",),
        *("describe", "on_gpu", "current"),
        *("Rounded", "RoundedAlong"),
        *("Forward", "Eager", "Backward"),
    },
    "jax": {
        *("vary_alike", "layer", "_", "saving", "pull", "push", "push_shapes", "places_of"),
        *("compute",),
        *("push_again", "push_transposed", "push_batched", "here_lowered", "like"),
        *("attributes", "or_empty", "spoil", "mended", "devices"),
    },
}
TRANSLATED = {"GRU.forward": "GRU.__call__", "Classifier.forward": "Classifier.__call__"}


def names(twin: str, file: str) -> list[str]:
    """Public functions, classes and public methods, in their order."""
    result = []
    for node in ast.parse(twins.source(twin, file)).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name in ONLY[twin]:
            continue
        result.append(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
            result += [f"{node.name}.{method}" for method in methods]
    visible = [TRANSLATED.get(name, name) for name in result]
    return [name for name in visible if "._" not in name.replace("__", "")]


@pytest.mark.parametrize("file", FILES)
def test_same_names_in_the_same_order(file: str) -> None:
    assert names("torch", file) == names("jax", file)


def defaults(twin: str, file: str) -> dict[str, str]:
    """The defaults of arguments, by FUNCTION.ARGUMENT; "required" where there is none."""
    result = {}
    for name, arguments in signatures(ast.parse(twins.source(twin, file)).body):
        positional = [*arguments.posonlyargs, *arguments.args]
        missing = [None] * (len(positional) - len(arguments.defaults))
        for argument, default in (
            *zip(positional, [*missing, *arguments.defaults], strict=True),
            *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
        ):
            value = "required" if default is None else ast.unparse(default)
            result[f"{TRANSLATED.get(name, name)}.{argument.arg}"] = value.replace("jnp.", "torch.")
    return result


def signatures(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.arguments]]:
    """Public functions and methods, and their arguments."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from signatures(node.body, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef) and not re.match("_[^_]", node.name):
            yield prefix + node.name, node.args


@pytest.mark.parametrize("file", [*FILES, "export"])
def test_arguments_that_both_have_have_the_same_defaults(file: str) -> None:
    ours, theirs = (defaults(twin, file) for twin in twins.TWINS)
    same = ours.keys() & theirs.keys()
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}


@pytest.mark.parametrize(
    ("file", "most"), [("gru", 80), ("scan", 80), ("layers", 240), ("rnn", 15)]
)
def test_most_lines_are_the_same(file: str, most: int) -> None:
    """Those of one alone and those of the other, once Array is called Tensor."""
    ours, theirs = (twins.neutral(twins.source(twin, file)).splitlines() for twin in twins.TWINS)
    differing = [line for line in difflib.ndiff(ours, theirs) if line[0] in "+-"]
    assert len(differing) <= most, f"{len(differing)} lines differ"


def columns(table: str) -> list[str]:
    """What stands in the columns of a table of docs/twins.md, marks and all."""
    return re.findall("<pre>(.*?)</pre>", table, re.DOTALL)


def plain(html: str) -> str:
    """Without what is between marks, tags, white space."""
    return "".join(unescape(re.sub("<mark>.*?</mark>|<.*?>", "", html)).split())


def test_the_page_is_what_the_command_writes() -> None:
    assert twins.PAGE.read_text() == twins.markdown(), "run python -m comparison.twins"


def shown_source(twin: str) -> str:
    return "".join(twins.source(twin, file) for file in twins.FILES)


def test_the_page_shows_all_but_docstrings() -> None:
    tables = [columns(part.table) for part in twins.parts()]
    for number, twin in enumerate(twins.TWINS):
        visible = "".join(unescape(re.sub("</?mark>", "", each[number])) for each in tables)
        written = re.sub('""".*?"""', "", shown_source(twin), flags=re.DOTALL)
        assert "".join(visible.split()) == "".join(written.split())


def test_unmarked_lines_are_the_same_in_both() -> None:
    for part in twins.parts():
        ours, theirs = map(plain, columns(part.table))
        assert twins.neutral(ours) == twins.neutral(theirs)
        visible = max(len(plain(re.sub("</?mark>", "", each))) for each in columns(part.table))
        assert len(ours) > 0.35 * visible, f"{part.name}: all is marked"


def test_lines_that_are_alike_stand_opposite_each_other() -> None:
    ours = ["a = torch.f(b)", "return a"]
    theirs = ["# why", "a = jnp.f(b)", "return a"]
    left, right = (column[1:-1].split("\n") for column in columns(twins.table(ours, theirs)))
    assert left == ["", "a = <mark>torch.f</mark>(b)", "return a"]
    assert right == ["<mark># why</mark>", "a = <mark>jnp.f</mark>(b)", "return a"]


def test_translated_terms_occur_in_the_twins() -> None:
    for *codes, _ in twins.DIFFERENCES:
        for twin, code in zip(twins.TWINS, codes, strict=True):
            assert code == twins.NOTHING or code in shown_source(twin)


@pytest.mark.parametrize(("twin", "framework"), [("torch_impl", "torch"), ("jax_impl", "flax.nnx")])
def test_a_layer_loads_the_bottom_of_common_and_nothing_else(twin: str, framework: str) -> None:
    bottom = {"common", "common.arguments", "common.errors", "common.extras", "common.params"}
    bottom |= {"common.cells", "common.kernels", "common.kernels.cuda"}
    absent = {"tyro", "pyarrow", "gensim", "altair", "isal", "sklearn", "rich"}
    code = (
        f"import sys, {framework}; before = set(sys.modules); from {twin} import GRU; "
        f"import {twin}.gru as m; assert m.__name__ == '{twin}.gru'; "
        "print(*set(sys.modules) - before)"
    )
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    ours = {name for name in loaded.split() if name.partition(".")[0] == "common"}
    assert ours <= bottom
    assert not {name.partition(".")[0] for name in loaded.split()} & absent
