"""Terms of a glossary: where texts have them, and which a translation lacks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hf_nmsparse.glossary import Glossary, missing

TERMS = Glossary(
    {"red wine": "Rotwein", "red": "rot|rote|roter", "C++": "C++", "NATO": "Nato", "caf\u00e9": "Caf\u00e9", "at": "@"}
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Red  wine, reddish red.", ["Red  wine", "red"]),  # the longest, and whole words
        ("nato NATO NATOs", ["NATO"]),  # one with capitals is found as it is
        ("C++, aC++ and C + +.", ["C++"]),
        ("A CAF\u00c9 at\nhome", ["CAF\u00c9", "at"]),
        ("red-wine", ["red"]),
        ("{red} %(red)s http://a.example/red red@a.example <red> red", ["red"]),  # what is for a program is none
        ("", []),
    ],
)
def test_terms_of_a_text(text: str, found: list[str]) -> None:
    assert [text[slice(*term.span)] for term in TERMS.terms(text)] == found


@pytest.mark.parametrize(
    ("text", "translation", "lacking"),
    [
        ("red wine", "Rotwein", []),
        ("red wine", "Rotweine", ["red wine"]),
        ("red wine", "rotwein", ["red wine"]),
        ("red red", "ein roter", ["red"]),
        ("red red", "rote und rot", []),
        ("red red wine", "rote Rotwein", []),
        ("at C++", "x@y C++.", []),  # a mark is its own bound
    ],
)
def test_what_a_translation_lacks(text: str, translation: str, lacking: list[str]) -> None:
    assert [text[slice(*term.span)] for term in missing(TERMS.terms(text), translation)] == lacking


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "terms.tsv"
    file.write_bytes("\ufeffred wine\tRotwein\r\n\n dog \t Hund | H\u00fcndin\n".encode())
    glossary = Glossary.read(file)
    assert [term.forms for term in glossary.terms("A dog. Red wine.")] == [("Hund", "H\u00fcndin"), ("Rotwein",)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"dog Hund\n", "line 1 is no term, tab and translation, got 'dog Hund'"),
        (b"a\tb\ndog\tHund\tx\n", "line 2 is no term, tab and translation"),
        (b"dog\t \n", "line 1 is no term, tab and translation"),
        (b"dog\tHund|\n", "'dog' is 'Hund|'; a term and its forms are no blanks, in "),
        (b"dog\tHund\ndog\tK\xc3\xb6ter\n", "line 2 has 'dog' again; leave one of them out"),
        (b"a\tb\ndog\tHu\0nd\n", "line 2 holds a NUL; make the file UTF-8"),
        (b"\xef\xbb\xbf \n\n", "has no terms; give it some or leave it out"),
        (b"dog\t\xff\n", "cannot be read: it is not UTF-8"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "terms.tsv"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=f"^glossary: .*{re.escape(message)}"):
        Glossary.read(file)


def test_a_file_without_an_end() -> None:
    with pytest.raises(ValueError, match=r"^glossary: /dev/zero is none: it has more than 67,108,864 characters$"):
        Glossary.read("/dev/zero")


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"dog": None}, "'dog' is None; a term and its translation are text"),
        ({7: "Hund"}, "7 is 'Hund'; a term and its translation are text"),
        ({"dog": "Hu\0nd"}, r"'dog' is 'Hu\x00nd'; a term and its translation are text"),
        ({"\ud83d": "Hund"}, r"'\ud83d' is 'Hund'; a term and its translation are text"),
        ([("dog", "Hund")], "terms are no mapping but list; give each its translation"),
    ],
)
def test_terms_that_are_refused(terms: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^glossary: {re.escape(message)}$"):
        Glossary(terms)


def test_many_terms_take_no_time() -> None:
    glossary = Glossary({f"term {number}": f"Begriff {number}" for number in range(50_000)})
    assert len(glossary.terms("A term 7 and a term 49999, not 50000. " * 100)) == 200
