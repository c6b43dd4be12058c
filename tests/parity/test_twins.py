"""The twins stay twins: the same files with the same names in the same order."""

import ast
import difflib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = (
    *("layers", "bfloat16", "gru", "rnn", "fused", "classifier"),
    *("trace", "learner", "train", "predict", "explain"),
)
# What only one has: how autograd, torch.func and torch.compile are told of the kernel, and what
# they are asked; how JAX is.
ONLY = {
    "torch": {
        *("plain", "transformed", "forward_mode", "batched", "exactly", "parts", "dense"),
        *("keep", "differentiate", "refuse", "gradients_of", "one_by_one", "directions_of"),
        *("check_directions", "describe", "address", "within_memory"),
        *(
            "Rounded",
            "RoundedAlong",
        ),
        *("Forward", "Eager", "Backward"),
    },
    "jax": {
        *("vary_alike", "layer", "_", "saving", "pull", "directions_of", "push", "push_shapes"),
        *("push_again", "push_transposed", "push_batched", "here_lowered", "like"),
        *("attributes", "or_empty", "spoil"),
    },
}
TRANSLATED = {"GRU.forward": "GRU.__call__", "Classifier.forward": "Classifier.__call__"}


def names(twin: str, file: str) -> list[str]:
    """Public functions, classes and public methods, in their order."""
    found = []
    for node in ast.parse((ROOT / f"{twin}_impl" / f"{file}.py").read_text()).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name in ONLY[twin]:
            continue
        found.append(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
            found += [f"{node.name}.{method}" for method in methods]
    shown = [TRANSLATED.get(name, name) for name in found]
    return [name for name in shown if "._" not in name.replace("__", "")]


@pytest.mark.parametrize("file", FILES)
def test_same_names_in_the_same_order(file: str) -> None:
    assert names("torch", file) == names("jax", file)


@pytest.mark.parametrize(("file", "most"), [("gru", 110), ("layers", 240), ("rnn", 15)])
def test_most_lines_are_the_same(file: str, most: int) -> None:
    """Those of one alone and those of the other, once Array is called Tensor."""
    ours, theirs = (
        (ROOT / f"{twin}_impl" / f"{file}.py").read_text().replace("Array", "Tensor").splitlines()
        for twin in ("torch", "jax")
    )
    differing = [line for line in difflib.ndiff(ours, theirs) if line[0] in "+-"]
    assert len(differing) <= most, f"{len(differing)} lines differ"


def test_common_knows_neither_framework_and_neither_twin_the_other() -> None:
    forbidden = {
        "common": {"torch", "jax", "flax", "optax", "torch_impl", "jax_impl", "comparison"},
        "torch_impl": {"jax", "flax", "optax", "jax_impl", "comparison"},
        "jax_impl": {"torch", "torch_impl", "comparison"},
    }
    for folder, modules in forbidden.items():
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.parse(path.read_text()).body:  # imports at the top level
                if isinstance(node, ast.Import):
                    imported = {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    imported = {str(node.module).partition(".")[0]}
                else:
                    continue
                assert not imported & modules, path


@pytest.mark.parametrize(("twin", "framework"), [("torch_impl", "torch"), ("jax_impl", "flax.nnx")])
def test_a_layer_loads_the_bottom_of_common_and_nothing_else(twin: str, framework: str) -> None:
    bottom = {"common", "common.arguments", "common.errors", "common.params"}
    bottom |= {"common.cells", "common.kernels"}
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
