"""The first programs of README.md run, and --help names its implementations."""

import re
import textwrap

import pytest

import torch_impl.gru
from common.training.options import TrainConfig
from tests import ROOT


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_the_layers_program_runs(framework: str) -> None:
    section = (ROOT / "README.md").read_text().split("## Use the layer")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("    ")]
    program = textwrap.dedent("\n".join(lines))
    start = program.index(f"import {framework}\n")
    end = program.find("\nimport ", start)
    names: dict = {}
    exec(program[start : end if end > 0 else None], names)
    assert names["outputs"].shape == (3, 9, 256)


def test_help_names_every_implementation() -> None:
    source = (ROOT / "common/training/options.py").read_text()
    about = re.search(r'implementation: str = "auto"\n    """(.*?)"""', source, re.DOTALL)
    assert about and all(name in about[1] for name in torch_impl.gru.RECURRENCES)
    assert TrainConfig().implementation == "auto"
