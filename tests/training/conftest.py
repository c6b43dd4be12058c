"""The fixtures of this folder."""

from tests.training.cases import drawing, not_drawn

__all__ = ["drawing", "not_drawn"]
