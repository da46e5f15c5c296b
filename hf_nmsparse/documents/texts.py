"""Marked texts on their way through a translation: what is left out of it, and how their lines are wrapped again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

from hf_nmsparse.documents.base import Translate
from hf_nmsparse.markup import Marked, Tag, joined, partners
from hf_nmsparse.paragraphs import is_wide
from hf_nmsparse.placeholders import has_words

__all__ = [
    "Mark",
    "as_one",
    "one_line",
    "plain",
    "rendered",
    "stripped",
    "translate_inner",
    "well_nested",
    "wrapped",
]

T = TypeVar("T")


_LINE_ENDS = re.compile(r"[\r\n]+")


class Mark(NamedTuple):
    """A tag as it stands in a document, where it may have no counterpart.

    Attributes:
        text: What stands there.
        name: Which opening and closing ones belong together.
        kind: As of `Tag`.
    """

    text: str
    name: str
    kind: str


def well_nested(parts: Iterable[str | Mark]) -> Marked:
    """The parts with a tag for each mark; those that have no counterpart stand alone."""
    given = list(parts)
    pairs = partners(("", "") if isinstance(part, str) else (part.kind, part.name) for part in given)
    closing = set(pairs.values())
    found: list[str | Tag] = []
    for place, part in enumerate(given):
        if isinstance(part, str):
            found.append(part)
        elif part.kind == "word":
            found.append(Tag(part.text, "word"))
        else:
            found.append(Tag(part.text, "open" if place in pairs else "close" if place in closing else "void"))
    return joined(found)


def rendered(text: Marked, escape: Callable[[str], str] = str) -> str:
    """What stands in the document for a text whose strings need escaping."""
    return "".join(part.text if isinstance(part, Tag) else escape(part) for part in text)


def one_line(text: Marked) -> Marked:
    """The same text in one line."""
    return joined(part if isinstance(part, Tag) else _LINE_ENDS.sub(" ", part) for part in text)


def translate_inner(texts: Sequence[Marked], translate: Translate) -> list[Marked]:
    """Translates texts, but for what is around their words and for texts without any.

    White space, tags that stand alone at an end and those around the whole text stay where they are, so that most texts
    that have tags are translated without. Tags in the place of words are translated with these.

    Args:
        texts: The texts.
        translate: Gives them in another language.

    Raises:
        ValueError: It gives more of them, or fewer.
    """
    split = [_split(joined(text)) for text in texts]
    whole = list(texts)  # what does not change is given back as it is, whatever its parts are
    places = [place for place, (_, inner, _) in enumerate(split) if _says_something(inner)]
    found = translate([joined(split[place][1]) for place in places]) if places else []
    for place, inner in zip(places, found, strict=True):
        before, old, after = split[place]
        if (new := stripped(inner)) != joined(old):
            whole[place] = joined((*before, *new, *after))
    return whole


def _says_something(text: Marked) -> bool:
    return any(isinstance(part, str) and has_words(part) for part in text)


def stripped(text: Marked) -> Marked:
    """The text without white space at its ends."""
    parts = list(joined(text))
    if parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return joined(parts)


def _split(text: Marked) -> tuple[Marked, Marked, Marked]:
    """A text as what stands before its words, the words with the tags between them, and what stands after."""
    parts = [piece for part in text for piece in (_pieces(part) if isinstance(part, str) else [part])]
    partner = _partners(parts)
    first, last = 0, len(parts)  # the words lie in between
    while True:
        before = first, last
        while first < last and _is_blank(parts[first : partner.get(first, first) + 1]):
            first = partner.get(first, first) + 1
        while first < last and _is_blank(parts[partner.get(last - 1, last - 1) : last]):
            last = partner.get(last - 1, last - 1)
        if last - first > 1 and partner.get(first) == last - 1:
            first, last = first + 1, last - 1
        if before == (first, last):
            return tuple(parts[:first]), tuple(parts[first:last]), tuple(parts[last:])


def _pieces(part: str) -> Iterator[str]:
    """A string as the white space before it, itself, and the white space after it."""
    inner = part.strip()
    start = part.index(inner) if inner else len(part)
    yield from filter(None, (part[:start], inner, part[start + len(inner) :]))


def _partners(parts: Sequence[str | Tag]) -> dict[int, int]:
    """The place of the other tag for each that opens or closes."""
    found: dict[int, int] = {}
    opened: list[int] = []
    for place, part in enumerate(parts):
        if isinstance(part, Tag) and part.kind == "open":
            opened.append(place)
        elif isinstance(part, Tag) and part.kind == "close":
            start = opened.pop()
            found[start], found[place] = place, start
    return found


def _is_blank(parts: Sequence[str | Tag]) -> bool:
    """Whether a string, a tag alone, or a pair of tags with what is between holds no more than white space."""
    blank = (part.kind != "word" if isinstance(part, Tag) else not part.strip() for part in parts)
    return bool(parts) and all(blank)


def as_one(lines: Sequence[Sequence[str | T]]) -> tuple[list[str | T], list[float]]:
    """Lines as one text, with a space where one ended unless their script has none.

    Returns:
        The parts of the text, and for each end of a line which share of the text stands before it.
    """
    parts, text, ends = list(lines[0]), plain(lines[0]), []
    for line in lines[1:]:
        more = plain(line)
        space = "" if text and more and is_wide(text[-1]) and is_wide(more[0]) else " "
        ends.append(len(text))
        text += space + more
        parts += [space, *line]
    return parts, [end / len(text) for end in ends]


def plain(text: Iterable[object]) -> str:
    """A text without its tags."""
    return "".join(part for part in text if isinstance(part, str))


def wrapped(text: Marked, shares: Sequence[float], breaks: Sequence[str]) -> Marked:
    """A text with line breaks, each as near as may be to where it was.

    Args:
        text: The text, in one line.
        shares: For each break which share of the original stood before it.
        breaks: What stands there; each is a tag of its own in the result.

    Returns:
        The text; with fewer breaks, from the first on, where it has not so many places for one.
    """
    whole = plain(text)
    # A break takes the place of a space, or stands between characters of a script that has none.
    places = [
        place
        for place, (before, here) in enumerate(pairwise(whole), 1)
        if (here == " " != before and place < len(whole) - 1) or (is_wide(before) and is_wide(here))
    ]
    chosen: dict[int, str] = {}
    for number, (share, mark) in enumerate(zip(shares, breaks, strict=True)):
        left = [place for place in places if place > max(chosen, default=0)]
        later = min(len(breaks) - number, len(left)) - 1  # breaks that still follow
        left = left[: len(left) - later] if later > 0 else left
        if left:
            chosen[min(left, key=lambda place: abs(place - share * len(whole)))] = mark
    return joined(_broken(text, chosen))


def _broken(text: Marked, chosen: dict[int, str]) -> Iterator[str | Tag]:
    place = 0
    for part in text:
        if isinstance(part, Tag):
            yield part
            continue
        for character in part:
            if place in chosen:
                yield Tag(chosen[place], "void")
            if place not in chosen or character != " ":
                yield character
            place += 1
