from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_nmsparse.documents import DocumentError
from tests.documents.reading import Known, loud, same, translated

PAGE = "<!DOCTYPE html>\r\n<p class=x>one <b>two</b> &amp; three<br>\n<!-- no -->\n<pre>code</pre><p>f\u00fcnf\n"


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_page(mark: str) -> None:
    assert translated("html", mark + PAGE, same) == (mark + PAGE).encode()
    out = translated("html", mark + PAGE, loud).decode()
    assert out == mark + PAGE.replace("one", "ONE").replace("two", "TWO").replace("three", "THREE").replace(
        "f\u00fcnf", "F\u00dcNF"
    )


@pytest.mark.parametrize(
    ("head", "encoding"),
    [
        ('<meta charset="windows-1252">', "cp1252"),
        ("<META http-equiv=x content='text/html; charset=ISO-8859-1'>", "cp1252"),
        ("<meta charset=us-ascii>", "cp1252"),
        ("<meta charset=shift_jis>", "shift_jis"),
        ("<meta charset=utf-8>", "utf-8"),
        ("<meta charset=UTF-16>", "utf-8"),  # it would not be read so far
    ],
)
def test_encodings(head: str, encoding: str) -> None:
    text = "\u65e5\u672c" if encoding == "shift_jis" else "f\u00fcnf"
    page = f"{head}<p>{text}<p>a"
    known = Known({text: text, "a": "\u20ac \u017c"})
    out = translated("html", page.encode(encoding), known)
    assert out == page.removesuffix("a").encode(encoding) + "\u20ac \u017c".encode(encoding, "xmlcharrefreplace")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (PAGE.encode("utf-16"), "is UTF-16; make it UTF-8"),
        (b"<p>\xff", "line 1 is not UTF-8; make it UTF-8"),
        (b"<meta charset=shift_jis>\x81", "is not shift_jis, which it names: incomplete multibyte sequence at byte 24"),
        (b"<meta charset=no-such>", "names an unknown encoding, no-such; make it UTF-8"),
        (b"<meta charset=zlib>", "names an unknown encoding, zlib; make it UTF-8"),
    ],
)
def test_bad(data: bytes, message: str) -> None:
    with pytest.raises(DocumentError) as raised:
        translated("html", data, loud)
    assert message in str(raised.value)


_PIECES = st.sampled_from(
    ["a", "B ", "<b>", "</b>", "<p>", "<", ">", "&amp;", "&", "&#65;", "<br/>", "<!--", "-->", "\n"]
)


@given(st.lists(_PIECES, min_size=1).map("".join))
def test_any_page(page: str) -> None:
    assert translated("html", page, same).decode() == page
