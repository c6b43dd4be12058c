import re

from hypothesis import example, given
from hypothesis import strategies as st

from common.data.text import clean, tokenize

# Letters of several scripts and cases, marks, digits, surrogates, what looks like an apostrophe or
# a space, and what is special in markup; besides any character at all.
NASTY = (
    "aZ0\u00df\u0130\u0131\u03a3\u03c3\u0301\u00e9\u4e2d\u0663\u00b2_'\u2019`<>/&;#!"
    " \n\x1c\x85\u00a0\u2028\x00\ud800\udfff"
)
TEXTS = st.text(st.sampled_from(NASTY) | st.characters(codec=None), max_size=40)


def plain(text: str) -> list[str]:
    """The definition of a word, without optimizations."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("\u2019", "'"))


@given(TEXTS | st.text(st.characters(max_codepoint=127), max_size=40))
@example("'''a''b'c' 'd'e'")
@example("\u0130'\u03a3 \u03a3\u03a3'\u03a3")
def test_tokenize_matches_reference(text: str) -> None:
    assert tokenize(text) == plain(text)


def test_tokenize_matches_reference_on_apostrophes() -> None:
    parts = [""]
    for _ in range(6):
        parts = [part + more for part in parts for more in ("a", "'", " ", "_")]
    for text in parts:
        assert tokenize(text) == plain(text)


PIECES = ("<b>", "<br />", "</i", "<", ">", "&lt;", "&#60", "&nbsp;", *" \n\x1f\u2003a/é")


@given(TEXTS | st.lists(st.sampled_from(PIECES), max_size=20).map("".join))
def test_clean_matches_reference(text: str) -> None:
    import html

    expected = " ".join(html.unescape(re.sub(r"</?[a-zA-Z][^<>]*>", " ", text)).split())
    assert clean(text) == expected


def test_clean_removes_only_markup() -> None:
    assert clean("Good.<br /><br />Bad <i>film</i> &amp; <b>more") == "Good. Bad film & more"
    assert clean("I <3 it: 5 < 6 > 2, R&B") == "I <3 it: 5 < 6 > 2, R&B"
    assert clean(" \n ") == ""


def test_numbers_of_thousands_of_digits() -> None:
    """int() refuses numbers of thousands of digits."""
    assert clean(f"&#{'1' * 5_000};film") == "\N{REPLACEMENT CHARACTER}film"
    assert (
        clean(f"&#{'0' * 5_000}65;film &#0000000065 &#{'0' * 9}")
        == "Afilm A \N{REPLACEMENT CHARACTER}"
    )
