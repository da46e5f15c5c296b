from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_nmsparse.documents import DocumentError
from hf_nmsparse.markup import Tag
from tests.documents.reading import Asked, Known, loud, same, swapped, translated

SRT = """1
00:00:06,174 --> 00:00:12,305
{\\an8}Over a <i>century ago, beings</i> that
  prey on humans suddenly appeared.

2
00:00:16,851 --> 00:00:22,190 X1:40 X2:600
<i>Boo!</i>

7
00:00:25,000 --> 00:00:27,000
- Where is
it?
- Over <b>there.

8
0:00:28,000 --> 0:00:29,000

9
00:00:30,000 --> 00:00:31,000
one

two
"""
LOUD_SRT = """1
00:00:06,174 --> 00:00:12,305
{\\an8}OVER A <i>CENTURY AGO, BEINGS</i> THAT
  PREY ON HUMANS SUDDENLY APPEARED.

2
00:00:16,851 --> 00:00:22,190 X1:40 X2:600
<i>BOO!</i>

7
00:00:25,000 --> 00:00:27,000
- WHERE IS
IT?
- OVER <b>THERE.

8
0:00:28,000 --> 0:00:29,000

9
00:00:30,000 --> 00:00:31,000
ONE

TWO
"""
VTT = """WEBVTT - a title
Language: en

NOTE
a note

STYLE
::cue(b) { color: red }

id 1
00:06.174 --> 00:00:12.305 align:left
<v Roger>Fish &amp; chips at <c.loud>noon</c>
or later

00:13.000 --> 00:00:14.000

x
00:15.000 --> 00:00:16.000
a &lt; b<00:15.500>c"""
LOUD_VTT = """WEBVTT - a title
Language: en

NOTE
a note

STYLE
::cue(b) { color: red }

id 1
00:06.174 --> 00:00:12.305 align:left
<v Roger>FISH &amp; CHIPS AT <c.loud>NOON</c>
OR LATER

00:13.000 --> 00:00:14.000

x
00:15.000 --> 00:00:16.000
A &lt; B<00:15.500>C"""


@pytest.mark.parametrize(("form", "text", "expected"), [("srt", SRT, LOUD_SRT), ("vtt", VTT, LOUD_VTT)])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_documents(form: str, text: str, expected: str, end: str, mark: str) -> None:
    text, expected = (mark + one.replace("\n", end) for one in (text, expected))
    assert translated(form, text, same) == text.encode()
    assert translated(form, text, loud) == expected.encode()


def test_what_is_asked_for() -> None:
    asked = Asked()
    translated("srt", SRT, asked)
    opened, closed = Tag("<i>", "open"), Tag("</i>", "close")
    assert asked.texts == [
        ("Over a ", opened, "century ago, beings", closed, " that prey on humans suddenly appeared."),
        ("Boo!",),
        ("Where is it?",),
        ("Over ", Tag("<b>", "void"), "there."),
        ("one",),
        ("two",),
    ]
    asked = Asked()
    translated("vtt", VTT, asked)
    assert asked.texts[0][0] == "Fish & chips at "


def test_a_line_before_the_speakers_is_a_part_of_its_own() -> None:
    asked = Asked()
    translated("srt", "1\n00:00:01,000 --> 00:00:02,000\nAT THE\nDOOR\n- Hello.\n- Try\nagain.\n", asked)
    assert asked.texts == [("AT THE DOOR",), ("Hello.",), ("Try again.",)]


@pytest.mark.parametrize(
    ("line", "asked", "written"),
    [
        ("{\\an8}-Hello.", "Hello.", "{\\an8}-HELLO."),
        ("<i>\u2013 yes</i>", "yes", "<i>\u2013 YES</i>"),
        ("-5 degrees", "-5 degrees", "-5 DEGREES"),
        ("well - yes", "well - yes", "WELL - YES"),
    ],
)
def test_the_dash_of_a_speaker_stays(line: str, asked: str, written: str) -> None:
    ask = Asked()
    found = translated("srt", f"1\n00:00:01,000 --> 00:00:02,000\n{line}\n", ask)
    assert ask.texts == [(asked,)]
    assert found.decode().splitlines()[2] == written


def test_a_cue_is_wrapped_by_length() -> None:
    cue = "1\n00:00:01,000 --> 00:00:02,000\nOver a century ago, beings that\nprey on humans suddenly appeared.\n"
    german = "Vor mehr als hundert Jahren tauchten plötzlich Wesen auf, die Jagd auf Menschen machen."
    known = Known({"Over a century ago, beings that prey on humans suddenly appeared.": german})
    lines = translated("srt", cue, known).decode().split("\n")[2:]
    assert lines == ["Vor mehr als hundert Jahren tauchten plötzlich", "Wesen auf, die Jagd auf Menschen machen.", ""]


def test_a_translation_breaks_no_cue() -> None:
    cue = "1\n00:00:01,000 --> 00:00:02,000\na\n\n2\n00:00:03,000 --> 00:00:04,000\nb\n"
    strange = "1\n\n2\n00:00:01,000 --> 00:00:02,000 <i> & x"
    out = translated("srt", cue, Known({"a": strange, "b": "B"})).decode()
    assert out == cue.replace("a\n", "1 2 00:00:01,000 -> 00:00:02,000 <i> & x\n").replace("b\n", "B\n")
    out = translated("vtt", f"WEBVTT\n\n{cue}", Known({"a": strange, "b": "B"})).decode()
    assert "1 2 00:00:01,000 --&gt; 00:00:02,000 &lt;i&gt; &amp; x\n" in out


@pytest.mark.parametrize(
    ("form", "data", "message"),
    [
        ("srt", "Hello\n", "line 1 belongs to no subtitle; name its format with --format"),
        ("srt", VTT, "line 1 belongs to no subtitle"),
        ("srt", "1\n\n00:00:01,000 --> 00:00:02,000\nx\n", "line 1 belongs to no subtitle"),
        ("vtt", SRT, "does not begin with WEBVTT; name its format with --format"),
        ("vtt", "WEBVTTX\n", "does not begin with WEBVTT"),
        ("srt", SRT.encode("utf-16"), "is UTF-16; make it UTF-8"),
        ("srt", SRT.encode("utf-32"), "is UTF-32; make it UTF-8"),
        ("srt", SRT.encode() + b"\xe9", "line 24 is not UTF-8; make it UTF-8"),
        ("vtt", VTT + "\n\0", "line 20 holds a NUL"),
    ],
)
def test_bad(form: str, data: str | bytes, message: str) -> None:
    with pytest.raises(DocumentError) as raised:
        translated(form, data, loud)
    assert message in str(raised.value)


LINES = st.lists(
    st.sampled_from(["a b", "- c", "<i>d", "e</i> f", "7", "", " ", "{\\an8}g", "h &amp; i", "NOTE j", "\u4e2d\u6587"])
)


@given(st.lists(LINES), st.sampled_from(["\n", "\r\n"]), st.sampled_from(["srt", "vtt"]))
def test_only_letters_change(cues: list[list[str]], end: str, form: str) -> None:
    lines = ["WEBVTT", ""] if form == "vtt" else []
    for number, cue in enumerate(cues):
        lines += [str(number), "00:00:01.000 --> 00:00:02.000", *cue, ""]
    text = end.join(lines)
    assert translated(form, text, same) == text.encode()
    out = translated(form, text, swapped).decode()
    assert out.lower() == text.lower()
    assert translated(form, out, swapped).decode() == text
