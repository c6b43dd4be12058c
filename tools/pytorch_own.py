"""Runs PyTorch's own tests of nn.GRU and nn.GRUCell with torch_impl.GRU and torch_impl.GRUCell.

Runs all tests of test_nn.py and test_modules.py that contain one of these names, including what
they test of other layers, and skips tests that need a GPU. The tests need `pip install expecttest`.
The exit status is 1 if a test fails.
"""

import importlib
import inspect
import sys
import unittest
from pathlib import Path
from typing import Any

import torch
from tyro.conf import Positional

import torch_impl
from tools.program import run_program


class Absent(list):
    """Replaces a name that the tests expect in PyTorch's internals and that this version lacks.

    It is an empty list of modules, a GPU that is absent, or a decorator without effect.
    """

    def __call__(self, *arguments: Any, **_: Any) -> Any:
        return arguments[0] if arguments and callable(arguments[0]) else self


def absent(name: str) -> Absent:
    """The module attribute for a missing name."""
    if name.startswith("__"):
        raise AttributeError(name)
    return Absent()


def main(folder: Positional[Path]) -> int:
    """Run the tests; return the exit status.

    Args:
        folder: The folder test/ of PyTorch's sources, of about the installed version.
    """
    for namespace in (torch.nn, torch.nn.modules, torch.nn.modules.rnn):
        namespace.GRU, namespace.GRUCell = torch_impl.GRU, torch_impl.GRUCell
    sys.path.insert(0, str(folder.resolve()))
    sys.argv[1:] = []  # the tests parse it
    for name in ("cuda", "device_type", "dtype", "mkldnn", "modules", "nn", "utils"):
        module = importlib.import_module(f"torch.testing._internal.common_{name}")
        module.__getattr__ = absent  # type: ignore[method-assign]
    import test_modules
    import test_nn

    suite = unittest.TestSuite()
    for module in (test_nn, test_modules):
        for case in vars(module).values():
            if isinstance(case, type) and issubclass(case, unittest.TestCase):
                tests = unittest.defaultTestLoader.loadTestsFromTestCase(case)
                suite.addTests(test for test in tests if is_of_gru(test))
    result = unittest.TextTestRunner(verbosity=1).run(suite)
    failed, skipped = len(result.failures) + len(result.errors), len(result.skipped)
    ran = result.testsRun - skipped
    print(f"{ran} run, {ran - failed} passed, {failed} failed, {skipped} skipped without a GPU")
    return failed > 0


def is_of_gru(test: unittest.TestCase) -> bool:
    """Whether a test is of the GRU alone, or of all recurrent layers."""
    name = test._testMethodName
    if "GRU" in name or not type(test).__module__.endswith("test_nn"):
        return "GRU" in name
    return "GRU" in inspect.getsource(inspect.unwrap(getattr(type(test), name)))


if __name__ == "__main__":
    run_program(main)
