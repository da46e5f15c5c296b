"""Marks come back once, nested as they were, around the words that they belong to."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_nmsparse.alignment import word_spans
from hf_nmsparse.markup import Marked, Plain, Tag
from tests.test_masking import looked


def marked(text: str) -> Marked:
    """``<b>``, ``</b>``, a void ``<v/>`` and a word ``<w=code>`` in a text as its parts."""
    parts: list[str | Tag] = []
    for part in re.split("(<[^>]*>)", text):
        if part.startswith("<"):
            kind = "close" if part[1] == "/" else "void" if part[-2] == "/" else "word" if "=" in part else "open"
            parts.append(Tag(part, kind))  # type: ignore[arg-type]
        elif part:
            parts.append(part)
    return tuple(parts)


def written(text: Marked) -> str:
    return "".join(part.text if isinstance(part, Tag) else part for part in text)


RED, EIN = {"red": "roter", "dog": "Hund"}, {"red": "roter", "dog": "Hund", "A": "ein", "runs": "läuft", ".": "."}
DOG = {"A": "Ein", "red": "roter", "dog": "Hund", "runs": "läuft", ".": "."}


@pytest.mark.parametrize(
    ("source", "translation", "pairs", "expected"),
    [
        ("A <b>red dog</b> runs.", "Ein roter Hund läuft.", DOG, "Ein <b>roter Hund</b> läuft."),
        ("<b>A red dog runs.</b>", "Ein roter Hund läuft.", {}, "<b>Ein roter Hund läuft.</b>"),
        ("<b>A <i>red</i> dog</b> runs.", "Es läuft ein roter Hund.", EIN, "Es läuft <b>ein <i>roter</i> Hund</b>."),
        ("<b>A</b> <i>dog</i> runs.", "Hund ein läuft.", EIN, "<i>Hund</i> <b>ein</b> läuft."),
        # The run with the most words is taken, and a word between that is nobody's goes with it.
        ("A <b>red dog</b> runs.", "roter ist roter Hund y", RED, "<b>roter ist roter Hund</b> y"),
        # A mark that stands alone keeps its white space, on one side or on both.
        ("A dog <v/>runs.", "Ein Hund läuft.", DOG, "Ein Hund <v/>läuft."),
        ("A dog<v/> runs.", "Ein Hund läuft.", DOG, "Ein Hund<v/> läuft."),
        ("A dog <v/> runs.", "Ein Hund läuft.", DOG, "Ein Hund <v/> läuft."),
        ("<v/>A dog runs.<v/>", "Ein Hund läuft.", DOG, "<v/>Ein Hund läuft.<v/>"),
        # It is never within what it stood outside of.
        ("A <v/><b>red dog</b>", "Hund ein roter", EIN, "<v/><b>Hund ein roter</b>"),
        ("A <b></b>dog", "Ein Hund", DOG, "Ein <b></b>Hund"),
        # An element whose words nothing stands for has none, and one that something looked at has that.
        ("A <b>red</b> dog", "Ein Hund", DOG | {"red": "Hund", "dog": "Ein"}, "Ein <b>Hund</b>"),
        ("Use <w=f> now, <w=g>.", "Jetzt {1} {0} x.", {}, "Jetzt <w=g> <w=f> x."),
        ("A dog", "", {}, ""),
        ("A <b>dog</b>", "", {}, "<b></b>"),
    ],
)  # fmt: skip
def test_where_they_go(source: str, translation: str, pairs: dict[str, str], expected: str) -> None:
    plain = Plain(marked(source))
    known = {a: b for a, b in pairs.items() if b in translation.replace(".", " .").split() and a in plain.text}
    assert written(plain.marked(translation, looked(plain.text, translation, known))) == expected


def test_the_plain_text() -> None:
    assert Plain(marked("A <v/> dog, <b>a <w=x></b> and {0} <w=y>.")).text == "A dog, a {1} and {0} {2}."


def test_what_is_not_translated_stays_as_it_was() -> None:
    source = marked("A  <v/> <b> dog</b>")
    assert Plain(source).marked("A  dog", np.zeros((2, 2), np.float32)) is source


@pytest.mark.parametrize(
    ("text", "message"), [("a</b>", "'</b>', part 1, closes nothing"), ("<b>a", "'<b>' is not closed")]
)
def test_tags_have_to_nest(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^markup: {re.escape(message)}; "):
        Plain(marked(text))


PARTS = st.sampled_from(["a ", "b", " c", "d. ", " ", "<v/>", "<w=x>"])
TREES = st.recursive(
    st.lists(PARTS, max_size=4).map("".join),
    lambda inner: st.lists(PARTS | inner.map(lambda text: f"<b>{text}</b>"), max_size=4).map("".join),
    max_leaves=4,
)
TRANSLATIONS = st.lists(st.sampled_from(["x", " ", "y z", ". ", "ab "]), max_size=8).map("".join)


@settings(max_examples=400, deadline=None)
@given(TREES, TRANSLATIONS, st.integers(0, 99))
def test_every_mark_comes_back_once_and_nested(text: str, translation: str, seed: int) -> None:
    source = marked(text)
    plain = Plain(source)
    translation += " ".join(re.findall(r"\{\d+\}", plain.text))
    random = np.random.default_rng(seed)
    shape = len(word_spans(translation)), len(word_spans(plain.text))
    found = plain.marked(translation, (random.random(shape) * (random.random((shape[0], 1)) > 0.3)).astype(np.float32))
    assert sorted(part.text for part in found if isinstance(part, Tag)) == sorted(
        part.text for part in source if isinstance(part, Tag)
    )
    opened: list[str] = []
    for part in found:
        if isinstance(part, Tag) and part.kind == "open":
            opened.append(part.text)
        elif isinstance(part, Tag) and part.kind == "close":
            assert opened.pop() == part.text.replace("/", "")
    if found != source:
        text_alone = "".join(part for part in found if isinstance(part, str))
        assert "".join(text_alone.split()) == "".join(re.sub(r"\{\d+\}", "", translation).split())
