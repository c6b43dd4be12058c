"""From a review to its words: the one tokenizer, used for training and for prediction."""

import html
import re

# Part of the key of every cache that holds tokens: raise it when clean or tokenize changes.
TOKENIZER_VERSION = 1

_MARKUP = re.compile(r"</?[a-zA-Z][^<>]*>")
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
# What _WORD and lower() make of ASCII, as a table: all that no word is made of becomes a space.
_ASCII = {i: chr(i).lower() if chr(i).isalnum() or chr(i) == "'" else " " for i in range(128)}


def clean(text: str) -> str:
    """The text without markup (<br /> and other tags, &amp; and other entities), on one line."""
    if "<" in text:
        text = _MARKUP.sub(" ", text)
    return " ".join(html.unescape(text).split())


def tokenize(text: str) -> list[str]:
    """The words of a cleaned text in lower case: letters and digits, apostrophes inside a word."""
    if not text.isascii():
        return _WORD.findall(text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    # The same without the regular expression, which takes twice as long.
    text = text.translate(_ASCII)
    if "'" in text:  # keep those between two letters or digits: beside no other and no space
        text = f" {text} ".replace("''", "  ").replace(" '", "  ").replace("' ", "  ")
    return text.split()
