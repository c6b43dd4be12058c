"""The extras of pyproject.toml, and what is said where their packages are missing."""

import re
import tomllib
from importlib.metadata import packages_distributions

import pytest

from common import extras
from common.errors import InputError
from tests import ROOT


def test_the_modules_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = project["optional-dependencies"]
    distribution = {module: names[0] for module, names in packages_distributions().items()}
    for extra, modules in extras.MODULES.items():
        required = {re.split(r"[\[<>=]", each)[0] for each in lists[extra]}
        brought = {distribution[module].replace("_", "-").lower() for module in modules}
        assert brought == {name.lower() for name in required} - {"gru-twins", "cuda-bindings"}


def test_one_line_names_the_extras_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"torch": True, "numpy": True}
    monkeypatch.setattr(extras, "find_spec", there.get)
    extras.require("torch")
    with pytest.raises(InputError, match=r'^gensim is not .*: pip install -e "\.\[train\]"$'):
        extras.require("torch", "train")
    with pytest.raises(ModuleNotFoundError, match=r'^--to x: jax .*"\.\[jax,train,report\]"$'):
        extras.require("torch", "jax", "train", "report", what="--to x: ")
