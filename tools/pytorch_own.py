"""PyTorch's own tests of nn.GRU and nn.GRUCell, run over torch_impl.GRU and torch_impl.GRUCell.

    python -m tools.pytorch_own FOLDER

FOLDER is the folder test/ of PyTorch's sources, of about the installed version; `pip install
expecttest` is what these tests need besides. All tests of test_nn.py and test_modules.py run that
name one of the two; what they test of other layers, too. Those that need a GPU are skipped. Ends
with exit status 1 where one fails.
"""

import importlib
import inspect
import sys
import unittest
from pathlib import Path
from typing import Any

import torch

import torch_impl


class Absent(list):
    """In place of what PyTorch's internals had in the version of the tests and have no longer: no
    tests of other modules, no GPU, a decorator that does nothing."""

    def __call__(self, *arguments: Any, **_: Any) -> Any:
        return arguments[0] if arguments and callable(arguments[0]) else self


def absent(name: str) -> Absent:
    """In place of a name that is not there."""
    if name.startswith("__"):
        raise AttributeError(name)
    return Absent()


def main(folder: str) -> int:
    """Run them; returns the exit status."""
    for namespace in (torch.nn, torch.nn.modules, torch.nn.modules.rnn):
        namespace.GRU, namespace.GRUCell = torch_impl.GRU, torch_impl.GRUCell
    sys.path.insert(0, str(Path(folder).resolve()))
    sys.argv[1:] = []  # they read it
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
    print(f"{ran} run, {ran - failed} passed, {failed} failed, {skipped} skipped for want of a GPU")
    return failed > 0


def is_of_gru(test: unittest.TestCase) -> bool:
    """Whether a test is one of the GRU, or of all recurrent layers."""
    name = test._testMethodName
    if "GRU" in name or not type(test).__module__.endswith("test_nn"):
        return "GRU" in name
    return "GRU" in inspect.getsource(inspect.unwrap(getattr(type(test), name)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
