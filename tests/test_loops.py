"""What is a loop, and what is not."""

from __future__ import annotations

import pytest

from hf_nmsparse.loops import loops

SOURCE = [5, 6, 7, 8, 2]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], False),
        ([9, 10, 11, 2], False),
        ([9] * 7 + [2], False),
        ([9] * 8 + [2], True),
        ([4, 9, 10, 9, 10, 9, 10, 2], False),  # three times
        ([4, 9, 10, 9, 10, 9, 10, 9, 10, 2], True),  # four times
        ([*range(20, 32)] * 3, False),  # a sentence said three times
        ([*range(20, 32)] * 4, True),
        (list(range(100, 144)), False),  # four times as long as the source and 24 more
        (list(range(100, 145)), True),
    ],
)
def test_loops(tokens: list[int], expected: bool) -> None:
    assert loops(tokens, SOURCE) == expected


def test_a_source_that_repeats_itself_may_be_translated_so() -> None:
    assert not loops([9, 10] * 5, [5, 6] * 5)
    assert not loops([9] * 10, [5, 5, 5])
    assert loops([9, 10] * 5, [5, 6] * 2)
    assert loops([9, 10] * 50, [5, 6] * 5)  # and still be too long
