"""gensim's KeyedVectors.save: a pickle, with its large arrays in .npy files beside it.

The pickle holds the words and the number of dimensions, and the vectors where they are small;
above 10 MB they are in NAME.vectors.npy. Nothing of gensim or NumPy is called to read it: every
constructor that such a pickle names is replaced by one of the harmless stand-ins below.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from common.data.unpickle import Constructors, restricted_loads
from common.data.vectors.found import DTYPES, Found
from common.errors import InputError

# What gensim has called the words and the vectors: since 4.0, in 3.x, before.
_WORDS = ("index_to_key", "index2word", "index2entity")
_VECTORS = ("vectors", "syn0")


class _Inert:
    """Keeps what it is made of, and does nothing with it."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _KeyedVectors(_Inert):
    state: Any = None  # gensim's objects are made by __new__ alone


def _encode(text: str, encoding: str) -> bytes:
    """What stands for bytes in the pickles that Python 3 writes for Python 2."""
    if encoding != "latin1":
        raise ValueError(f"text in the encoding {encoding!r}")
    return text.encode("latin1")


_CONSTRUCTORS: Constructors = {
    **{
        (f"gensim.models.{module}", name): _KeyedVectors
        for module in ("keyedvectors", "word2vec", "fasttext")
        for name in (
            "KeyedVectors",
            "Word2VecKeyedVectors",
            "EuclideanKeyedVectors",
            "FastTextKeyedVectors",
            "Vocab",
            "CompatVocab",
        )
    },
    **{
        (f"numpy.{core}.{module}", name): _Inert
        for core in ("core", "_core")
        for module, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),  # since protocol 5
        )
    },
    ("__builtin__", "frozenset"): _Inert,
    ("builtins", "frozenset"): _Inert,
    ("numpy", "ndarray"): _Inert,
    ("numpy", "dtype"): _Inert,
    ("_codecs", "encode"): _encode,
}


def read(path: Path, data: bytes, found: Found) -> None:
    """Hand the words of the pickle `data` to `found`; `path` is its file.

    Raises InputError for a pickle of anything else, a companion that is missing or does not fit.
    """
    model = restricted_loads(data, str(path), _CONSTRUCTORS, encoding="latin1")
    state = model.state if isinstance(model, _KeyedVectors) else None
    if not isinstance(state, dict):
        raise InputError(f"{path}: a pickle, but not one of gensim's KeyedVectors")
    words = next((state[name] for name in _WORDS if isinstance(state.get(name), list)), None)
    if words is None:
        raise InputError(f"{path}: has no list of words (index_to_key)")
    inside = next((state[name] for name in _VECTORS if isinstance(state.get(name), _Inert)), None)
    del model, state  # hundreds of megabytes
    if inside is not None:
        try:
            array = _array(inside)
        except Exception as error:  # whatever a pickle may hold in the places of an array's parts
            raise InputError(f"{path}: its vectors are damaged ({error})") from None
        found.put_table(str(path), array.shape, array.dtype.str[1:], array.__getitem__, words)
        return
    companions = [
        path.with_name(f"{path.name.removesuffix('.gz')}.{name}.npy") for name in _VECTORS
    ]
    companion = next((file for file in companions if file.is_file()), None)
    if companion is None:
        raise InputError(f"{companions[0]}: not there, but {path.name} has its vectors in it")
    table = _open(companion)
    shape, dtype = table.shape, table.dtype.str[1:]
    found.put_table(str(companion), shape, dtype, lambda numbers: _open(companion)[numbers], words)


def _open(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        # A header of version 2 or 3 may say that it is 4 GiB long, and np.load reserves them.
        if file.read(8) != b"\x93NUMPY\x01\x00":
            raise InputError(f"{path}: not a .npy file of version 1.0")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "created on Python 2": many of them are
            return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # of many kinds
        raise InputError(f"{path}: not a readable .npy file ({error})") from None


def _array(pickled: _Inert) -> np.ndarray:
    """The array that numpy would have made of this; raises any exception if it is not one."""
    if pickled.state:
        _, shape, dtype, fortran_order, numbers = pickled.state
    else:  # _frombuffer
        numbers, dtype, shape, order = pickled.arguments
        fortran_order = order == "F"
    kind, byte_order = dtype.arguments[0], dtype.state[1]
    rows, columns = shape
    if kind not in DTYPES or byte_order not in ("<", ">"):
        raise ValueError(f"an array of {byte_order}{kind}")
    if not 0 <= rows * columns * int(kind[1]) == len(numbers):
        raise ValueError(f"{len(numbers):,} bytes for an array {[rows, columns]}")
    flat = np.frombuffer(numbers, byte_order + kind)
    return flat.reshape(rows, columns, order="F" if fortran_order else "C")
