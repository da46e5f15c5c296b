from __future__ import annotations

import polib
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_nmsparse.documents import DocumentError, Options
from tests.documents.reading import Asked, Known, loud, same, translated

HEADER = r"""# A comment
msgid ""
msgstr ""
"Language: pl\n"
"Content-Type: text/plain; charset=UTF-8\n"
"Plural-Forms: nplurals=3; plural=(n==1 ? 0 : n%10>=2 ? 1 : 2);\n"
"""
PO = (
    HEADER
    + r"""
#. of a button
#: a.py:1
msgid "Open"
msgstr ""

#, python-format
#| msgid "%s fil"
msgctxt "menu"
msgid "%s file"
msgid_plural ""
"%s "
"files"
msgstr[0] ""
msgstr[1] ""

msgid "Close"
msgstr "Zamknij"

#, fuzzy
msgid "Save\n"
msgstr ""

#| msgid "Two"
msgid ""
"Two \"lines\"\n"
"of\ttext"
msgstr ""

msgid "100%"
msgstr ""

#~ msgid "Old"
#~ msgstr "" """
)
LOUD_PO = (
    HEADER
    + r"""
#. of a button
#: a.py:1
#, fuzzy
msgid "Open"
msgstr "OPEN"

#, fuzzy, python-format
#| msgid "%s fil"
msgctxt "menu"
msgid "%s file"
msgid_plural ""
"%s "
"files"
msgstr[0] "%S FILE"
msgstr[1] "%S FILES"
msgstr[2] "%S FILES"

msgid "Close"
msgstr "Zamknij"

#, fuzzy
msgid "Save\n"
msgstr "SAVE\n"

#, fuzzy
#| msgid "Two"
msgid ""
"Two \"lines\"\n"
"of\ttext"
msgstr ""
"TWO \"LINES\"\n"
"OF\tTEXT"

#, fuzzy
msgid "100%"
msgstr "100%"

#~ msgid "Old"
#~ msgstr "" """
)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_catalogue(end: str) -> None:
    text, expected = (one.replace("\n", end) for one in (PO, LOUD_PO))
    assert translated("po", text, loud).decode() == expected
    assert translated("po", expected, loud).decode() == expected  # nothing is left to be translated


def test_overwrite() -> None:
    asked = Asked()
    out = translated("po", LOUD_PO, asked, Options(overwrite=True)).decode()
    assert 'msgstr "CLOSE"' in out
    assert ("Close",) in asked.texts
    assert ("Old",) not in asked.texts
    assert out == LOUD_PO.replace('msgid "Close"\nmsgstr "Zamknij"', '#, fuzzy\nmsgid "Close"\nmsgstr "CLOSE"')


def test_a_form_that_is_there_stays() -> None:
    text = HEADER + '\nmsgid "a file"\nmsgid_plural "files"\nmsgstr[0] "plik"\nmsgstr[1] ""\nmsgstr[2] ""'
    out = translated("po", text, loud).decode()
    assert out.endswith(
        '#, fuzzy\nmsgid "a file"\nmsgid_plural "files"\nmsgstr[0] "plik"\nmsgstr[1] "FILES"\nmsgstr[2] "FILES"'
    )


def test_a_language_with_one_form() -> None:
    text = HEADER.replace("nplurals=3", "nplurals=1") + '\nmsgid "file"\nmsgid_plural "%d files"\nmsgstr[0] ""\n'
    assert translated("po", text, loud).decode().endswith('msgstr[0] "%D FILES"\n')


def test_flags_of_an_obsolete_message_are_its_own() -> None:
    old = '#, fuzzy\n#~ msgid "b"\n#~ msgstr "c"\n\n'
    found = translated("po", f'{old}msgid "a"\nmsgstr ""\n', loud).decode()
    assert found == f'{old}#, fuzzy\nmsgid "a"\nmsgstr "A"\n'


def test_a_message_without_a_translation_stays_as_it_is() -> None:
    assert translated("po", PO, lambda texts: [("",) for _ in texts]).decode() == PO.replace(
        'msgid "100%"\nmsgstr ""', '#, fuzzy\nmsgid "100%"\nmsgstr "100%"'
    )


def test_what_a_translation_holds_is_quoted() -> None:
    out = translated("po", 'msgid "a"\nmsgstr ""\n', Known({"a": 'b"\\\n\x07'})).decode()
    assert out == '#, fuzzy\nmsgid "a"\nmsgstr ""\n"b\\"\\\\\\n"\n"\\a"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Hello\n", "line 1 is no line of a message catalogue: 'Hello'"),
        ('"a"\n', "line 1 is no line"),
        ('msgid "a\nmsgstr ""\n', "line 1 is no line"),
        ('msgid "a"b"\nmsgstr ""\n', "line 1 is no line"),
        ('msgid "a"\n\nmsgid "b"\nmsgstr ""\n', "line 3: another msgid in one message"),
        ('msgid "a"\n', "the message before line 2 lacks a msgid or a msgstr"),
        ('msgstr "a"\n', "the message before line 2 lacks a msgid or a msgstr"),
        ('msgid "a\\q"\nmsgstr ""\n', "line 1: unknown escape \\q"),
        ('msgid "\\303\\244"\nmsgstr ""\n', "line 1: unknown escape \\303"),
        (HEADER.replace("UTF-8", "ISO-8859-2"), "its header names the charset ISO-8859-2; make it UTF-8"),
        ('msgid "a"\nmsgid_plural "b"\nmsgstr[0] ""\n', "its header does not say nplurals"),
    ],
)
def test_bad(text: str, message: str) -> None:
    with pytest.raises(DocumentError) as raised:
        translated("po", text, loud)
    assert message in str(raised.value)


entries = st.builds(
    polib.POEntry,
    msgid=st.text('aB \n"\\\t', min_size=1),
    msgstr=st.sampled_from(["", "x y", 'q"\n']),
    flags=st.sampled_from([[], ["python-format"], ["fuzzy", "c-format"]]),
    comment=st.sampled_from(["", "note"]),
    obsolete=st.booleans(),
)


@given(st.lists(entries, unique_by=lambda entry: entry.msgid))
def test_others_read_what_is_written(made: list[polib.POEntry]) -> None:
    catalogue = polib.POFile()
    catalogue.metadata = {"Content-Type": "text/plain; charset=UTF-8"}
    catalogue.extend(made)
    text = str(catalogue)
    out = translated("po", text, same).decode()
    read = polib.pofile(out)
    assert [entry.msgid for entry in read] == [entry.msgid for entry in polib.pofile(text)]
    for entry, before in zip(read, polib.pofile(text), strict=True):
        new = bool(before.msgid.strip() and not before.msgstr and not before.obsolete)
        assert entry.msgstr == (before.msgid if new else before.msgstr)
        assert set(entry.flags) == set(before.flags) | ({"fuzzy"} if new else set())
        assert (entry.comment, entry.obsolete) == (before.comment, before.obsolete)
    assert translated("po", out, loud).decode() == out
