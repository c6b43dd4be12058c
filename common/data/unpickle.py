"""Loads untrusted pickles: plain data, and the constructors that the caller allows.

A pickle is a program. A restricted find_class prevents calls of anything else, but neither an
exhausted memory nor a stack overflow. Therefore every opcode is validated before Python's unpickler
runs: opcodes that call or import in ways that pickles of data do not need are refused, and so are
numbers that would make the unpickler allocate memory for data that the file does not contain.

Memory use is proportional to the size of the pickle (at most about 25 times; see MAX_CONTAINERS).
"""

import gc
import io
import pickle
import pickletools
import re
from collections.abc import Callable, Collection, Mapping

from common.errors import InputError

Constructors = Mapping[tuple[str, str], Callable]

# One byte of a pickle can create an empty set of 216 bytes. This number of lists, dicts, sets,
# tuples and marks takes less than 1 GiB, and suffices for one container per review.
MAX_CONTAINERS = 4_000_000
# The hash of a tuple is recursive: tuples nested about 50,000 deep overflow the C stack as the key
# of a dict.
MAX_TUPLES = 10_000
# The memo is an array as long as its largest index; with 2**24 entries it takes 256 MiB.
_MAX_MEMO = 2**24

# Pickles of data have none of these opcodes, which call or refer to objects outside of the file.
# (Other calling opcodes only reach objects that find_class has returned.)
_FORBIDDEN = {"OBJ", "PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4", "DUP"}
_FORBIDDEN |= {"NEXT_BUFFER", "READONLY_BUFFER"}

# Matches the bulk of a pickle at the speed of a regular expression: strings and their memo index,
# memo references, numbers, appends. A string follows its length (one byte or four), so each length
# below 64 is an alternative; pickletools handles longer strings.
_MEMO = rb"(?:q.|r...\0|p\d{1,7}+\n|\x94)"
_COUNTED, _COUNTED_IN_4 = (
    b"(?:%s)" % b"|".join(re.escape(n.to_bytes(size, "little")) + b".{%d}" % n for n in range(64))
    for size in (1, 4)
)
_BULK = re.compile(
    rb"(?:aS[^\n]*+\np\d{1,7}+\n|a?S[^\n]*+\n|a?g\d{1,7}+\n"
    rb"|[U\x8cC]" + _COUNTED + _MEMO + rb"?+|[XTB]" + _COUNTED_IN_4 + _MEMO + rb"?+"
    rb"|h.|j...\0|[aesuN\x88\x89]|V[^\n]*+\n|" + _MEMO + rb"|K.|M..|J.{4}|G.{8})*+",
    re.DOTALL,
)


def restricted_loads(
    data: bytes, name: str, allow: Constructors | None = None, *, encoding: str = "utf-8"
) -> object:
    """Unpickle `data`; `name` is the file name for errors.

    Dicts, lists, tuples, sets, strings, bytes and numbers are always allowed. `allow` maps other
    constructors, (module, name) in the pickle, to the callable that replaces them. A stand-in is
    safer than the real class, because the pickle may set its attributes (BUILD). `encoding` decodes
    byte strings of Python 2 ("bytes" keeps them). Raises InputError, with the byte if it is known.
    """
    unpickler = _Unpickler(data, name, allow or {}, encoding)
    _scan(data, name, unpickler.allow)
    collecting = gc.isenabled()
    gc.disable()  # collections would traverse all objects repeatedly and free none
    try:
        return unpickler.load()
    except InputError:
        raise
    except Exception as error:  # constructors receive arbitrary arguments from the pickle
        raise InputError(f"{name}: damaged pickle: {error or type(error).__name__}") from None
    finally:
        if collecting:
            gc.enable()


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, name: str, allow: Constructors, encoding: str) -> None:
        # The unpickler reads ahead through BufferedReader.peek; without peek, each line is a call.
        super().__init__(io.BufferedReader(io.BytesIO(data), 2**20), encoding=encoding)
        # Protocols below 4 pickle sets as calls, in Python 2 and in Python 3.
        sets: Constructors = {("__builtin__", "set"): set, ("builtins", "set"): set}
        self._name, self.allow = name, {**sets, **allow}
        self._elements_left = len(data)

    def find_class(self, module: str, name: str) -> Callable:
        if (module, name) not in self.allow:
            raise InputError(f"{self._name}: {_IMPORT.format(module, name)}")
        constructor = self.allow[module, name]
        return self._set if constructor is set else constructor

    def _set(self, elements: Collection = ()) -> set:
        # Seven bytes of pickle can copy a long list into a set.
        self._elements_left -= len(elements)
        if self._elements_left < 0:
            raise InputError(f"{self._name}: its sets have more elements than the file has bytes")
        return set(elements)


_IMPORT = "the pickle wants to import {}.{}, which is not allowed"


def _scan(data: bytes, name: str, allow: Constructors) -> None:
    """Raise InputError for the first opcode that is not allowed, and for a truncated pickle."""
    file = io.BytesIO(data)
    containers = tuples = position = 0

    def refused(reason: str) -> InputError:
        return InputError(f"{name}: byte {position:,}: {reason}")

    while True:
        bulk = _BULK.match(data, position)
        assert bulk is not None  # the pattern matches the empty string
        position = bulk.end()
        file.seek(position)
        try:
            opcode, argument, _ = next(pickletools.genops(file))
        except Exception as error:
            if position == len(data):
                cut = f"the pickle is cut short: it ends at byte {position:,}"
                raise InputError(f"{name}: {cut}") from None
            raise refused(f"damaged pickle: {error}") from None
        number = argument if isinstance(argument, int) else 0
        match opcode.name:
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                tuples += 1
            case "MARK" | "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET" | "LIST" | "DICT":
                containers += 1
            case "PUT" | "LONG_BINPUT" if not 0 <= number < _MAX_MEMO:
                raise refused(f"memo index {number} is beyond {_MAX_MEMO:,}")
            case "FRAME" if number > len(data) - file.tell():
                raise refused("the frame is longer than the file")
            case "GLOBAL" | "INST":
                module, _, attribute = str(argument).partition(" ")
                if opcode.name == "INST" or (module, attribute) not in allow:
                    raise refused(_IMPORT.format(module, attribute))
            case opcode_name if opcode_name in _FORBIDDEN:
                raise refused(f"opcode {opcode.name} is not allowed")
            case "STOP":
                return
        if containers + tuples > MAX_CONTAINERS or tuples > MAX_TUPLES:
            raise refused(
                f"more than {MAX_CONTAINERS:,} lists, dicts, sets, tuples and marks, "
                f"or more than {MAX_TUPLES:,} tuples"
            )
        position = file.tell()
