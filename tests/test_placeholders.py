"""What counts as a placeholder, and when a translation has kept those of its source."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_nmsparse.placeholders import PLACEHOLDERS, keeps_placeholders, placeholders, replaced

# Texts with placeholders in them, or what is nearly some.
signs = ["{", "}", "%", "s", "1$", "<", ">", "/", "&", ";", "#", "@", "://", "http", ".", "-", "a", " "]
whole = ["{0}", "<b>", "%s", "&nbsp;", "a@b.de", "http://a.de/b"]
texts = st.one_of(st.text(), st.lists(st.sampled_from(signs + whole), max_size=12).map("".join))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("no more than words, 100% of them", []),
        ("{name} has {0} of {{ total }} in ${place}", ["{name}", "{0}", "{{ total }}", "${place}"]),
        (
            "{n, plural, one {# item} other {# {kind} items}}",
            ["{n, plural, one {# item} other {# {kind} items}}"],
        ),
        ("%s, %1$s, %(name)d, %.2f, %5d, %ld and %@", ["%s", "%1$s", "%(name)d", "%.2f", "%5d", "%ld", "%@"]),
        ("50% discount and 5 %", []),
        ("<0/> and <b>bold</b> are tags, 1 < 2 > 0 is none", ["<0/>", "<b>", "</b>"]),
        ("a&nbsp;b &#160; &amp c", ["&nbsp;", "&#160;"]),
        ("See https://a.example/b?c=d#e, or (http://f.example).", ["https://a.example/b?c=d#e", "http://f.example"]),
        ("Write to jane.doe@mail.example.org.", ["jane.doe@mail.example.org"]),
        ("`{a}{b}`: {c} {d}", ["{a}{b}", "{c}", "{d}"]),
        ("{ left open", []),
    ],
)
def test_what_is_one(text: str, found: list[str]) -> None:
    assert placeholders(text) == found


@pytest.mark.parametrize(
    ("source", "target", "kept"),
    [
        ("A man.", "Ein Mann {so}.", True),  # where there are none to keep nothing is asked
        ("{a} of {b}", "von {b} {a}", True),
        ("{a} of {b}", "{a} von {a}", False),
        ("{a}", "{a} {a}", False),
        ("{a}", "{ a }", False),
        ("%s of %d", "%d von %s", False),  # they are filled by their order
        ("%1$s of %2$d", "%2$d von %1$s", True),
        ("{} of {n} {}", "{n} {} von {}", True),
    ],
)
def test_when_they_are_kept(source: str, target: str, kept: bool) -> None:
    assert keeps_placeholders(source, target) is kept


@given(texts)
def test_a_text_that_shows_none_has_none(text: str) -> None:
    found = [match.group() for match in PLACEHOLDERS.finditer(text)]
    assert placeholders(text) == found
    assert replaced(text, lambda placeholder: f"[{placeholder}]") == PLACEHOLDERS.sub(r"[\g<0>]", text)


def test_hostile_texts_take_no_time() -> None:
    for part in ("{", "{{}", "<a ", "%", "a@", "http://", "&a", "{a}", "a", "a."):
        placeholders(part * 4000)
