"""Which words of a source those of its translation stand for, as the attention of the model tells."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from itertools import accumulate, pairwise

import numpy as np

from hf_nmsparse.kernels.engine import Array
from hf_nmsparse.placeholders import replaced

__all__ = ["Span", "attended", "token_shares", "word_spans"]

Span = tuple[int, int]
"""The first character of a part of a text, and the one behind its last."""

Decode = Callable[[Sequence[int]], str]
"""The text of some tokens."""

# A text as letters for its characters: see `_kind`.
_WORDS = re.compile("bi*|[wm]+(?:j[wm]+)*|cm*|[^s]m*")
_JOINERS = "'\u2019-_.@\xb7"
# Scripts that are written without spaces between words: Thai, Lao, Burmese, Khmer, kana, Han.
_UNSPACED = [(0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF)]


def word_spans(text: str) -> list[Span]:
    """The words of a text and the marks between them; where a script has no spaces, its characters.

    Placeholders are words.
    """
    kinds = replaced(text, lambda placeholder: "\0" + "\1" * (len(placeholder) - 1))
    return [match.span() for match in _WORDS.finditer("".join(map(_kind, kinds)))]


def _kind(character: str) -> str:
    """S of white space, m of an accent, c of a script without spaces, w of letters and digits, j of what joins them.

    A placeholder begins with b and goes on with i.
    """
    if character in "\0\1":
        return "b" if character == "\0" else "i"
    if character.isspace():
        return "s"
    if unicodedata.category(character)[0] == "M":
        return "m"
    if any(first <= ord(character) <= last for first, last in _UNSPACED):
        return "c"
    return "w" if character.isalnum() else "j" if character in _JOINERS else "p"


def attended(source: str, of_source: Array, target: str, of_target: Array, attention: Array) -> Array:
    """How much the words of a translation looked at those of its source.

    Args:
        source: The text.
        of_source: Its `token_shares`, fp32 ``[source tokens, source words]``.
        target: The translation.
        of_target: Its `token_shares`, fp32 ``[target tokens, target words]``.
        attention: fp32 ``[target tokens, source tokens]``.

    Returns:
        fp32 ``[target words, source words]`` over ``word_spans`` of both. A mark looks at its like alone: what a model
        attends to as it writes a comma says nothing.
    """
    looked: Array = of_target.T @ attention[: len(of_target)] @ of_source  # [target words, source words]
    words = [source[start:end] for start, end in word_spans(source)]
    for place, (start, end) in enumerate(word_spans(target)):
        if not any(map(str.isalnum, target[start:end])):
            looked[place] *= [word == target[start:end] for word in words]
    return looked


def token_shares(text: str, tokens: Sequence[int], decode: Decode) -> Array:
    """The characters that each token has of each word of a text.

    Args:
        text: The text.
        tokens: Its tokens.
        decode: Gives the text of tokens, without those that are special.

    Returns:
        fp32 ``[tokens, words]`` over ``word_spans(text)``.
    """
    spans = word_spans(text)
    word_of = [word for word, (start, end) in enumerate(spans) for _ in range(start, end)]  # of each visible character
    decoded = _visible(decode(tokens))
    places = _matched(decoded, _visible(text))
    ends = [min(len(_visible(decode(tokens[:end]))), len(decoded)) for end in range(1, len(tokens) + 1)]
    shares = np.zeros((len(tokens), len(spans)), np.float32)
    for token, (start, end) in enumerate(pairwise(accumulate([0, *ends], max))):
        for place in places[start:end]:
            if place is not None:
                shares[token, word_of[place]] += 1
    return shares


def _visible(text: str) -> str:
    return "".join(text.split())


def _matched(decoded: str, text: str) -> list[int | None]:
    """For each character of what tokens say the one of the text that it is, or that stands before it."""
    if decoded == text:
        return list(range(len(text)))
    places: list[int | None] = [None] * len(decoded)
    for block in SequenceMatcher(None, _folded(decoded), _folded(text), autojunk=False).get_matching_blocks():
        places[block.a : block.a + block.size] = range(block.b, block.b + block.size)
    before = None
    for at, place in enumerate(places):
        before = places[at] = before if place is None else place
    return places


def _folded(text: str) -> str:
    """Small letters, as many as there are letters."""
    return "".join(small if len(small := letter.lower()) == 1 else letter for letter in text)
