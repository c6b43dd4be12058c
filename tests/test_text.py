from common.text import clean, tokenize


def test_clean_takes_out_markup_and_nothing_else() -> None:
    assert clean("Good.<br /><br />Bad <i>film</i> &amp; <b>more") == "Good. Bad film & more"
    assert clean("I <3 it: 5 < 6 > 2, R&B") == "I <3 it: 5 < 6 > 2, R&B"
    assert clean(" \n ") == ""


def test_tokenize_gives_lower_case_words_with_inner_apostrophes() -> None:
    assert tokenize("Don't STOP -- it's 'great', 10/10!") == [
        "don't",
        "stop",
        "it's",
        "great",
        "10",
        "10",
    ]
    assert tokenize("don\u2019t caf\u00e9_noir") == ["don't", "caf\u00e9", "noir"]
    assert tokenize("!?") == []
