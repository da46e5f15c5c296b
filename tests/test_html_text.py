"""Pages: their text is translated, and every other character stays."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_nmsparse.html_text import Html, translate_html
from hf_nmsparse.markup import Marked, Tag


def shouted(texts: Sequence[Marked]) -> list[Marked]:
    return [tuple(part if isinstance(part, Tag) else part.upper() for part in text) for text in texts]


@pytest.mark.parametrize(
    ("page", "translated"),
    [
        ("a <b>dog</b>", "A <b>DOG</b>"),
        ("<!doctype html>\n<p class='a'>a\r\n  dog</p>\n", "<!doctype html>\n<p class='a'>A DOG</p>\n"),
        ("<p>one<br>two<td>three", "<p>ONE<br>TWO<td>THREE"),
        (
            "<title>t</title><script>var a = '<b>x';</script>",
            "<title>T</title><script>var a = '<b>x';</script>",
        ),
        ("<pre>a <b>c</b></pre>d<textarea>e</textarea>", "<pre>a <b>c</b></pre>D<textarea>e</textarea>"),
        ("use <code>a <b>c</b></code> now", "USE <code>a <b>c</b></code> NOW"),
        ("<p translate=no>a <p>b</p></p>c", "<p translate=no>a <p>b</p></p>C"),
        ('a <span class="x notranslate">b</span> c', 'A <span class="x notranslate">b</span> C'),
        ("fish &amp; chips &lt;3 &eacute;&nbsp;x", "FISH &amp; CHIPS &lt;3 \u00c9&nbsp;X"),
        ("<!-- a comment -->b<!-- c -->d", "<!-- a comment -->B<!-- c -->D"),
        ("a <img alt='dog'/> b", "A <img alt='dog'/> B"),
        ("<a href='x'><div>b</div></a>", "<a href='x'><div>B</div></a>"),
        ("<b>a <i>c</b> d</i>", "<b>A <i>C</b> D</i>"),
        ("a < b & c <", "A &lt; B &amp; C &lt;"),
        ("&copy; 1 <b>2</b>", "&copy; 1 <b>2</b>"),  # nothing of it has become another
        ("", ""),
        (" <p> </p> ", " <p> </p> "),
    ],
)
def test_pages(page: str, translated: str) -> None:
    assert translate_html([page], shouted) == [translated]


def test_what_has_no_words_is_no_text() -> None:
    page = "<td>12</td><td>5 &gt; 3</td><p>***</p><p>&copy; 2020</p><p>{name}</p><p>%s <b>{n}</b></p><p>a</p>"
    assert Html(page).texts == [("a",)]


def test_what_is_one_text() -> None:
    page = "<ul><li>One <b>item</b> <li>Two</ul> <p> <img> Three: <a href=x>four</a>, five. </p>"
    texts = ["".join(part for part in text if isinstance(part, str)) for text in Html(page).texts]
    assert texts == ["One item", "Two", "Three: four, five."]


@pytest.mark.parametrize("rest", ['<a href="x', "<!-- never closed <p>c</p>", "</b", "<![CDATA[ c", "<?php c"])
def test_what_a_page_ends_within_stays(rest: str) -> None:
    assert translate_html([f"<p>a</p>b {rest}"], shouted) == [f"<p>A</p>B {rest}"]


def test_pages_share_one_call() -> None:
    calls: list[int] = []

    def counting(texts: list[Marked]) -> list[Marked]:
        calls.append(len(texts))
        return shouted(texts)

    assert translate_html(["a<p>b", "", "c"], counting) == ["A<p>B", "", "C"]
    assert calls == [3]


def test_translations_of_another_page_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^html: 1 texts, got 2 translations$"):
        Html("a").filled([("b",), ("c",)])


PARTS = [
    *("<b>", "</b>", "<i x='>'>", "</i>", "<p>", "</p>", "<br/>", "<img>", "<script>", "</script>", "<pre>", "</pre>"),
    *(
        "<code>",
        "</code>",
        "<!--",
        "-->",
        "<![CDATA[",
        "]]>",
        "<?",
        "&amp;",
        "&#x41;",
        "&",
        "<",
        ">",
        "</",
        "a",
        " b. ",
        "\n",
    ),
    *("\r\n", "\0", "<svg><path/></svg>", "<p translate=no>", "\u00a0", "'", '"', "="),
]
PAGES = st.lists(st.sampled_from(PARTS), max_size=20).map("".join)


@settings(max_examples=500, deadline=None)
@example("<b>a</b><")
@example("x<!-- y")
@given(PAGES)
def test_whatever_the_page_its_tags_stay(page: str) -> None:
    read = Html(page)
    assert read.filled(read.texts) == page
    for text in read.texts:
        for part in text:
            if isinstance(part, Tag):
                assert part.text in page
    # Translated into one word each, all that goes is text.
    words = read.filled([tuple(part if isinstance(part, Tag) else "w" for part in text) for text in read.texts])
    tags = re.compile(r"<[^<>]*>")
    assert all(found in page for found in tags.findall(words))
