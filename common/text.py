"""From a review to its words: the one tokenizer, used for training and for prediction."""

import html
import re

# Part of the key of every cache that holds tokens: raise it when clean or tokenize changes.
TOKENIZER_VERSION = 1

_MARKUP = re.compile(r"</?[a-zA-Z][^<>]*>")
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def clean(text: str) -> str:
    """The text without markup (<br /> and other tags, &amp; and other entities), on one line."""
    return " ".join(html.unescape(_MARKUP.sub(" ", text)).split())


def tokenize(text: str) -> list[str]:
    """The words of a cleaned text in lower case: letters and digits, apostrophes inside a word."""
    return _WORD.findall(text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
