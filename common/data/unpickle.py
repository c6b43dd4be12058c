"""Pickles from strangers: data, and the few constructors that the caller names; nothing else runs.

A pickle is a program. A find_class that knows a few names keeps it from calling anything else, but
not from filling the memory or overrunning the stack. So before Python's own unpickler runs it,
every opcode is looked at: those that call or import in ways that pickles of data do not need are
refused, and so are numbers that would make the unpickler reserve memory for things that the file
does not hold.

Memory stays in proportion to the pickle's size (at worst some 25 times; see MAX_CONTAINERS).
"""

import gc
import io
import pickle
import pickletools
import re
from collections.abc import Callable, Collection, Mapping

from common.errors import InputError

Constructors = Mapping[tuple[str, str], Callable]

# A byte of pickle can make an empty set of 216 bytes: so many lists, dicts, sets and tuples, one a
# review, stay below 1 GiB.
MAX_CONTAINERS = 4_000_000
# A tuple's hash calls that of its elements: tuples nested deeper than about 50,000 overrun the C
# stack when they are the key of a dict.
MAX_TUPLES = 10_000
# The memo is an array: its size is that of the largest index. Below 2**24 it takes 256 MiB.
_MAX_MEMO = 2**24

# The bulk of a pickle, at once and at the speed of the regular expression: strings with their place
# in the memo, references to the memo, numbers, appending. Before a string stands its length, in one
# byte or in four, so there is an alternative a length; longer ones are left to pickletools.
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
    """The object that the pickle `data` describes; `name` is the file that errors speak of.

    Dicts, lists, tuples, sets, strings, bytes and numbers are always read. What else may be
    constructed is in `allow`: (module, name), as the pickle has them, to what is called in its
    place. A stand-in of one's own is safer there than the real thing, whose attributes the pickle
    may set (BUILD). `encoding` is that of Python 2's byte strings ("bytes" leaves them alone).
    Raises InputError, with the byte where there is one.
    """
    unpickler = _Unpickler(data, name, allow or {}, encoding)
    _scan(data, name, unpickler.allow)
    collecting = gc.isenabled()
    gc.disable()  # it would look at every word again and again, and find nothing
    try:
        return unpickler.load()
    except InputError:
        raise
    except Exception as error:  # the constructors, too, are given whatever the pickle holds
        raise InputError(f"{name}: damaged pickle: {error or type(error).__name__}") from None
    finally:
        if collecting:
            gc.enable()


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, name: str, allow: Constructors, encoding: str) -> None:
        # Without a buffer to peek into, the unpickler asks for every line by a call of its own.
        super().__init__(io.BufferedReader(io.BytesIO(data), 2**20), encoding=encoding)
        # Below protocol 4, sets are pickled as calls, by Python 2 and by Python 3.
        sets: Constructors = {("__builtin__", "set"): set, ("builtins", "set"): set}
        self._name, self.allow = name, {**sets, **allow}
        self._elements_left = len(data)

    def find_class(self, module: str, name: str) -> Callable:
        if (module, name) not in self.allow:
            raise InputError(f"{self._name}: {_IMPORT.format(module, name)}")
        constructor = self.allow[module, name]
        return self._set if constructor is set else constructor

    def _set(self, elements: Collection = ()) -> set:
        # Seven bytes of pickle can ask for another copy of a long list as a set.
        self._elements_left -= len(elements)
        if self._elements_left < 0:
            raise InputError(f"{self._name}: its sets have more elements than the file has bytes")
        return set(elements)


_IMPORT = "the pickle wants to import {}.{}, which is not allowed"


def _scan(data: bytes, name: str, allow: Constructors) -> None:
    """Raise InputError for the first opcode that might harm, or where the pickle ends early."""
    file = io.BytesIO(data)
    containers = tuples = position = 0

    def refused(why: str) -> InputError:
        return InputError(f"{name}: byte {position:,}: {why}")

    while True:
        bulk = _BULK.match(data, position)
        assert bulk is not None  # the empty match at least
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
            # No pickle of data has these. They call what is outside of the file, or refer to it.
            # (The other opcodes that call get at nothing but what find_class has handed out.)
            case "OBJ" | "PERSID" | "BINPERSID" | "EXT1" | "EXT2" | "EXT4" | "DUP":
                raise refused(f"opcode {opcode.name} is not allowed")
            case "NEXT_BUFFER" | "READONLY_BUFFER":
                raise refused(f"opcode {opcode.name} is not allowed")
            case "STOP":
                return
        if containers + tuples > MAX_CONTAINERS or tuples > MAX_TUPLES:
            raise refused(
                f"more than {MAX_CONTAINERS:,} lists, dicts and sets or {MAX_TUPLES:,} tuples"
            )
        position = file.tell()
