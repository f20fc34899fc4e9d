"""The one normal form in which typed and read text are compared."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempflow.rewards.normal_form import normalize, similarity

SAME = [
    ("Nan’s House", "Nan's House"),
    ("Nan‘s", "nan's"),
    ("Nan´s", "NAN`S"),
    ("rock ʼn’ roll", "rock 'n' roll"),
    ("5′ 11″", "5' 11\""),
    ("“quoted”", '"quoted"'),
    ("„quoted“", '"quoted"'),
    ("«quoted»", '"quoted"'),
    ("''quoted''", '"quoted"'),
    ("1914–1918", "1914-1918"),
    ("wait—what", "wait-what"),
    ("5 − 3", "5-3"),
    ("well‑known", "well-known"),
    ("－", "-"),
    ("ＯＰＥＮ２４ｈ", "open24h"),
    ("５０％", "50%"),
    ("ｶﾌｪ", "カフェ"),
    ("价格：１０", "价格:10"),
    ("E = mc²", "E=mc2"),
    ("H₂O", "H2O"),
    ("½ price", "1/2 price"),
    ("1⁄2", "1/2"),
    ("3∕4", "3/4"),
    ("№ 5", "No 5"),
    ("Hi…", "Hi..."),
    ("ﬁne", "fine"),
    ("STRASSE", "Straße"),
    ("ΣΊΣΥΦΟΣ", "σίσυφος"),
    ("cafe\u0301", "CAFÉ"),
    ("no\u00adsense", "nosense"),
    ("a\u200bb\u2060c\ufeff", "abc"),
    ("\u2066left\u2069", "left"),
    ("a\u00a0b\u202fc\u3000d\t\n", "a b c d"),
    ("❤\ufe0f", "❤"),
    ("e\u200b\u0301", "é"),
]
DIFFERENT = [
    ("café", "cafe"),
    ("OPEN", "0PEN"),
    ("it's", "its"),
    ("a-b", "ab"),
    ("Р", "P"),
    ("10", "1O"),
    ("カ", "ガ"),
    ("!", "?"),
]


@pytest.mark.parametrize("typed, read", SAME)
def test_what_no_reader_can_tell_apart_is_equal(typed, read):
    assert normalize(typed) == normalize(read)
    for contained, around in ((False, ""), (True, "and so on")):
        assert similarity(typed, around + read + around, contained=contained) == 1
        assert similarity(read, around + typed + around, contained=contained) == 1


@pytest.mark.parametrize("typed, read", DIFFERENT)
def test_what_a_reader_can_tell_apart_is_not(typed, read):
    assert normalize(typed) != normalize(read) and similarity(typed, read, contained=True) < 1


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
def test_the_form_is_one(text):
    """Spaces and case have no part in it, and what prints as ASCII stays itself."""
    assert normalize(f" {text}\n") == normalize(text)
    plain = "".join(char for char in text if char.isascii() and char.isalnum())
    assert normalize(plain.upper()) == plain.lower()
    assert not any(char.isspace() for char in normalize(text))
