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
from common.data.vectors.lookup import DTYPES, Entries, ToVector, of_table
from common.errors import InputError

# What gensim has called the words and the vectors: since 4.0, in 3.x, before.
_WORDS = ("index_to_key", "index2word", "index2entity")
_VECTORS = ("vectors", "syn0")


class _Inert:
    """Keeps what it is made of, and does nothing with it."""

    state: Any = None  # in the class, for gensim's objects are made by __new__ alone

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state


class _KeyedVectors(_Inert):
    pass


def _encode(text: str, encoding: str) -> bytes:
    """What stands for bytes in the pickles that Python 3 writes for Python 2."""
    if encoding != "latin1":
        raise ValueError(f"text in the encoding {encoding!r}")
    return text.encode("latin1")


_GENSIM_MODULES = ("keyedvectors", "word2vec", "fasttext")
_GENSIM_CLASSES = (
    *("KeyedVectors", "Word2VecKeyedVectors", "EuclideanKeyedVectors", "FastTextKeyedVectors"),
    *("Vocab", "CompatVocab"),
)
_NUMPY_MODULES = ("core.multiarray", "core.numeric", "_core.multiarray", "_core.numeric")
_NUMPY_FUNCTIONS = ("_reconstruct", "scalar", "_frombuffer")  # the last since protocol 5
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
        return of_table(str(path), array.shape, array.dtype.str[1:], array.__getitem__, words)
    name = path.name.removesuffix(".gz")
    beside = [path.with_name(f"{name}.{vectors}.npy") for vectors in _VECTORS]
    file = next(filter(Path.is_file, beside), beside[0])
    array = _open(file)
    shape, dtype = array.shape, array.dtype.str[1:]
    return of_table(str(file), shape, dtype, lambda these: _open(file)[these], words)


def _open(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "created on Python 2": many of them are
            # A header of version 2 or 3 may say that it is 4 GiB long, and np.load reserves them.
            if file.read(8) != b"\x93NUMPY\x01\x00":
                raise ValueError("not of version 1.0")
            return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: not there, but the vectors are in it") from None
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
