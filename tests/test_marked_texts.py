"""Several texts with marks: what they are made of."""

from __future__ import annotations

from typing import Any

import pytest

from hf_nmsparse.marked_texts import MarkedTexts
from hf_nmsparse.markup import Tag


def test_parts_in_any_sequence() -> None:
    bold = Tag("<b>", "open"), Tag("</b>", "close")
    given: list[Any] = [["A ", bold[0], "dog", bold[1]], ("runs.",), "It ran.", ()]
    texts = MarkedTexts(iter(given))
    assert texts.plain == ["A dog", "runs.", "It ran.", ""]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("A dog", "expected a list of texts, got str; put it into a list"),
        (7, "expected a list of texts, got int; put it into a list"),
        ([("A dog",), None], "text 1 is a NoneType; give its parts, each a str or a Tag"),
        ([b"A dog"], "text 0 is a bytes; give its parts, each a str or a Tag"),
        ([("A dog", 3)], "text 0, part 1 is a int; give a str or a Tag"),
        ([("A dog", ("x",))], "text 0, part 1 is a tuple; give a str or a Tag"),
    ],
)
def test_what_is_no_text(texts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^markup: {message}$"):
        MarkedTexts(texts)
