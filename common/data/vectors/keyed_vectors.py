"""Reads files of gensim's KeyedVectors.save: a pickle, and large arrays in separate .npy files.

The pickle contains the words, the number of dimensions and the vectors; vectors above 10 MB are in
NAME.vectors.npy. Every constructor in the pickle is replaced by a harmless stand-in, so that no
code of gensim or NumPy runs.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from common.data.unpickle import Constructors, restricted_loads
from common.data.vectors.lookup import DTYPES, Entries, ToVector, read_table
from common.errors import InputError

# gensim's names of the words (since 4.0, in 3.x, before) and of the vectors.
_WORDS = ("index_to_key", "index2word", "index2entity")
_VECTORS = ("vectors", "syn0")


class _Inert:
    """Stores its arguments and its state."""

    state: Any = None  # a class attribute, because the pickle may call __new__ without __init__

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state


class _KeyedVectors(_Inert):
    pass


def _encode(text: str, encoding: str) -> bytes:
    """Stand-in for _codecs.encode, which represents bytes in protocol 2 pickles of Python 3."""
    if encoding != "latin1":
        raise ValueError(f"text in the encoding {encoding!r}")
    return text.encode("latin1")


_GENSIM_MODULES = ("keyedvectors", "word2vec", "fasttext")
_GENSIM_CLASSES = (
    *("KeyedVectors", "Word2VecKeyedVectors", "EuclideanKeyedVectors", "FastTextKeyedVectors"),
    *("Vocab", "CompatVocab"),
)
_NUMPY_MODULES = ("core.multiarray", "core.numeric", "_core.multiarray", "_core.numeric")
_NUMPY_FUNCTIONS = ("_reconstruct", "scalar", "_frombuffer")  # _frombuffer: since protocol 5
_CONSTRUCTORS: Constructors = {
    **{(f"gensim.models.{m}", c): _KeyedVectors for m in _GENSIM_MODULES for c in _GENSIM_CLASSES},
    **{(f"numpy.{m}", f): _Inert for m in _NUMPY_MODULES for f in _NUMPY_FUNCTIONS},
    ("__builtin__", "frozenset"): _Inert,
    ("builtins", "frozenset"): _Inert,
    ("numpy", "ndarray"): _Inert,
    ("numpy", "dtype"): _Inert,
    ("_codecs", "encode"): _encode,
}


def read(path: Path, data: bytes) -> tuple[Entries, ToVector]:
    """The entries of the pickle `data`; `path` is its file.

    Raises InputError for another pickle, or if the .npy file is missing or does not match.
    """
    model = restricted_loads(data, str(path), _CONSTRUCTORS, encoding="latin1")
    state = model.state if isinstance(model, _KeyedVectors) else None
    if not isinstance(state, dict):
        raise InputError(f"{path}: a pickle, but not one of gensim's KeyedVectors")
    words = next((state[name] for name in _WORDS if isinstance(state.get(name), list)), None)
    if words is None:
        raise InputError(f"{path}: has no list of words (index_to_key)")
    pickled = next((state[name] for name in _VECTORS if isinstance(state.get(name), _Inert)), None)
    del model, state  # frees hundreds of megabytes
    if pickled is not None:
        try:
            array = _array(pickled)
        except Exception as error:  # the parts of an array may be arbitrary objects
            raise InputError(f"{path}: its vectors are damaged ({error})") from None
        return read_table(str(path), array.shape, array.dtype.str[1:], array.__getitem__, words)
    name = path.name.removesuffix(".gz")
    candidates = [path.with_name(f"{name}.{vectors}.npy") for vectors in _VECTORS]
    file = next(filter(Path.is_file, candidates), candidates[0])
    array = _open(file)
    shape, dtype = array.shape, array.dtype.str[1:]
    return read_table(str(file), shape, dtype, lambda block: _open(file)[block], words)


def _open(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # many files were created on Python 2
            # np.load allocates the header length, up to 4 GiB in versions 2 and 3.
            if file.read(8) != b"\x93NUMPY\x01\x00":
                raise ValueError("not of version 1.0")
            return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: missing; the vectors are in this file") from None
    except Exception as error:  # np.load raises many types
        raise InputError(f"{path}: not a readable .npy file ({error})") from None


def _array(pickled: _Inert) -> np.ndarray:
    """The array that NumPy would unpickle. Raises an arbitrary exception for an invalid array."""
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
