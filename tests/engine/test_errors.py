"""Messages stay short, whatever they quote."""

import pytest

from tempflow.errors import SCREEN, VALUE, RankError, UserError, note, shortened, shown

SIZES = [0, 1, 90, 98, 99, 1985, 1986, 1987, 2000, 10**6]


@pytest.mark.parametrize("size", SIZES)
def test_a_message_fits_a_screen(size):
    """It keeps its beginning, which names the key, and its end, which says what is allowed."""
    for kind in (UserError, RankError):
        text = str(kind("key: " + "x" * size + "; allowed"))
        assert len(text) <= SCREEN and text.startswith("key: ") and text.endswith("; allowed")
        assert str(kind(text)) == text


@pytest.mark.parametrize("size", SIZES)
def test_a_value_fits_a_line(size):
    for value in ("x" * size, ["x" * size], {"x" * size: 1}, b"x" * size):
        text = shown(value)
        assert len(text) <= VALUE
        assert text == repr(value) or (
            text[:40] == repr(value)[:40] and text[-10:] == repr(value)[-10:]
        )
        assert text == repr(value) or f"({len(repr(value))} characters)" in text


def test_values_that_have_no_text():
    assert shown(10**5000) == f"a int of {(10**5000).bit_length()} bits"
    assert (
        shown(None) == "None" and shown(float("nan")) == "nan" and shown("\x1b[1m") == "'\\x1b[1m'"
    )
    assert shortened("abc", 3) == "abc"


@pytest.mark.parametrize("rank, told", [(None, True), ("0", True), ("3", False)])
def test_notes_are_told_once_and_not_in_a_result(monkeypatch, capsys, rank, told):
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    note("one thing")
    assert capsys.readouterr() == ("", "note: one thing\n" if told else "")
