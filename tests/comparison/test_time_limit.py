"""A test that hangs ends its process with the stacks of all threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

QUICKLY = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "xdist.plugin"}  # to begin
SETTINGS = ROOT / "pyproject.toml"
# PyDLL keeps Python's lock, so that no other thread of Python's can end the call.
HANGS = """
import ctypes

def test_hangs():
    ctypes.PyDLL(None).sleep(600)
"""


def test_time_limit_is_configured(pytestconfig: pytest.Config) -> None:
    assert float(pytestconfig.getini("faulthandler_timeout")) >= 300


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_test_that_hangs_in_c_is_ended_and_shown(workers: int, tmp_path: Path) -> None:
    (tmp_path / "test_hangs.py").write_text(HANGS)
    command = [sys.executable, "-m", "pytest", f"--config-file={SETTINGS}", f"-n{workers}"]
    options = ["--max-worker-restart=0", "-o", "faulthandler_timeout=1", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, *options, str(tmp_path)],
        env=os.environ | QUICKLY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode != 0
    assert 'test_hangs.py", line 5 in test_hangs' in result.stderr
