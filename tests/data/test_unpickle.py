"""The restricted unpickler: data in, nothing run, memory in proportion to the file."""

import pickle
import tracemalloc
from pathlib import Path

import pytest

from common.data.unpickle import restricted_loads
from common.errors import InputError

DATA = (
    {"books": [["a", "long", "read"], []], "é": [["naïve" * 60]]},
    {1: -1.5, 2**40: 2**90, -70_000: None, 300: True, "s": b"bytes"},
    {"one", "two"},
    [list(range(2_000)), "x" * 300, "y" * 70_000],
)


@pytest.mark.parametrize("protocol", range(6))
def test_data_round_trip(protocol: int) -> None:
    data = DATA if protocol else (DATA[0], {"n": 2**90, 1: -1.5, 2: False}, {"one"}, DATA[3])
    # Below protocol 3, bytes are pickled as a call of codecs.encode; Python 2 does not do that.
    allow = {("_codecs", "encode"): str.encode}
    assert restricted_loads(pickle.dumps(data, protocol), "f", allow) == data


def test_python_2_strings_and_sets() -> None:
    # cPickle.dumps((set(["it's", "na\xefve"]), u"\u00e9"), 2)
    python_2 = (
        b"\x80\x02c__builtin__\nset\nq\x01]q\x02(U\x04it'sq\x03U\x05na\xefveq\x04e\x85q\x05Rq\x06"
        b"X\x02\x00\x00\x00\xc3\xa9q\x07\x86q\x08."
    )
    assert restricted_loads(python_2, "f", encoding="bytes") == ({b"it's", b"na\xefve"}, "é")
    assert restricted_loads(python_2, "f", encoding="latin-1") == ({"it's", "naïve"}, "é")
    with pytest.raises(InputError, match=r"f: damaged pickle: 'utf-8' codec"):
        restricted_loads(python_2, "f")


def test_only_what_is_allowed_is_constructed() -> None:
    pickled = pickle.dumps([complex(1, 2)])
    with pytest.raises(InputError, match=r"f: .* import builtins\.complex, which is not allowed"):
        restricted_loads(pickled, "f")
    stand_in = restricted_loads(pickled, "f", {("builtins", "complex"): lambda *parts: parts})
    assert stand_in == [(1, 2)]


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"cos\nsystem\n(S'touch ran'\ntR.", r"byte 0: .* import os\.system"),
        (b"(S'touch ran'\nios\nsystem\n.", r"byte 14: .* import os\.system"),
        (b"(cos\nsystem\nS'touch ran'\no.", r"byte 1: .* import os\.system"),
        (b"\x8c\x02os\x8c\x06system\x93\x8c\x09touch ran\x85R.", r"import os\.system"),
        (b"c__builtin__\neval\n.", r"byte 0: .* import __builtin__\.eval"),
        (b"\x82\x01.", "byte 0: opcode EXT1 is not allowed"),
        (b"Pname\n.", "byte 0: opcode PERSID is not allowed"),
        (b"K\x01Q.", "byte 2: opcode BINPERSID is not allowed"),
        (b"(o.", "byte 1: opcode OBJ is not allowed"),
        (b"}}b.", "damaged pickle"),
        (b"(lp0\nS'abc", "byte 5: damaged pickle: no newline"),
        (b"]K\x01a", "cut short: it ends at byte 4"),
        (b"", "cut short: it ends at byte 0"),
        (b"\xff", "byte 0: damaged pickle: .*opcode"),
        (b"]a.", "damaged pickle: unpickling stack underflow"),
        (b"}(]K\x01u.", "damaged pickle: unhashable type"),
        # What would take memory, time or the C stack out of proportion.
        (b"](r\xff\xff\xff\x7f.", "byte 2: memo index 2147483647 is beyond"),
        (b"](p99999999\n.", "byte 2: memo index 99999999 is beyond"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x0fabc.", "byte 0: .* but only 4 remain"),
        (b"\x95\xff\xff\xff\xff\xff\xff\xff\x0fabc.", "byte 0: the frame is longer"),
        (b"L" + b"9" * 10_000 + b"\n.", "byte 0: damaged pickle: Exceeds the limit"),
        (b"}(" + b")" + b"\x85" * 1_000_000 + b"K\x01u.", "more than .* 10,000 tuples"),
        (
            b"c__builtin__\nset\nq\0](" + b"K\0" * 50 + b"eq\1" + b"0h\0h\1\x85R" * 100 + b".",
            "its sets",
        ),
    ],
)
def test_harmful_and_damaged_pickles(
    pickled: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=f"^f: (?:.*)?{message}"):
            restricted_loads(pickled, "f")
        assert tracemalloc.get_traced_memory()[1] < 8_000_000 + 40 * len(pickled)
    finally:
        tracemalloc.stop()
    assert not Path("ran").exists()
