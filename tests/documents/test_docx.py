from __future__ import annotations

import html
import io
import zipfile
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import docx
import pytest
from docx.oxml import parse_xml
from docx.oxml.ns import nsdecls
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from hf_nmsparse.documents import DocumentError
from hf_nmsparse.markup import Marked, Tag
from tests.documents.reading import Asked, Known, loud, same, translated


def saved(document: Any) -> bytes:
    file = io.BytesIO()
    document.save(file)
    return file.getvalue()


def of_xml(*paragraphs: str) -> bytes:
    """A document whose paragraphs are given as what is in them."""
    document = docx.Document()
    for paragraph in paragraphs:
        spaces = nsdecls("w", "r") + ' xmlns:v="urn:v"'
        document.element.body.insert_element_before(parse_xml(f"<w:p {spaces}>{paragraph}</w:p>"), "w:sectPr")
    return saved(document)


def opened(data: bytes) -> Any:
    return docx.Document(io.BytesIO(data))


def body(data: bytes) -> Any:
    """As plain XML."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return etree.fromstring(archive.read("word/document.xml"))[0]


def runs(paragraph: Any) -> list[tuple[str, bool]]:
    return [(run.text, bool(run.bold)) for run in paragraph.runs]


def texts(data: bytes) -> list[str]:
    return [paragraph.text for paragraph in opened(data).paragraphs]


def asked_for(data: bytes) -> list[Marked]:
    asked = Asked()
    translated("docx", data, asked)
    return asked.texts


def names(text: Marked) -> list[str]:
    """A text with the kinds of its tags."""
    return [part.kind if isinstance(part, Tag) else part for part in text]


def letter() -> Any:
    document = docx.Document()
    document.add_heading("a title", 1)
    paragraph = document.add_paragraph("some ")
    paragraph.add_run("bold").bold = True
    paragraph.add_run(" text")
    document.add_paragraph("an item", style="List Bullet")
    table = document.add_table(2, 2)
    table.cell(0, 0).text, table.cell(1, 1).text = "a cell", "12.5"
    document.sections[0].header.paragraphs[0].text = "a header"
    document.sections[0].footer.paragraphs[0].text = "a footer"
    document.core_properties.title = "a property"
    return document


def test_a_letter() -> None:
    data = saved(letter())
    assert translated("docx", data, same) == data
    out = opened(translated("docx", data, loud))
    assert [paragraph.text for paragraph in out.paragraphs] == ["A TITLE", "SOME BOLD TEXT", "AN ITEM"]
    assert runs(out.paragraphs[1]) == [("SOME ", False), ("BOLD", True), (" TEXT", False)]
    assert [paragraph.style.name for paragraph in out.paragraphs] == ["Heading 1", "Normal", "List Bullet"]
    assert [cell.text for row in out.tables[0].rows for cell in row.cells] == ["A CELL", "", "", "12.5"]
    section = out.sections[0]
    assert (section.header.paragraphs[0].text, section.footer.paragraphs[0].text) == ("A HEADER", "A FOOTER")
    assert out.core_properties.title == "a property"


def test_parts_that_do_not_change_stay() -> None:
    data = saved(letter())
    out = translated("docx", data, lambda given: [("X",) if text == ("a header",) else text for text in given])
    before, after = (zipfile.ZipFile(io.BytesIO(one)) for one in (data, out))
    assert after.namelist() == before.namelist()
    changed = [name for name in before.namelist() if after.read(name) != before.read(name)]
    assert changed == ["word/header1.xml"]
    assert [info.date_time for info in after.infolist()] == [info.date_time for info in before.infolist()]


def test_tags_move_with_their_words() -> None:
    document = docx.Document()
    paragraph = document.add_paragraph("a long text with ")
    paragraph.add_run("bold").bold = True
    paragraph.add_run(" words")

    def turned(given: list[Marked]) -> list[Marked]:
        [(first, opening, inner, closing, last)] = given
        return [(opening, str(inner).upper(), closing, f"{last}, {first}")]

    [after] = opened(translated("docx", saved(document), turned)).paragraphs
    assert runs(after) == [("BOLD", True), (" words, a long text with", False)]


def test_runs_that_look_alike_are_one_text() -> None:
    data = of_xml(
        '<w:r w:rsidR="1"><w:t xml:space="preserve">one </w:t></w:r><w:proofErr w:type="spellStart"/>'
        '<w:r><w:rPr><w:lang w:val="de-DE"/></w:rPr><w:t>t</w:t></w:r><w:r><w:t>wo</w:t></w:r>'
        '<w:r><w:rPr><w:b/></w:rPr><w:t xml:space="preserve"> </w:t></w:r><w:r><w:t>three</w:t></w:r>'
    )
    assert asked_for(data) == [("one two three",)]
    [after] = opened(translated("docx", data, loud)).paragraphs
    assert runs(after) == [("ONE TWO THREE", False)]


LINK = '<w:hyperlink r:id="rId1"><w:r><w:rPr><w:u/></w:rPr><w:t>link</w:t></w:r></w:hyperlink>'


def simple(code: str) -> str:
    return f'<w:fldSimple w:instr=" {code} "><w:r><w:t>result</w:t></w:r></w:fldSimple>'


def field(code: str) -> str:
    kinds = [f'<w:r><w:fldChar w:fldCharType="{kind}"/></w:r>' for kind in ("begin", "separate", "end")]
    code = f"<w:r><w:instrText> {code} </w:instrText></w:r>"
    return f"{kinds[0]}{code}{kinds[1]}<w:r><w:t>result</w:t></w:r>{kinds[2]}"


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        (LINK, ["open", "link", "close"]),
        ("<w:ins><w:r><w:t>new</w:t></w:r></w:ins>", ["open", "new", "close"]),
        ("<w:del><w:r><w:delText>old</w:delText></w:r></w:del>", ["void"]),
        ('<w:bookmarkStart w:id="1" w:name="x"/>', ["void"]),
        ("<w:r><w:tab/></w:r>", ["void"]),
        ("<w:r><w:br/></w:r>", ["void"]),
        ('<w:r><w:footnoteReference w:id="2"/></w:r>', ["void"]),
        ("<w:r><w:t>non</w:t><w:noBreakHyphen/><w:t>break</w:t></w:r>", ["non\u2011break"]),
        (field("PAGE"), ["word"]),
        (field('HYPERLINK "http://x.org"'), ["open", "result", "close"]),
        (f"<w:r><w:t>x</w:t></w:r>{field('PAGE')}<w:r><w:t>y</w:t></w:r>", ["x", "word", "y"]),
        (simple("PAGE"), ["word"]),
        (simple("HYPERLINK x"), ["open", "result", "close"]),
        (
            "<w:sdt><w:sdtPr><w:text/></w:sdtPr><w:sdtContent><w:r><w:t>held</w:t></w:r></w:sdtContent></w:sdt>",
            ["open", "held", "close"],
        ),
        (
            "<w:sdt><w:sdtPr><w:dropDownList/></w:sdtPr><w:sdtContent><w:r><w:t>held</w:t></w:r></w:sdtContent></w:sdt>",
            ["word"],
        ),
        ('<w:r><w:fldChar w:fldCharType="begin"/></w:r><w:r><w:instrText>TOC</w:instrText></w:r>', ["void", "void"]),
    ],
)
def test_what_is_in_a_paragraph(inner: str, expected: list[str]) -> None:
    data = of_xml(f"<w:pPr/><w:r><w:t>before</w:t></w:r>{inner}<w:r><w:t>after</w:t></w:r>")
    [text] = asked_for(data)
    found = names(text)
    assert [found[0][:6], found[-1][-5:]] == ["before", "after"]
    middle = "|".join(found)[len("before") : -len("after")].strip("|").split("|")
    assert middle == expected
    # All of it is there afterwards, in its order, but for the text.
    before, after = (body(one)[0] for one in (data, translated("docx", data, loud)))
    marks = {"t", "r", "rPr", "noBreakHyphen"}
    kinds = [[node.tag.split("}")[1] for node in one.iter()] for one in (before, after)]
    assert [kind for kind in kinds[0] if kind not in marks] == [kind for kind in kinds[1] if kind not in marks]
    assert "AFTER" in "".join(after.itertext())


def test_a_text_box_has_texts_of_its_own() -> None:
    inner = "<w:txbxContent><w:p><w:r><w:t>in a box</w:t></w:r></w:p></w:txbxContent>"
    box = f"<w:r><w:pict><v:box>{inner}</v:box></w:pict></w:r>"
    data = of_xml(f"<w:r><w:t>outside</w:t></w:r>{box}<w:r><w:t>again</w:t></w:r>")
    assert [names(text) for text in asked_for(data)] == [["outside", "void", "again"], ["in a box"]]
    assert "".join(body(translated("docx", data, loud)).itertext()) == "OUTSIDEIN A BOXAGAIN"


def test_characters_that_no_xml_holds_go() -> None:
    assert texts(translated("docx", of_xml("<w:r><w:t>a</w:t></w:r>"), Known({"a": "b\0c <&> \ufffe"}))) == ["bc <&> "]


def changed(data: bytes, name: str, change: Callable[[bytes], bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as after:
        for info in before.infolist():
            content = before.read(info)
            after.writestr(info.filename, change(content) if info.filename == name else content)
    return file.getvalue()


MAIN = "word/document.xml"
DATA = of_xml("<w:r><w:t>a text</w:t></w:r>")
ENTITIES = b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;"><!ENTITY c SYSTEM "file:///etc/passwd">]>'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK", "is no Word document (.docx), or a damaged or encrypted one: "),
        (DATA[:-30], "is no Word document (.docx), or a damaged or encrypted one: "),
        (changed(DATA, MAIN, lambda _: b"<a>"), "word/document.xml in it is damaged: "),
        (changed(DATA, MAIN, lambda _: b"\0"), "word/document.xml in it is damaged: "),
        (
            changed(DATA, MAIN, lambda text: ENTITIES + text.split(b"?>")[1]),
            "word/document.xml in it has a document type",
        ),
        (
            changed(DATA, MAIN, lambda text: (ENTITIES + text.split(b"?>")[1]).decode().encode("utf-16")),
            "word/document.xml in it has a document type",
        ),
        (changed(DATA, "[Content_Types].xml", lambda _: b"<Types/>"), "is no Word document: it holds no text"),
    ],
)
def test_damaged(data: bytes, message: str) -> None:
    with pytest.raises(DocumentError) as raised:
        translated("docx", data, loud)
    assert str(raised.value).startswith(message)


def test_damaged_bytes() -> None:
    """What is not whole is refused, wherever it is, and what is read is whole."""
    whole = texts(translated("docx", DATA, loud))
    for place in range(0, len(DATA), 997):
        damaged = DATA[:place] + bytes([DATA[place] ^ 0x55]) + DATA[place + 1 :]
        with suppress(DocumentError):
            assert texts(translated("docx", damaged, loud)) == whole


def test_no_bombs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_nmsparse.documents.docx._LARGEST_PART", 100_000)
    large = changed(DATA, MAIN, lambda text: text.replace(b"a text", b"a" * 100_000))
    with pytest.raises(DocumentError, match=r"word/document.xml in it has 10.,... bytes; at most 100,000 are read"):
        translated("docx", large, loud)
    monkeypatch.setattr("hf_nmsparse.documents.docx._LARGEST", 100_000)
    with pytest.raises(DocumentError, match=r"would unpack to .* bytes; at most 100,000 are read"):
        translated("docx", large, loud)


def test_two_files_of_one_name() -> None:
    file = io.BytesIO(DATA)
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(MAIN, b"")
    with pytest.raises(DocumentError, match="holds two files of one name"):
        translated("docx", file.getvalue(), loud)


def test_another_archive() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "x")
    with pytest.raises(DocumentError, match=r"is no Word document: it holds no \[Content_Types\].xml"):
        translated("docx", file.getvalue(), loud)


pieces = st.tuples(st.sampled_from(["one ", "Two", " ", "3", "\u00e4 <&>"]), st.sampled_from(["", "<w:b/>", "<w:i/>"]))
inline = pieces.map(
    lambda piece: f"<w:r><w:rPr>{piece[1]}</w:rPr><w:t xml:space='preserve'>{html.escape(piece[0])}</w:t></w:r>"
)
others = st.sampled_from(["<w:r><w:tab/></w:r>", field("PAGE"), simple("X"), '<w:bookmarkEnd w:id="1"/>', LINK])
nested = st.lists(inline | others, max_size=6).map("".join)


@settings(max_examples=40, deadline=None)
@given(st.lists(nested | nested.map(lambda inner: f"<w:ins>{inner}</w:ins>{inner}"), min_size=1, max_size=3))
def test_any_paragraphs(paragraphs: list[str]) -> None:
    data = of_xml(*paragraphs)
    assert translated("docx", data, same) == data
    out = body(translated("docx", data, loud))
    for one, other in zip(body(data), out, strict=True):
        assert "".join(other.itertext()).lower() == "".join(one.itertext()).lower()
        assert bold(other).lower() == bold(one).lower()


def bold(paragraph: Any) -> str:
    """Its bold text without white space, which may lose the format."""
    names = {"w": etree.QName(paragraph).namespace}
    return "".join("".join(paragraph.xpath(".//w:r[w:rPr/w:b]/w:t/text()", namespaces=names)).split())
