"""The page on runs: one file that shows what it should, whatever texts say."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from hf_nmsparse import report_page
from hf_nmsparse.report_page import page, text
from hf_nmsparse.run_report import read_report
from tests.test_plots import write_run
from tests.test_run_report import OTHER, REFERENCES, write_scored

HOSTILE = "<script>alert(1)</script> \0 \u202e \u200f </dd></article><img src=x onerror=alert(1)> --> ]]> \"'"
VOID = {"meta", "br", "path", "use", "rect", "image"}


class Page(HTMLParser):
    """Elements, attributes and visible text; ends that do not fit are an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str | None]] = set()
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(attrs)
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not set(self.open) & {"style", "title"}:
            self.text += data


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    dense = write_scored(tmp_path / "dense", REFERENCES, method="dense")
    return [dense, write_scored(tmp_path / "sparse", OTHER, method="ste", pattern="2:4", layers=True)]


def test_what_is_on_it(folders: list[Path]) -> None:
    found = page(read_report(folders))
    shown = Page(found)
    for words in ("Scores", "Loss", "Flip rate", "Layers of sparse", "BLEU by length of the source", "fc1", "50%"):
        assert words in shown.text
    assert "dense and sparse, where chrF differs most" in shown.text
    assert "not asked for: pip install unbabel-comet" in shown.text
    assert "nrefs:1|case:mixed|eff:no|tok:13a" in shown.text
    assert "Ein <mark>Mann</mark>" in found
    assert "Ein <mark>Haus</mark>" in found
    assert "BLEU by test set" not in shown.text
    assert found == page(read_report(folders))


def test_it_needs_nothing_else(folders: list[Path]) -> None:
    found = page(read_report(folders))
    shown = Page(found)
    assert "default-src 'none'; style-src 'unsafe-inline'" in found
    assert not shown.tags & {"script", "link", "iframe", "img", "object", "embed", "base"}
    places = [value for name, value in shown.attributes if name in ("src", "href", "xlink:href")]
    assert places
    assert all(value is not None and value.startswith("#") for value in places)
    assert not re.search(r"url\((?!#)|@import", found)


def test_identifiers_are_used_once(folders: list[Path]) -> None:
    found = page(read_report(folders))
    identifiers = re.findall(r' id="([^"]+)"', found)
    assert len(identifiers) == len(set(identifiers)) > 10
    assert {place for place in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', found)[0] if place} <= set(identifiers)


def test_hostile_texts(tmp_path: Path) -> None:
    hypotheses = [HOSTILE, *OTHER[1:]]
    facts: dict[str, Any] = {"method": "ste", "pattern": "2:4", "targets": [HOSTILE], "layers": True}
    runs = [write_scored(tmp_path / name, hypotheses, **facts) for name in ("a", "<b onload=x>")]
    dense = write_scored(tmp_path / "dense", REFERENCES, method="dense")
    found = page(read_report([dense, *runs]))
    shown = Page(found)
    assert not shown.tags & {"script", "img", "b"}
    assert not {name for name, _ in shown.attributes if name.startswith("on")}
    assert not set(found) & set("\0\u202e\u200f")
    for words in ("<script>alert(1)</script>", "U+0000", "U+202E", "U+200F", "</dd></article><img", "<b onload=x>"):
        assert words in shown.text


@pytest.mark.parametrize(
    ("given", "html"),
    [
        ("a<b>&\"'", "a&lt;b&gt;&amp;&quot;&#x27;"),
        ("Ä 漢 שלום", "Ä 漢 שלום"),
        ("\ud800", '<span class="code">U+D800</span>'),
        ("a\x1bb", 'a<span class="code">U+001B</span>b'),
        ("\u2067x\u2069", '<span class="code">U+2067</span>x<span class="code">U+2069</span>'),
    ],
)
def test_texts(given: str, html: str) -> None:
    assert text(given) == html


def test_without_matplotlib_and_without_texts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 30.0, method="dense")
    with mock.patch.object(report_page, "has_matplotlib", return_value=False):
        shown = Page(page(read_report([run])))
    assert "Drawn where matplotlib is installed: pip install 'hf-nmsparse[plot]'" in shown.text
    assert "run keeps no texts" in shown.text
