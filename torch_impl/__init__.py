"""The GRU text classifier in PyTorch; jax_impl is its twin."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from common import __version__
from common.extras import require

if TYPE_CHECKING:
    from torch_impl.classifier import Classifier
    from torch_impl.modules import GRU, GRUCell, Recurrent
    from torch_impl.predict import load

__all__ = ["GRU", "Classifier", "GRUCell", "Recurrent", "__version__", "load"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """A class or a module, imported on first use: the programs import this package first."""
    if name in __all__:
        require(*(("torch", "train") if name == "load" else ("torch",)))
        module = {"Classifier": "classifier", "load": "predict"}.get(name, "modules")
        globals()[name] = value = getattr(import_module(f"{__name__}.{module}"), name)
        return value
    if find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
