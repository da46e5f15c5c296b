"""A text piece by piece: what is sure is given at once, nothing is given twice or taken back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from hf_nmsparse.streaming import pieces

Tell = Callable[[Sequence[int]], None]


def telling(*states: list[int]) -> Callable[[Tell], Sequence[int]]:
    """A translation that is sure of these tokens one after the other; the last are all."""

    def translate(tell: Tell) -> Sequence[int]:
        for tokens in states:
            tell(tokens)
        return states[-1]

    return translate


def reading(table: dict[int, str]) -> Callable[[Sequence[int]], str]:
    return lambda tokens: "".join(table[token] for token in tokens).strip()


def is_running() -> bool:
    return any(thread.name == "nmsparse-stream" for thread in threading.enumerate())


def test_a_token_is_given_when_the_next_is_sure() -> None:
    words = reading({1: " ein", 2: " Ger", 3: "ät", 4: "."})
    found = list(pieces(telling([1], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4]), words))
    assert found == ["ein", " Ger", "ät", "."]


def test_several_tokens_at_once_and_none() -> None:
    words = reading({1: " ein", 2: " Ger", 3: "ät", 4: "."})
    assert list(pieces(telling([], [1, 2, 3], [1, 2, 3, 4]), words)) == ["ein Gerät", "."]
    assert list(pieces(telling([]), words)) == []
    assert list(pieces(telling([1, 2, 3, 4]), words)) == ["ein Gerät."]


def test_a_character_is_given_when_its_bytes_are_all_there() -> None:
    raw = {1: b"a", 2: "€".encode()[:1], 3: "€".encode()[1:2], 4: "€".encode()[2:], 5: b"b"}

    def text_of(tokens: Sequence[int]) -> str:
        return b"".join(raw[token] for token in tokens).decode(errors="replace")

    steps = [[1, 2, 3, 4, 5][:length] for length in range(1, 6)]
    assert list(pieces(telling(*steps), text_of)) == ["a", "€", "b"]


def test_what_changes_with_the_next_token_waits_for_it() -> None:
    texts = {0: "", 1: "do", 2: "do n", 3: "don't", 4: "don't go"}
    steps = [list(range(length)) for length in (1, 2, 3, 4)]
    assert list(pieces(telling(*steps), lambda tokens: texts[len(tokens)])) == ["do", "n't", " go"]


def test_a_text_that_is_taken_back_is_an_error() -> None:
    texts = {1: "a", 2: "a b", 3: "a b c", 4: "A b c d"}
    stream = pieces(telling(*[list(range(length)) for length in (1, 2, 3, 4)]), lambda tokens: texts[len(tokens)])
    with pytest.raises(ValueError, match="the tokenizer has changed text that was given; the whole is 'A b c d'"):
        list(stream)


def test_an_error_comes_where_the_pieces_are_read() -> None:
    def translate(tell: Tell) -> Sequence[int]:
        tell([1])
        tell([1, 2])
        raise KeyError("nothing there")

    stream = pieces(translate, reading({1: "a", 2: "b"}))
    assert next(stream) == "a"
    with pytest.raises(KeyError, match="nothing there"):
        next(stream)
    assert not is_running()


def test_closing_ends_the_translation() -> None:
    told = []

    def translate(tell: Tell) -> Sequence[int]:
        for length in range(1, 10**9):
            tell([1] * min(length, 50))
            told.append(length)
        return ()

    stream: Iterator[str] = pieces(translate, reading({1: "a"}))
    assert not is_running()  # nothing is done that nobody has asked for
    assert next(stream) == "a"
    assert is_running()
    stream.close()  # type: ignore[attr-defined]
    assert not is_running()
    assert told
