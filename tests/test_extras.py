"""The extras of pyproject.toml, and the message if one of their packages is missing."""

import re
import tomllib
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

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


def test_one_line_names_the_extras_that_are_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A folder in the working directory is no package."""
    folder = tmp_path / "a_folder_for_extras"
    folder.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    there = {"torch": find_spec("numpy"), "tyro": find_spec(folder.name)}
    assert there["tyro"]
    monkeypatch.setattr(extras, "find_spec", there.get)
    extras.require("torch")
    with pytest.raises(InputError, match=r'^gensim is not .*: pip install -e "\.\[train\]"$'):
        extras.require("torch", "train")
    for name in extras.MODULES["train"]:
        there[name] = there["tyro" if name == "tyro" else "torch"]
    with pytest.raises(InputError, match=r"^tyro is not installed"):
        extras.require("train")
    with pytest.raises(ModuleNotFoundError, match=r'^--to x: jax .*"\.\[jax,train,report\]"$'):
        extras.require("torch", "jax", "train", "report", what="--to x: ")
