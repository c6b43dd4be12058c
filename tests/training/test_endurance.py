"""The short form of tools/endurance.py, whose table is in docs/reproducibility.md."""

import random
from functools import partial
from pathlib import Path

import pytest

from tools import endurance

long = partial(pytest.param, marks=pytest.mark.long)


@pytest.mark.parametrize(("framework", "kills"), [("torch", 1), long("jax", 1), long("torch", 4)])
def test_killed_runs_end_with_the_same_bits(framework: str, kills: int, tmp_path: Path) -> None:
    same, *_ = endurance.kill_many(framework, kills, random.Random(0), tmp_path)
    assert same == kills


def test_damage_is_detected(tmp_path: Path) -> None:
    endurance.train("torch", endurance.TINY, tmp_path)
    result = list(endurance.damage(tmp_path, 5, 60, random.Random(0)))
    assert len(result) == 6
    for what, count, missed in result:
        assert (what, count > 0, missed) == (what, True, 0)


def test_a_full_disk_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    outcome, good = endurance.full_disk(tmp_path)
    assert good, outcome


@pytest.mark.long  # trains an epoch of the default options to measure seconds
def test_checkpoints_cost_little(tmp_path: Path) -> None:
    count, _, share = endurance.cost(tmp_path, "random:8")
    assert count > 1
    assert share < 0.02
