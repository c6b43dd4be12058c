"""From a review to its words: the one tokenizer, used for training and for prediction."""

import html
import re

# Part of the key of every cache that holds tokens: raise it when clean or tokenize changes.
TOKENIZER_VERSION = 1

_MARKUP = re.compile(r"</?[a-zA-Z][^<>]*>")
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
# The same for ASCII, as tables for bytes.translate, which takes next to no time: what split() takes
# for a space; and what lower() and _WORD make of a character, a space where no word has it.
_LATIN = [chr(i) for i in range(256)]
_BLANKS = bytes(ord(" " if char.isspace() else char) for char in _LATIN)
_LETTERS = bytes(ord(char.lower() if char.isalnum() or char == "'" else " ") for char in _LATIN)


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
    text = text.encode().translate(_LETTERS).decode()
    if "'" in text:  # keep those between two letters or digits: beside no other and no space
        text = f" {text} ".replace("''", "  ").replace(" '", "  ").replace("' ", "  ")
    return text.split()
