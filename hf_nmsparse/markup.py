"""Texts with marks in them, such as HTML's tags: what is translated is the text, and the marks go with its words.

Which words those are is told by the model's attention. Each mark comes back once, and closes what it closed in the
source, whatever the attention says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from hf_nmsparse.alignment import word_spans
from hf_nmsparse.kernels.engine import Array
from hf_nmsparse.placeholders import placeholders

__all__ = ["Marked", "Plain", "Tag", "joined", "partners"]


@dataclass(frozen=True)
class Tag:
    """A mark in a text.

    Attributes:
        text: What stands in the document; it is given back as it is.
        kind: Whether it opens something, closes what was opened last, or stands alone. A ``"word"`` stands alone in the
            place of a word, as code or a formula does, so that the sentence would not be whole without it.
    """

    text: str
    kind: Literal["open", "close", "void", "word"]


Marked = tuple[str | Tag, ...]
"""A text as its parts, in their order."""


@dataclass
class _Element:
    """What stands from a tag to the one that closes it, or nothing, in the place of a tag that stands alone.

    Attributes:
        start: Where it begins in the plain text.
        end: Where it ends.
        opening: The tag before it; None of the whole text.
        closing: The tag behind it; None of what stands alone.
        children: What is in it.
        space: Whether white space stands before and behind it.
    """

    start: int
    end: int
    opening: Tag | None = None
    closing: Tag | None = None
    children: list[_Element] = field(default_factory=list)
    space: tuple[bool, bool] = (False, False)


class Plain:
    """A text without its marks, as a model takes it.

    Args:
        marked: The text.

    Attributes:
        text: The text, with ``{0}``, ``{1}`` and so on in the place of marks that stand for words.

    Raises:
        ValueError: A tag closes nothing, or is not closed.
    """

    def __init__(self, marked: Marked) -> None:
        self.text = ""
        self._source = marked
        self._words: dict[str, Tag] = {}
        taken = set(placeholders("".join(part for part in marked if isinstance(part, str))))
        stand_ins = (name for number in range(len(marked) + len(taken)) if (name := f"{{{number}}}") not in taken)
        self._root = _Element(0, 0)
        opened = [self._root]
        for place, part in enumerate(marked):
            if isinstance(part, str):
                # On both sides of a mark, white space comes once.
                self.text += part.lstrip(" ") if self.text[-1:].isspace() else part
            elif part.kind == "word":
                self._words[stand_in := next(stand_ins)] = part
                self.text += stand_in
            elif part.kind == "close":
                if len(opened) == 1:
                    raise ValueError(f"markup: {part.text!r}, part {place}, closes nothing; open it before")
                element = opened.pop()
                element.closing, element.end = part, len(self.text)
            else:
                here = len(self.text)
                element = _Element(here, here, part, space=(self.text[-1:].isspace(), _begins_blank(marked, place + 1)))
                opened[-1].children.append(element)
                if part.kind == "open":
                    opened.append(element)
        if (unclosed := opened[-1].opening) is not None:
            raise ValueError(f"markup: {unclosed.text!r} is not closed; close it")
        self._root.end = len(self.text)

    def marked(self, translation: str, looked: Array) -> Marked:
        """A translation with the marks in it.

        Args:
            translation: Of ``text``, with each stand-in once.
            looked: As `alignment.attended` gives it for ``text`` and the translation.
        """
        if translation == self.text:
            return self._source
        parts: list[str | Tag] = []
        end = 0
        for at, part in _Placed(self.text, translation, looked).inserts(self._root):
            parts += [*self._with_words(translation[end:at]), part]
            end = at
        return joined([*parts, *self._with_words(translation[end:])])

    def _with_words(self, text: str) -> Iterator[str | Tag]:
        """Text with the marks that stand for words."""
        if not self._words:
            yield text
            return
        for part in re.split(f"({'|'.join(map(re.escape, self._words))})", text):
            yield self._words.get(part, part)


def _begins_blank(marked: Marked, place: int) -> bool:
    """Whether white space begins at a part, behind tags or not."""
    text = next((part for part in marked[place:] if isinstance(part, str) and part), "")
    return text[:1].isspace()


def joined(parts: Iterable[str | Tag]) -> Marked:
    """The parts with strings that stand side by side as one, and without empty ones."""
    found: list[str | Tag] = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        elif part != "":
            found.append(part)
    return tuple(found)


def partners(marks: Iterable[tuple[str, str]]) -> dict[int, int]:
    """What closes what, of marks that need not nest: those of no counterpart are left out, and so are those that cross.

    Args:
        marks: The kind and the name of each; others than ``"open"`` and ``"close"`` are nothing to it.

    Returns:
        For the place of each that opens the place of the one that closes it.
    """
    found: dict[int, int] = {}
    opened: list[tuple[str, int]] = []
    for place, (kind, name) in enumerate(marks):
        if kind == "open":
            opened.append((name, place))
        elif kind == "close":
            match = next((at for at in reversed(range(len(opened))) if opened[at][0] == name), None)
            if match is not None:
                found[opened[match][1]] = place
                del opened[match:]
    return found


class _Placed:
    """Where the elements of a source go in its translation.

    Args:
        source: The text.
        target: Its translation.
        looked: fp32 ``[target words, source words]``.
    """

    def __init__(self, source: str, target: str, looked: Array) -> None:
        self._text, self._target_text, self._looked = source, target, looked
        self._source, self._target = word_spans(source), word_spans(target)
        self._links = [int(row.argmax()) if row.size and row.max() > 0 else None for row in looked]

    def inserts(self, root: _Element) -> Iterator[tuple[int, str | Tag]]:
        """What comes in at which character, in the order of the translation."""
        at = 0
        for place, part in self._inside(root, range(len(self._target)), 0):
            at = max(at, place)
            yield at, part

    def _inside(self, parent: _Element, words: range, at: int) -> Iterator[tuple[int, str | Tag]]:
        """What comes in inside an element that has some words of the translation, or none and a place in it."""
        order = sorted(zip(self._ranges(parent, words), parent.children, strict=True), key=lambda one: _key(one[0]))
        for own, child in order:
            if child.opening is None:
                continue
            if own:
                start, end = self._target[own.start][0], self._target[own.stop - 1][1]
                yield start, child.opening
                yield from self._inside(child, own, start)
            else:
                start = end = self._at(own.start, words, child, at)
                before, behind = child.space
                if before and start and not self._target_text[start - 1].isspace():
                    yield start, " "
                yield start, child.opening
                yield from self._inside(child, own, start)
            if child.closing is not None:
                yield end, child.closing
            if not own and behind and self._target_text[end : end + 1].strip():
                yield end, " "

    def _at(self, word: int, words: range, child: _Element, at: int) -> int:
        """The character of a place between words."""
        if not words:
            return at
        if word == words.stop or (word > words.start and child.space[1] and not child.space[0]):
            return self._target[word - 1][1]
        return self._target[word][0]

    def _ranges(self, parent: _Element, words: range) -> list[range]:
        """The words of a translation that each child of an element has, of those that the element has.

        A child that has none has its place between two.
        """
        inside = self._words_of(parent)
        of_children = [[word for word in self._words_of(child) if word in inside] for child in parent.children]
        owner = {word: child for child in reversed(range(len(of_children))) for word in of_children[child]}
        labels = {place: None if (link := self._links[place]) is None else owner.get(link, -1) for place in words}
        runs: dict[int, range] = {}
        with_words = [child for child, found in enumerate(of_children) if found]
        if len(with_words) == 1 and len(of_children[with_words[0]]) == len(inside):
            runs[with_words[0]] = words
        else:
            for child in with_words:
                if run := _longest(child, labels, words):
                    runs[child] = run
            for child in with_words:
                if child not in runs and (run := self._most_looked(of_children[child], runs.values(), words)):
                    runs[child] = run
        ranges = []
        for place, element in enumerate(parent.children):
            if runs.get(place):
                ranges.append(runs[place])
                continue
            word = self._place(element, inside, words)
            for other, run in runs.items():
                if run.start < word < run.stop:
                    word = run.start if place < other else run.stop
            ranges.append(range(word, word))
        return ranges

    def _words_of(self, element: _Element) -> range:
        """The words of the source that an element has a part of."""
        found = [
            place for place, (start, end) in enumerate(self._source) if start < element.end and element.start < end
        ]
        return range(found[0], found[-1] + 1) if found else range(0)

    def _most_looked(self, of_source: Sequence[int], taken: Iterable[range], words: range) -> range | None:
        """The word of a translation that looked most at some words of the source, of those that nobody has."""
        free = [place for place in words if not any(place in run for run in taken)]
        sums = [float(self._looked[place, list(of_source)].sum()) for place in free]
        if not free or max(sums) <= 0:
            return None
        best = free[sums.index(max(sums))]
        return range(best, best + 1)

    def _place(self, child: _Element, inside: range, words: range) -> int:
        """Before which word of a translation an element goes that has none."""
        before = [word for word in inside if self._source[word][1] <= child.start]
        behind = [word for word in inside if self._source[word][0] >= child.start]
        if not before:
            return words.start
        if not behind:
            return words.stop
        of_before = [place for place in words if self._links[place] == before[-1]]
        of_behind = [place for place in words if self._links[place] == behind[0]]
        ends = not any(map(str.isalnum, self._text[slice(*self._source[before[-1]])]))  # a sentence, or a part of it
        if of_behind and not (ends and of_before):
            return of_behind[0]
        if of_before:
            return of_before[-1] + 1
        return words.start + round(len(words) * len(before) / len(inside))


def _key(words: range) -> tuple[int, int]:
    return words.start, words.stop


def _longest(child: int, labels: dict[int, int | None], words: range) -> range | None:
    """The run of words with the most of a child's, with no more than one of its parent's between two of them."""
    best: tuple[int, range] | None = None
    for first in words:
        if labels[first] != child:
            continue
        last, count, gap = first, 1, 0
        for place in range(first + 1, words.stop):
            label = labels[place]
            gap = 0 if label == child else gap + (label is not None)
            if gap > 1 or label not in (child, -1, None):
                break
            if label == child:
                last, count = place, count + 1
        if best is None or count > best[0]:
            best = count, range(first, last + 1)
    return best and best[1]
