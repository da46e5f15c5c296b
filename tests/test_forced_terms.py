"""Where a term comes into a translation, on attention that is written by hand."""

from __future__ import annotations

import numpy as np
import pytest

from hf_nmsparse.forced_terms import looks_at, next_term
from hf_nmsparse.glossary import Glossary
from hf_nmsparse.kernels.engine import Array

TEXT = "a red dog runs"
SHARES = np.array([[0, 0, 0], [3, 0, 0], [0, 2, 0], [0, 2, 0], [0, 0, 4], [0, 0, 0]], np.float32)
"""A language, a word, a word of two tokens, a word, the end."""


def looked(*links: int | None) -> Array:
    found = np.zeros((3, 4), np.float32)
    for word, link in enumerate(links):
        if link is not None:
            found[word, link] = word + 1
    return found


@pytest.mark.parametrize(
    ("terms", "links", "begun", "at"),
    [
        (["dog"], (0, 2, 3), 0, 2),
        (["dog"], (0, 1, 2), 0, 4),
        (["dog"], (2, 2, 3), 0, 2),  # that which looked the most, not the article before it
        (["red dog"], (1, 2, 3), 0, 1),  # at its first word, just before
        (["dog"], (0, 2, 3), 3, 5),  # what stays is not looked at again
        (["dog"], (0, None, 3), 0, 5),  # nothing looked: behind the last word
        (["dog"], (0, None, 3), 6, 6),
        (["runs", "dog"], (0, 2, 3), 0, 2),  # the first of them in the translation
    ],
)
def test_where_a_term_comes_in(terms: list[str], links: tuple[int | None, ...], begun: int, at: int) -> None:
    found = Glossary(dict.fromkeys(terms, "x")).terms(TEXT)
    term, place = next_term(TEXT, looked(*links), SHARES, found, begun, end=5)
    assert (TEXT[slice(*term.span)], place) == (terms[-1], at)


def test_what_a_token_of_a_term_looks_at() -> None:
    source = np.array([[1, 0, 0, 0], [0, 3, 0, 0], [0, 0, 3, 0], [0, 0, 0, 4], [0, 0, 0, 0]], np.float32)
    (term,) = Glossary({"red dog": "x"}).terms(TEXT)
    assert looks_at(TEXT, source, term).tolist() == [0, 0.5, 0.5, 0, 0]
