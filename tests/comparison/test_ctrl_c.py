"""Ctrl-C that arrives where Python discards exceptions."""

import time
from types import SimpleNamespace

import pytest

from common.errors import interrupt_again


def test_a_discarded_interrupt_is_raised_again() -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupt_again(SimpleNamespace(exc_type=KeyboardInterrupt))
        time.sleep(5)
