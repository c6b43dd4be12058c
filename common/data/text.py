"""The tokenizer, used for training and for prediction."""

import html
import re
import sys
from html.entities import html5

# Part of the cache keys of tokens: raise it when clean or tokenize changes.
TOKENIZER_VERSION = 1

# A run of tags is one match, because it becomes one space.
_TAG = r"</?[a-zA-Z][^<>]*+>"
_MARKUP = re.compile(rf"{_TAG}(?:\s*+{_TAG})*+")
_LONG_NUMBER = re.compile(r"&#([0-9]{9,})")
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
# Faster equivalents for ASCII. Tables for bytes.translate: _BLANKS maps the characters at which
# split() splits to a space; _LETTERS maps each character to lower case, or to a space if no word
# contains it. _OUTSIDE matches apostrophes that are not between two letters or digits.
_LATIN = [chr(i) for i in range(256)]
_BLANKS = bytes(ord(" " if char.isspace() else char) for char in _LATIN)
_LETTERS = bytes(ord(char.lower() if char.isalnum() or char == "'" else " ") for char in _LATIN)
_APOSTROPHE = "\N{RIGHT SINGLE QUOTATION MARK}"
_OUTSIDE = re.compile(r"'(?!(?<=[a-z0-9]')[a-z0-9])")


def clean(text: str) -> str:
    """The text on one line, without tags such as <br /> and with entities such as &amp; decoded."""
    if "<" in text:
        text = _MARKUP.sub(" ", text)
    if "&#" in text:  # int() refuses thousands of digits; eight digits already are no character
        text = _LONG_NUMBER.sub(lambda match: f"&#{match[1].lstrip('0')[:8] or 0}", text)
    text = html.unescape(text)
    if not text.isascii():
        return " ".join(text.split())
    text = text.encode().translate(_BLANKS).decode()
    while "  " in text:
        text = text.replace("  ", " ")
    return text.strip(" ")


def tokenize(text: str) -> list[str]:
    """The words of a cleaned text in lower case: letters, digits and apostrophes between them."""
    if not text.isascii():
        return _WORD.findall(text.lower().replace(_APOSTROPHE, "'"))
    return _OUTSIDE.sub(" ", text.encode().translate(_LETTERS).decode()).split()


def specification() -> dict[str, str | dict[str, str]]:
    """`clean` and `tokenize` as data, for programs in other languages: see docs/export.md.

    The patterns are valid in Python and, with the flag u, in JavaScript.
    """
    places = [*range(0xA0), *range(0xFDD0, 0xFDF0)]
    places += [plane << 16 | low for plane in range(17) for low in (0xFFFE, 0xFFFF)]
    numbers = {f"#{place}": html.unescape(f"&#{place};") for place in places}
    other = {name: text for name, text in numbers.items() if text != chr(int(name[1:]))}
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    letters = "".join(f"{run[0]}-{run[-1]}" for run in re.findall(r"[^\W_]+", every))
    return {
        "tag": _TAG.replace("*+", "*"),
        "reference": r"&(?:#([0-9]+);?|#[xX]([0-9a-fA-F]+);?|([^\t\n\f <&#;]{1,32};?))",
        "characters": html5 | other,
        "apostrophe": _APOSTROPHE,
        "word": f"[{letters}]+(?:'[{letters}]+)*",
    }
