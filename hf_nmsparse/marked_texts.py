"""Several texts with marks, from their plain texts to their translations with the marks in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from hf_nmsparse.alignment import word_spans
from hf_nmsparse.kernels.engine import Array
from hf_nmsparse.markup import Marked, Plain, Tag
from hf_nmsparse.paragraphs import Paragraphs

__all__ = ["MarkedTexts"]


class MarkedTexts:
    """Some texts with marks.

    Args:
        texts: The texts.

    Attributes:
        plain: What is translated.

    Raises:
        ValueError: There are no texts of parts, or in one of them a tag closes nothing, or is not closed.
    """

    def __init__(self, texts: Iterable[Marked]) -> None:
        self._texts = list(map(Plain, _read(texts)))
        self.plain = [text.text for text in self._texts]

    def marked(
        self, paragraphs: Paragraphs, translations: Sequence[str], looked: Callable[[int], Array]
    ) -> list[Marked]:
        """The translations with the marks in them.

        Args:
            paragraphs: The plain texts as sentences.
            translations: That of each sentence.
            looked: What a sentence's translation looked at: fp32 ``[target words, source words]``.
        """
        numbers = paragraphs.gathered(range(len(translations)))
        found = []
        for place, (text, own) in enumerate(zip(self._texts, numbers, strict=True)):
            target = paragraphs.text(place, [translations[number] for number in own])
            sources = [paragraphs.sentences[number] for number in own]
            whole = np.zeros((len(word_spans(target)), len(word_spans(text.text))), np.float32)
            rows = _words_at(target, [translations[number] for number in own])
            columns = _words_at(text.text, sources)
            for number, row, column in zip(own, rows, columns, strict=True):
                if len(row) and len(column):
                    np.add.at(whole, np.ix_(row, column), looked(number))
            found.append(text.marked(target, whole))
        return found


def _read(texts: Any) -> Iterator[Marked]:
    """The texts, whose parts are what they should be."""
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise ValueError(f"markup: expected a list of texts, got {type(texts).__name__}; put it into a list")
    for place, text in enumerate(texts):
        if isinstance(text, bytes) or not isinstance(text, Sequence):
            raise ValueError(f"markup: text {place} is a {type(text).__name__}; give its parts, each a str or a Tag")
        for number, part in enumerate(text):
            if not isinstance(part, str | Tag):
                raise ValueError(f"markup: text {place}, part {number} is a {type(part).__name__}; give a str or a Tag")
        yield tuple(text)


def _words_at(text: str, parts: Sequence[str]) -> list[list[int]]:
    """For each word of some parts that follow each other in a text the word of the text that it is in."""
    spans = word_spans(text)
    words = np.zeros(len(text) + 1, int)  # the word of each character
    for word, (start, end) in enumerate(spans):
        words[start:end] = word
    found, end = [], 0
    for part in parts:
        start = text.index(part, end)
        found.append([int(words[start + first]) for first, _ in word_spans(part)])
        end = start + len(part)
    return found
