"""From a review to its words: the one tokenizer, used for training and for prediction."""

import html
import re

# Part of the key of every cache that holds tokens: raise it when clean or tokenize changes.
TOKENIZER_VERSION = 1

# A run of tags is one match, for they become one space.
_TAG = r"</?[a-zA-Z][^<>]*+>"
_MARKUP = re.compile(rf"{_TAG}(?:\s*+{_TAG})*+")
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
# The same for ASCII, several times as fast. Tables for bytes.translate: what split() takes for a
# space; what lower() and _WORD make of a character, a space where no word has it. Of apostrophes,
# those that are not between two letters or digits.
_LATIN = [chr(i) for i in range(256)]
_BLANKS = bytes(ord(" " if char.isspace() else char) for char in _LATIN)
_LETTERS = bytes(ord(char.lower() if char.isalnum() or char == "'" else " ") for char in _LATIN)
_OUTSIDE = re.compile(r"'(?!(?<=[a-z0-9]')[a-z0-9])")


def clean(text: str) -> str:
    """The text without markup (<br /> and other tags, &amp; and other entities), on one line."""
    if "<" in text:
        text = _MARKUP.sub(" ", text)
    text = html.unescape(text)
    if not text.isascii():
        return " ".join(text.split())
    text = text.encode().translate(_BLANKS).decode()
    while "  " in text:
        text = text.replace("  ", " ")
    return text.strip(" ")


def tokenize(text: str) -> list[str]:
    """The words of a cleaned text in lower case: letters and digits, apostrophes inside a word."""
    if not text.isascii():
        return _WORD.findall(text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    return _OUTSIDE.sub(" ", text.encode().translate(_LETTERS).decode()).split()
