"""Stand-ins for placeholders, and how the placeholders come back whatever a model makes of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_nmsparse.alignment import word_spans
from hf_nmsparse.kernels.engine import Array
from hf_nmsparse.masking import Masked, masked_where_lost
from hf_nmsparse.placeholders import keeps_placeholders


def looked(source: str, target: str, pairs: dict[str, str] | None = None) -> Array:
    """What a translation looked at: for words of the source the words of the translation that stand for them."""
    found = np.zeros((len(word_spans(target)), len(word_spans(source))), np.float32)
    words = [[text[start:end] for start, end in word_spans(text)] for text in (target, source)]
    for source_word, target_word in (pairs or {}).items():
        found[words[0].index(target_word), words[1].index(source_word)] = 1
    return found


def test_the_masked_text() -> None:
    masked = Masked.of("{user} sees %s at https://a.example/{id}.")
    assert masked.text == "{0} sees {1} at {2}."
    assert masked.placeholders == ("{user}", "%s", "https://a.example/{id}")
    assert [masked.text[start:end] for start, end in masked.spans] == ["{0}", "{1}", "{2}"]


@pytest.mark.parametrize(
    ("source", "translation", "pairs", "restored"),
    [
        ("{a} sees {b}.", "{1} wird von {0} gesehen.", {}, "{b} wird von {a} gesehen."),
        ("{a} sees {b}.", "{0} sieht.", {"sees": "sieht"}, "{a} sieht {b}."),  # behind the word before it
        ("The {a} bike.", "Das Rad.", {"bike": "Rad"}, "Das {a} Rad."),  # before the word behind it
        ("{a}", "", {}, "{a}"),
        ("{a} sees {b}.", "{0} sieht {0}.", {}, "{a} sieht {b}."),  # one that is there twice makes room for another
        ("{a} goes.", "{0} geht {0} {7}.", {}, "{a} geht  ."),
        ("{a} goes.", "{x} geht.", {}, "{a} geht."),
        ("%s of %d", "{1} von {0}", {}, "%s von %d"),  # their order is that of the source
        ("%1$s of %2$d", "{1} von {0}", {}, "%2$d von %1$s"),
        ("{a} x {b}", "{0}{1}", {}, "{a} {b}"),
        ("{a} x", "{ {0} x", {}, " {a} x"),  # brackets left open, where the source has none
        ("%s x", "{0}foo x", {}, "%s foo x"),  # with letters behind it, it would be another
    ],
)
def test_what_comes_back(source: str, translation: str, pairs: dict[str, str], restored: str) -> None:
    masked = Masked.of(source)
    assert masked.restored(translation, looked(masked.text, translation, pairs)) == restored


PARTS = [
    *("{a}", "{0}", "{1}", "{", "}", "%s", "%d", "%", "<b>", "</b>", "<", ">", " ", "foo", "Bar", ".", "http://x.y/z"),
    *("a@b.cd", "&amp;", "&", "{}", "(", ")", "$", "1", "{{", "/", "\u3042"),
]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=12).map("".join)


@pytest.mark.parametrize("source", ["{a}", "%d%%", "https://a.example/b, c@d.example!", "{a} 12 {b}"])
def test_a_text_without_words_is_its_own_translation(source: str) -> None:
    masked = masked_where_lost([source, "a word: {a}"], [f"{source} foo", "ein Wort: {a}"])
    assert list(masked) == [0]
    assert masked[0].restored("{0} foo {1}") == source


@settings(max_examples=500, deadline=None)
@given(TEXTS, TEXTS, st.integers(0, 99))
def test_none_is_ever_lost(source: str, translation: str, seed: int) -> None:
    masked = Masked.of(source)
    attention = np.random.default_rng(seed).random((len(word_spans(translation)), len(word_spans(masked.text))))
    assert keeps_placeholders(source, masked.restored(translation, attention.astype(np.float32)))


def test_without_attention_words_stand_for_those_at_their_place() -> None:
    assert Masked.of("one two {a} three four").restored("eins zwei drei vier") == "eins zwei {a} drei vier"
    assert Masked.of("{a} one").restored("") == "{a}"
