"""HTML whose text is translated and whose every other character stays as it is.

It is read as its tokens alone: nothing is made a tree of, repaired or written anew, and a page that is not well formed
comes back as little so as it was.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from itertools import accumulate, islice
from typing import Any, Literal

from hf_nmsparse.alignment import Span
from hf_nmsparse.markup import Marked, Tag, partners
from hf_nmsparse.placeholders import has_words

__all__ = ["Html", "Pages", "translate_html"]

_NAMES = """
inline: a abbr acronym b bdi bdo big cite data del dfn em font i ins label mark nobr q s small span strike strong sub
    sup time tt u wbr img input picture output meter progress
void: area base br col embed hr img input link meta param source track wbr
opaque: script style template textarea pre xmp iframe object
word: code kbd samp var svg math ruby
"""
# Elements by their names: those that stand within a sentence, where all others end one; those that have no content;
# those whose content is no text to translate, and those of them that stand in the place of a word.
_INLINE, _VOID, _OPAQUE, _WORDS = (
    frozenset(names.split()) for names in re.split(r"^\w+:", _NAMES.strip(), flags=re.MULTILINE)[1:]
)
_BLANKS = re.compile(r"[ \t\n\r\f]+")
_UNFINISHED = re.compile(r"<(?:[a-zA-Z!?]|/[a-zA-Z])")

_Kind = Literal["open", "close", "void", "text", "other", "word", "block"]


@dataclass(frozen=True)
class _Token:
    """A token of a page.

    Attributes:
        kind: What it is.
        name: The name of a tag.
        stays: Whether it says that its content is not translated.
        start: Its first character.
        end: The one behind its last.
    """

    kind: _Kind
    name: str
    stays: bool
    start: int
    end: int = 0


class _Reader(HTMLParser):
    """Reads where the tokens of a page begin; each goes on to the next."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=False)
        self.found: list[_Token] = []
        sizes = (len(line) + 1 for line in page.split("\n"))
        self._lines = list(accumulate(sizes, initial=0))
        self.feed(page)
        self.close()

    def _add(self, kind: _Kind, name: str = "", stays: bool = False) -> None:
        line, column = self.getpos()
        self.found.append(_Token(kind, name, stays, self._lines[line - 1] + column))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._add("void" if tag in _VOID else "open", tag, _stays(attrs))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # The slash says nothing in HTML, but something in SVG and in what programs write.
        self._add("void", tag)

    def handle_endtag(self, tag: str) -> None:
        self._add("close", tag)

    def handle_data(self, data: str) -> None:
        self._add("text")

    def handle_entityref(self, name: str) -> None:
        self._add("text")

    def handle_charref(self, name: str) -> None:
        self._add("text")

    def handle_comment(self, data: str) -> None:
        self._add("other")

    def handle_decl(self, decl: str) -> None:
        self._add("other")

    def handle_pi(self, data: str) -> None:
        self._add("other")

    def unknown_decl(self, data: str) -> None:
        self._add("other")


def _stays(attrs: Iterable[tuple[str, str | None]]) -> bool:
    given = dict(attrs)
    return (given.get("translate") or "").strip().lower() == "no" or "notranslate" in (given.get("class") or "").split()


def _tokens(page: str) -> Iterator[_Token]:
    """The tokens of a page, one behind the other without a gap; what is not translated is one."""
    found = _Reader(page).found
    ends = [token.start for token in found[1:]] + [len(page)]
    place = 0
    while place < len(found):
        token, last = found[place], place
        if token.kind == "text" and _UNFINISHED.match(page, token.start):
            # A tag or comment that the page ends in: the parser calls it text, browsers show nothing from there on.
            yield replace(token, kind="block", end=len(page))
            return
        if token.kind == "open" and (token.stays or token.name in _OPAQUE | _WORDS):
            depth = 0
            for last in range(place, len(found)):
                if found[last].name == token.name:
                    depth += {"open": 1, "close": -1}.get(found[last].kind, 0)
                if depth == 0:
                    break
            word = token.name in _WORDS or token.name in _INLINE
            yield replace(token, kind="word" if word else "block", end=ends[last])
        elif token.kind in ("open", "close", "void") and token.name not in _INLINE:
            yield replace(token, kind="block", end=ends[place])
        else:
            yield replace(token, kind="void" if token.kind == "other" else token.kind, end=ends[place])
        place = last + 1


class Html:
    """A page, or a part of one.

    Args:
        page: It.

    Attributes:
        texts: Its texts: what stands between two tags that end a sentence.
    """

    def __init__(self, page: str) -> None:
        self.texts: list[Marked] = []
        self._page = page
        self._spans: list[Span] = []
        segment: list[_Token] = []
        for token in _tokens(page):
            if token.kind == "block":
                self._add(segment)
                segment = []
            else:
                segment.append(token)
        self._add(segment)

    def _add(self, segment: list[_Token]) -> None:
        """Adds what stands between two blocks, where there is something to translate."""
        while segment and self._stays_outside(segment[0]):
            segment = segment[1:]
        while segment and self._stays_outside(segment[-1]):
            segment = segment[:-1]
        if not any(token.kind == "text" and has_words(html.unescape(self._raw(token))) for token in segment):
            return
        parts: list[str | Tag] = []
        for token, kind in zip(segment, _nested(segment), strict=True):
            raw = self._raw(token)
            parts.append(_BLANKS.sub(" ", html.unescape(raw)) if kind == "text" else Tag(raw, kind))
        start, end = segment[0].start, segment[-1].end
        if isinstance(parts[0], str):
            start += len(self._raw(segment[0])) - len(self._raw(segment[0]).lstrip())
            parts[0] = parts[0].lstrip()
        if isinstance(parts[-1], str):
            end -= len(self._raw(segment[-1])) - len(self._raw(segment[-1]).rstrip())
            parts[-1] = parts[-1].rstrip()
        self.texts.append(tuple(parts))
        self._spans.append((start, end))

    def _stays_outside(self, token: _Token) -> bool:
        return token.kind == "void" or (token.kind == "text" and not self._raw(token).strip())

    def _raw(self, token: _Token) -> str:
        return self._page[token.start : token.end]

    def filled(self, translations: Sequence[Marked]) -> str:
        """The page with translations in the places of its texts.

        Args:
            translations: Of each of ``texts``. Where one is its text, what stands in the page stays.

        Raises:
            ValueError: There are more or fewer.
        """
        if len(translations) != len(self.texts):
            raise ValueError(f"html: {len(self.texts)} texts, got {len(translations)} translations")
        parts, at = [], 0
        for text, translation, (start, end) in zip(self.texts, translations, self._spans, strict=True):
            own = self._page[start:end] if translation == text else "".join(map(_written, translation))
            parts += [self._page[at:start], own]
            at = end
        return "".join([*parts, self._page[at:]])


def _nested(segment: Sequence[_Token]) -> list[Literal["open", "close", "void", "word", "text"]]:
    """The kinds of tokens, where what is not closed, or not opened, between two blocks stands alone."""
    kinds: list[Any] = ["void" if token.kind in ("open", "close") else token.kind for token in segment]
    for opening, closing in partners((token.kind, token.name) for token in segment).items():
        kinds[opening], kinds[closing] = "open", "close"
    return kinds


def _written(part: str | Tag) -> str:
    return part.text if isinstance(part, Tag) else html.escape(part, quote=False).replace("\xa0", "&nbsp;")


class Pages:
    """Several pages.

    Args:
        pages: The pages, or parts of some.

    Attributes:
        texts: Those of all, one after the other.
    """

    def __init__(self, pages: Iterable[str]) -> None:
        self._pages = list(map(Html, pages))
        self.texts = [text for page in self._pages for text in page.texts]

    def filled(self, translations: Iterable[Marked]) -> list[str]:
        """The pages with translations in the places of their texts."""
        found = iter(translations)
        return [page.filled(list(islice(found, len(page.texts)))) for page in self._pages]


def translate_html(pages: Iterable[str], translate: Callable[[list[Marked]], Sequence[Marked]]) -> list[str]:
    """Translates pages.

    Args:
        pages: The pages, or parts of some.
        translate: Gives the translations of texts with marks, such as `Translator.translate_marked`.

    Returns:
        The pages, each with its text translated and all else as it was.
    """
    read = Pages(pages)
    return read.filled(translate(read.texts))
