"""The fixtures of this folder."""

from tests.training.cases import drawing, without_figures

__all__ = ["drawing", "without_figures"]
