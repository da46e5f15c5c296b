"""Words, and what those of a translation looked at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from hf_nmsparse.alignment import attended, token_shares, word_spans
from hf_nmsparse.kernels.engine import Array

PIECES = ["<s>", "A ", "red", "dish ", "dog", ".", "Ein ", "röt", "licher ", "Hund", "", "!", "ß"]


def decode(tokens: Sequence[int]) -> str:
    return "".join(PIECES[token] for token in tokens if token).strip()


def looked_at(source: str, tokens: list[int], target: str, target_tokens: list[int], attention: Array) -> Array:
    of_source, of_target = token_shares(source, tokens, decode), token_shares(target, target_tokens, decode)
    return attended(source, of_source, target, of_target, attention)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A dog's tail, up-to-date.", ["A", "dog's", "tail", ",", "up-to-date", "."]),
        ("-5 % at 3.5", ["-", "5", "%", "at", "3.5"]),
        ("{entity_id}: <b>x</b>%s", ["{entity_id}", ":", "<b>", "x", "</b>%s"]),
        ("犬がいる。 dog", ["犬", "が", "い", "る", "。", "dog"]),
        ("हिन्दी में", ["हिन्दी", "में"]),  # vowels are accents
        ("cafe\u0301 ", ["cafe\u0301"]),
        (" \n", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert [text[start:end] for start, end in word_spans(text)] == words


def test_tokens_are_added_up_to_words() -> None:
    attention = np.zeros((6, 6), np.float32)
    for row, column in enumerate([1, 2, 3, 4, 5, 5]):
        attention[row, column - 1] = 1
    source, target = "A reddish dog.", "Ein rötlicher Hund."
    looked = looked_at(source, [1, 2, 3, 4, 5, 0], target, [6, 7, 8, 9, 5, 0], attention)
    # Each token counts by its letters: Ein and A, röt and red, licher and dish, Hund and dog, the marks.
    assert looked.tolist() == [[3 * 1, 0, 0, 0], [0, 3 * 3 + 6 * 4, 0, 0], [0, 0, 4 * 3, 0], [0, 0, 0, 1]]


def test_a_mark_looks_at_its_like_alone() -> None:
    attention = np.array([[0, 1, 0], [0.9, 0, 0.1]], np.float32)
    assert looked_at("A dog.", [1, 4, 5], "Hund.", [9, 5], attention).tolist() == [
        [0, 12, 0],
        [0, 0, np.float32(0.1)],
    ]
    assert looked_at("A dog.", [1, 4, 5], "Hund!", [9, 11], attention)[1].tolist() == [0, 0, 0]


def test_what_tokens_say_need_not_be_the_text() -> None:
    """Of a text in capitals with an unknown letter, behind the prompt of a task, other words come out than went in."""
    attention = np.eye(5, dtype=np.float32)
    looked = looked_at("X DOG.", [12, 12, 10, 4, 5], "Hund.", [0, 0, 0, 9, 5], attention)
    assert looked.argmax(1).tolist() == [1, 2]


def test_nothing_is_looked_at_where_there_is_nothing() -> None:
    assert looked_at("A", [1], "", [], np.zeros((0, 1), np.float32)).shape == (0, 1)
    assert looked_at("", [0], "Hund", [9], np.ones((1, 1), np.float32)).shape == (1, 0)
