"""Placeholders that a model loses: it is shown ``{0}`` and so on in their place.

What it loses all the same comes in beside the word that stands for its neighbour, so that none is ever lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_nmsparse.alignment import Span, word_spans
from hf_nmsparse.kernels.engine import Array
from hf_nmsparse.placeholders import (
    ONE_PLACEHOLDER,
    PLACEHOLDERS,
    has_words,
    is_unnamed,
    keeps_placeholders,
    placeholders,
    replaced,
)

__all__ = ["Masked", "masked_where_lost"]

_MARKS = "{}<>%&$@/"  # what placeholders are made of


@dataclass(frozen=True)
class Masked:
    """A text with short stand-ins, ``{0}``, ``{1}`` and so on, for its placeholders.

    Attributes:
        text: The text.
        placeholders: What they stand for.
        spans: Where they stand in it.
    """

    text: str
    placeholders: tuple[str, ...]
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, text: str) -> Masked:
        """The masked form of a text."""
        found: list[str] = []
        spans: list[Span] = []
        masked, end = "", 0
        for match in PLACEHOLDERS.finditer(text):
            masked += text[end : match.start()]
            stand_in = f"{{{len(found)}}}"
            spans.append((len(masked), len(masked) + len(stand_in)))
            found.append(match.group())
            masked, end = masked + stand_in, match.end()
        return cls(masked + text[end:], tuple(found), tuple(spans))

    def restored(self, translation: str, looked: Array | None = None) -> str:
        """A translation with the placeholders in it.

        Args:
            translation: Of ``text``. Stand-ins that it lacks go where it has another one twice or one that there is
                not, and else behind or before the word that stands for their neighbour in the source.
            looked: As `alignment.attended` gives it for ``text`` and the translation; None where nobody knows, and
                words stand for those at their place.

        Returns:
            It; the text that was masked, where that has no words that could be translated.
        """
        if not has_words(self.text):
            return _filled(self.text, list(zip(self.spans, self.placeholders, strict=True)), [], without="")
        looked = _diagonal(translation, self.text) if looked is None else looked
        found: dict[int, Span] = {}
        surplus: list[Span] = []
        for match in ONE_PLACEHOLDER.finditer(translation):
            index = self._index(match.group())
            if index is None or index in found:
                surplus.append(match.span())
            else:
                found[index] = match.span()
        for index in range(len(self.placeholders)):
            if index not in found and surplus:
                found[index] = surplus.pop(0)
        for index in range(len(self.placeholders)):
            if index not in found:
                place = self._place(index, translation, looked, [*found.values(), *surplus])
                found[index] = place, place
        names = self._names(found)
        # A bracket that the model has left open would take placeholders behind it for its own.
        brackets = "".join(mark for mark in "{}" if mark not in replaced(self.text, lambda _: ""))
        text = _filled(translation, names, surplus, brackets)
        # And what stands beside a placeholder may make it another.
        whole = Counter(placeholders(text)) == Counter(self.placeholders)
        return text if whole else _filled(translation, names, surplus, _MARKS, apart=True)

    def _index(self, stand_in: str) -> int | None:
        number = stand_in[1:-1]
        known = stand_in == f"{{{number}}}" and number.isdecimal() and len(number) < 9
        return int(number) if known and int(number) < len(self.placeholders) else None

    def _place(self, index: int, translation: str, looked: Array, taken: Sequence[Span]) -> int:
        """Where in a translation a stand-in goes that it lacks."""
        of_source, of_target = word_spans(self.text), word_spans(translation)
        free = [place for place, span in enumerate(of_target) if not _inside(span, taken)]
        words = [place for place, span in enumerate(of_source) if not _inside(span, self.spans)]
        before = [place for place in words if of_source[place][1] <= self.spans[index][0]]
        after = [place for place in words if of_source[place][0] >= self.spans[index][1]]
        if before and (best := _best(looked, free, before[-1])) is not None:
            return of_target[best][1]
        if after and (best := _best(looked, free, after[0])) is not None:
            return of_target[best][0]
        return len(translation.rstrip()) if before else 0

    def _names(self, found: dict[int, Span]) -> list[tuple[Span, str]]:
        """What stands where, in the order of the translation."""
        order = sorted(found, key=lambda index: (found[index], index))
        names = {index: self.placeholders[index] for index in order}
        # Those without names are filled in by their order, which is that of the source.
        unnamed = [index for index in order if is_unnamed(names[index])]
        names |= zip(unnamed, (self.placeholders[index] for index in sorted(unnamed)), strict=True)
        return [(found[index], names[index]) for index in order]


def masked_where_lost(sources: Sequence[str], targets: Sequence[str]) -> dict[int, Masked]:
    """The masked forms of the texts whose translations have lost placeholders, by their places.

    A text of placeholders alone has lost them too where words stand beside them, which nobody has asked for.
    """
    pairs = enumerate(zip(sources, targets, strict=True))
    return {place: Masked.of(source) for place, (source, target) in pairs if not _keeps(source, target)}


def _keeps(source: str, target: str) -> bool:
    return keeps_placeholders(source, target) and (source == target or not placeholders(source) or has_words(source))


def _filled(
    text: str, names: Sequence[tuple[Span, str]], surplus: Sequence[Span], without: str, apart: bool = False
) -> str:
    """A text with names at some places and nothing at others, without some marks; with space around names if apart."""
    drop = str.maketrans("", "", without)
    pieces, end = [], 0  # each with whether it is a name, and whether it needs space around it
    for (start, stop), name in sorted([*names, *((span, "") for span in surplus)], key=lambda one: one[0]):
        pieces += [(text[end:start].translate(drop), False, False), (name, True, apart or start == stop)]
        end = stop
    filled, was_name, was_apart = "", False, False
    for piece, is_name, is_apart in [*pieces, (text[end:].translate(drop), False, False)]:
        if not piece:
            continue
        before = bool(filled) and not filled[-1].isspace()
        if before and (is_apart or (was_name and is_name) or (was_apart and (apart or piece[0].isalnum()))):
            filled += " "
        filled, was_name, was_apart = filled + piece, is_name, is_apart
    return filled


def _inside(span: Span, others: Sequence[Span]) -> bool:
    return any(start <= span[0] and span[1] <= end for start, end in others)


def _best(looked: Array, places: Sequence[int], word: int) -> int | None:
    """Of some words of a translation the one that looked most at a word of the source."""
    column = looked[list(places), word]
    return places[int(column.argmax())] if column.size and column.max() > 0 else None


def _diagonal(target: str, source: str) -> Array:
    """What a translation word by word would look at."""
    rows, columns = (np.linspace(0, 1, len(word_spans(text)), dtype=np.float32) for text in (target, source))
    distance: Array = np.abs(rows[:, None] - columns)
    return 1 - distance
