from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_nmsparse.documents.texts import Mark, as_one, one_line, plain, translate_inner, well_nested, wrapped
from hf_nmsparse.markup import Marked, Tag, joined
from tests.documents.reading import Asked, loud, same

B, END, VOID = Tag("<b>", "open"), Tag("</b>", "close"), Tag("<br>", "void")

marks = st.builds(Mark, st.just("|"), st.sampled_from("bi"), st.sampled_from(["open", "close", "void"]))
marked = st.lists(st.text("a b\n\u3000", max_size=4) | marks).map(well_nested)


class TestWellNested:
    def test_pairs(self) -> None:
        parts: list[str | Mark] = [
            "a",
            Mark("<b>", "b", "open"),
            "c",
            Mark("</b>", "b", "close"),
            Mark("<br>", "", "void"),
        ]
        assert well_nested(parts) == ("a", B, "c", END, VOID)

    def test_what_has_no_counterpart_stands_alone(self) -> None:
        parts = [Mark("</b>", "b", "close"), Mark("<b>", "b", "open"), Mark("<i>", "i", "open")]
        assert [part.kind for part in well_nested(parts) if isinstance(part, Tag)] == ["void"] * 3

    def test_what_crosses(self) -> None:
        opened = [Mark("<b>", "b", "open"), Mark("<i>", "i", "open")]
        closed = [Mark("</b>", "b", "close"), Mark("</i>", "i", "close")]
        kinds = [part.kind for part in well_nested([*opened, *closed]) if isinstance(part, Tag)]
        assert kinds == ["open", "void", "close", "void"]

    @given(marked)
    def test_any(self, text: Marked) -> None:
        depth = 0
        for part in text:
            if isinstance(part, Tag):
                depth += {"open": 1, "close": -1, "void": 0}[part.kind]
            assert depth >= 0
        assert depth == 0


class TestTranslateInner:
    def test_what_is_around_the_words_stays(self) -> None:
        asked = Asked()
        text = (" ", VOID, B, "one ", B, "two", END, VOID, "\n", END)
        assert translate_inner([text], asked) == [(" ", VOID, B, "ONE ", B, "TWO", END, VOID, "\n", END)]
        assert asked.texts == [("one ", B, "two", END)]

    @pytest.mark.parametrize("text", [(), ("",), (" ",), ("12.5", VOID), ("\u2014",), (B, END)])
    def test_texts_without_a_letter_are_not_asked_for(self, text: Marked) -> None:
        asked = Asked()
        assert translate_inner([text], asked) == [text]
        assert asked.texts == []

    def test_what_stands_for_a_word_is_translated_with_the_others(self) -> None:
        asked = Asked()
        code = Tag("`a`", "word")
        assert translate_inner([(" ", code, " is ")], asked) == [(" ", code, " IS ")]
        assert asked.texts == [(code, " is")]

    def test_what_does_not_change_is_given_back_as_it_is(self) -> None:
        assert translate_inner([("a", "b", "", B, END)], same) == [("a", "b", "", B, END)]

    def test_white_space_at_the_ends_of_a_translation_goes(self) -> None:
        assert translate_inner([("a ",)], lambda texts: [("\n b\n",)]) == [("b ",)]

    def test_too_few(self) -> None:
        with pytest.raises(ValueError, match="shorter"):
            translate_inner([("a",)], lambda texts: [])

    @given(st.lists(marked))
    def test_any(self, texts: list[Marked]) -> None:
        assert translate_inner(texts, same) == texts
        assert translate_inner(texts, loud) == loud(texts)


class TestLines:
    @pytest.mark.parametrize(
        ("lines", "text", "shares"),
        [
            (["one two", "three"], "one two three", [7 / 13]),
            (["\u4e2d", "\u6587"], "\u4e2d\u6587", [0.5]),
            (["\u4e2d", "a"], "\u4e2d a", [1 / 3]),
            (["one"], "one", []),
        ],
    )
    def test_as_one(self, lines: list[str], text: str, shares: list[float]) -> None:
        parts, found = as_one([[line] for line in lines])
        assert (plain(parts), found) == (text, shares)

    @pytest.mark.parametrize(
        ("text", "shares", "expected"),
        [
            ("one two three", [7 / 13], "one two/three"),
            ("eins zwei drei", [7 / 13], "eins zwei/drei"),
            ("eins zwei drei", [0.1], "eins/zwei drei"),
            ("a b c", [0.9, 0.9], "a/b/c"),
            ("a b", [0.3, 0.6], "a/b"),
            ("eins", [0.5], "eins"),
            ("\u4e2d\u6587\u4e2d\u6587", [0.5], "\u4e2d\u6587/\u4e2d\u6587"),
            ("a  b", [0.5], "a/ b"),
            (" a", [0.5], " a"),
        ],
    )
    def test_wrapped(self, text: str, shares: list[float], expected: str) -> None:
        found = wrapped((text,), shares, ["/"] * len(shares))
        assert "".join(part.text if isinstance(part, Tag) else part for part in found) == expected

    @given(st.lists(st.lists(st.text("ab", min_size=1), min_size=1).map(" ".join), min_size=1))
    def test_the_same_text_is_wrapped_as_before(self, lines: list[str]) -> None:
        parts, shares = as_one([[line] for line in lines])
        found = wrapped(joined(parts), shares, ["\n"] * len(shares))
        assert "".join(part.text if isinstance(part, Tag) else part for part in found).split("\n") == lines

    def test_one_line(self) -> None:
        assert one_line(("a\r\n\nb\u2028c", VOID, "\nd")) == ("a b\u2028c", VOID, " d")
