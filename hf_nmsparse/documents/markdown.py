"""Markdown: paragraphs, headings, list items and cells are translated; the rest of the file stays byte for byte.

markdown-it says which lines are text, and how their inline markup nests. A text that has changed is written so that it
is read again as what it is meant to be, with as few escapes as that takes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from operator import contains
from pathlib import Path
from typing import IO, Any

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock, reference
from markdown_it.rules_inline import StateInline, autolink, backtick, html_inline, image, link
from markdown_it.token import Token
from mdit_py_plugins.amsmath import amsmath_plugin
from mdit_py_plugins.container import container_plugin
from mdit_py_plugins.dollarmath.index import math_block_dollar, math_inline_dollar

from hf_nmsparse.documents.base import Options, Translate, lines_of, read_text
from hf_nmsparse.documents.texts import (
    Mark,
    as_one,
    one_line,
    rendered,
    stripped,
    translate_inner,
    well_nested,
    wrapped,
)
from hf_nmsparse.markup import Marked, Tag

__all__ = ["translate_markdown"]

_END = r"(?:\r\n?|\n)"
_FRONT_MATTER = re.compile(
    rf"(?:---[ \t]*{_END}(?=\S)(?!---).*?{_END}(?:---|\.\.\.)|\+\+\+[ \t]*{_END}.*?{_END}\+\+\+)[ \t]*(?=[\r\n]|\Z)",
    re.DOTALL,
)
_NOTE = re.compile(r"\[\^[^\]\s]+\]:[^\S\n]*")  # before the text of a footnote
_BOX = re.compile(r"\[[ xX]\][^\S\n]+")  # before that of an item
_ALERT = re.compile(r"\[![\w-]+\][+-]?[^\S\n]*")  # what a quote is: [!NOTE], and a title or the end of the line
_FOOTNOTE = re.compile(r"\[\^[^\]\s]+\](?![\[(])")
_BREAK = re.compile(r"\\?[ \t]*\n[ \t]*")
_HTML_NAME = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9-]*)")
_EMPTY_HTML = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}

# What begins markup within a line, and what else may be escaped: at the start of a line it may begin a block.
_INLINE_MARKUP = re.compile(r"([\\`*_\[\]<&~$])")
_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")

_INLINE_FORMULA = math_inline_dollar(allow_space=False, allow_digits=False, allow_double=True)
_BLOCK_FORMULA = math_block_dollar()

_TOKENS = {
    "paragraph": ["paragraph_open", "inline", "paragraph_close"],
    "heading": ["heading_open", "inline", "heading_close"],
}
_IN_HTML = {"*": "em", "_": "em", "**": "strong", "__": "strong", "~~": "del"}


@dataclass(frozen=True)
class _Text:
    """A text of the document.

    Attributes:
        content: As markdown-it has it, without what begins its lines.
        kind: The block that it is all of: "paragraph", "heading" or "cell".
        line: Number of its first line.
        start: Where it begins in that.
        stop: Where it ends in the last.
        prefixes: What begins each of its lines but the first.
    """

    content: str
    kind: str
    line: int
    start: int
    stop: int
    prefixes: tuple[str, ...]


def translate_markdown(source: Path, target: IO[bytes], translate: Translate, options: Options) -> None:
    """Translates CommonMark with GitHub's tables, footnotes, struck texts, alerts and formulas, and ``:::`` blocks."""
    mark, text = read_text(source)
    lines = lines_of(text)
    environment: dict[str, Any] = {}
    texts = list(_texts(text, lines, environment))
    given, shares = [], []
    for one in texts:
        marked, ends = _marked(one.content, environment)
        given.append(marked)
        shares.append(ends)
    found = translate_inner(given, translate)
    changed = [
        (one, _tidy(one_line(after)), ends)
        for one, before, after, ends in zip(texts, given, found, shares, strict=True)
        if after != before
    ]
    for one, after, ends in reversed(changed):  # what changes a line leaves what is before it in its place
        _replace(lines, one, _written(after, ends, one.kind, environment))
    target.write(mark + "".join(lines).encode())


def _blocks() -> MarkdownIt:
    parser = MarkdownIt("commonmark").enable("table")
    parser.disable("inline")
    parser.block.ruler.at("reference", _reference)
    _add_formulas(parser)
    container_plugin(parser, "any", validate=lambda *_: True)
    return parser


def _add_formulas(parser: MarkdownIt) -> None:
    """``$formulas$`` by the rules of GitHub, which leave prices alone, and LaTeX's environments."""
    parser.inline.ruler.before("escape", "math_inline", _inline_formula)
    # One of several lines ends a paragraph, as a fence does.
    ends = ["paragraph", "reference", "blockquote", "list"]
    parser.block.ruler.before("fence", "math_block", _block_formula, {"alt": ends})
    amsmath_plugin(parser)


def _inline_formula(state: StateInline, silent: bool) -> bool:
    text = state.src
    if state.pos == 0:  # the rule asks what stands before the dollar, and at the start finds the last character there
        state.src += " "
    found = _INLINE_FORMULA(state, silent)
    state.src = text
    return found


def _block_formula(state: StateBlock, line: int, last: int, silent: bool) -> bool:
    at, count = state.line, len(state.tokens)
    found = _BLOCK_FORMULA(state, line, last, silent)
    if silent:  # which the rule does not know: it is asked whether one begins here, and adds it
        state.line = at
        del state.tokens[count:]
    return found


def _reference(state: StateBlock, line: int, last: int, silent: bool) -> bool:
    """What a link refers to; a footnote, which looks alike, is text."""
    place = state.bMarks[line] + state.tShift[line]
    return not state.src.startswith("[^", place) and reference(state, line, last, silent)


def _inlines() -> MarkdownIt:
    parser = MarkdownIt("commonmark").disable("text_join")
    rules: dict[str, Callable[[StateInline, bool], bool]] = {
        "link": link,
        "image": image,
        "autolink": autolink,
        "backticks": backtick,
        "html_inline": html_inline,
    }
    for name, rule in rules.items():
        parser.inline.ruler.at(name, _with_place(rule))
    parser.inline.ruler.before("link", "footnote", _with_place(_footnote))
    _add_formulas(parser)
    return parser


def _with_place(rule: Callable[[StateInline, bool], bool]) -> Callable[[StateInline, bool], bool]:
    """A rule that notes in its last token where it has ended."""

    def noting(state: StateInline, silent: bool) -> bool:
        count = len(state.tokens)
        found = rule(state, silent)
        if found and not silent and len(state.tokens) > count:
            state.tokens[-1].meta["end"] = state.pos
        return found

    return noting


def _footnote(state: StateInline, silent: bool) -> bool:
    found = _FOOTNOTE.match(state.src, state.pos, state.posMax)
    if found is None:
        return False
    if not silent:
        state.push("footnote", "", 0)
    state.pos = found.end()
    return True


_BLOCKS, _INLINES = _blocks(), _inlines()


def _texts(text: str, lines: list[str], environment: dict[str, Any]) -> Iterator[_Text]:
    """The texts of a document; what its links refer to goes to ``environment``."""
    front = _FRONT_MATTER.match(text)
    hidden = len(lines_of(front[0])) if front else 0
    tokens = _BLOCKS.parse("".join(["\n"] * hidden + lines[hidden:]), environment)
    cell = -1, 0  # the line of the last one, and where it ends
    for before, token in pairwise(tokens):
        if token.type != "inline" or not token.map or not token.content:
            continue
        if before.type in ("th_open", "td_open"):
            line, content = token.map[0], token.content.replace("|", "\\|")
            start = lines[line].index(content, cell[1] if cell[0] == line else 0)
            cell = line, start + len(content)
            yield _Text(token.content, "cell", line, start, cell[1], ())
        else:
            yield from _texts_of_block(before, token.content, token.map, lines)


def _texts_of_block(opening: Token, content: str, place: list[int], lines: list[str]) -> Iterator[_Text]:
    """The text of a paragraph or heading; each footnote in it is a text, and so is the title of an alert."""
    raw = content.split("\n")
    inner = [part.strip(" \t") for part in raw]
    # Lines of odd spaces at its ends are not in the content.
    line = next(line for line in range(*place) if all(map(contains, lines[line:], inner)))
    starts = [lines[line + number].rindex(part) for number, part in enumerate(inner)]
    is_heading = opening.type == "heading_open"
    is_alert = not is_heading and _ALERT.match(inner[0]) is not None
    begins = [
        number
        for number, part in enumerate(inner)
        if number and not is_heading and (_NOTE.match(part) or (is_alert and number == 1))
    ]
    for first, end in pairwise([0, *begins, len(raw)]):
        text = "\n".join(raw[first:end]).strip(" \t")
        mark = None if is_heading else _NOTE.match(text) or _BOX.match(text) or _ALERT.match(text)
        skipped = mark.end() if mark else 0
        if skipped == len(text):
            continue
        yield _Text(
            text[skipped:],
            "heading" if is_heading and opening.markup.startswith("#") else "paragraph",
            line + first,
            starts[first] + skipped,
            starts[end - 1] + len(inner[end - 1]),
            tuple(lines[line + number][: starts[number]] for number in range(first + 1, end)),
        )


def _marked(content: str, environment: dict[str, Any]) -> tuple[Marked, list[float]]:
    """A text without its soft line breaks, and which share of it stands before each."""
    lines: list[list[str | Mark]] = [[]]
    for part in _parts(content, environment):
        if part == "\n":
            lines.append([])
        else:
            lines[-1].append(part)
    parts, ends = as_one(lines)
    return well_nested(parts), ends


def _parts(content: str, environment: dict[str, Any]) -> Iterator[str | Mark]:
    """The strings and tags of a text; a line feed alone is a soft line break."""
    [whole] = _INLINES.parseInline(content, environment)
    place, struck = 0, False
    opened: list[int] = []  # where the texts of links begin
    tokens = iter(whole.children or [])
    for token in tokens:
        kind, start = token.type, place
        if kind == "text":
            assert content.startswith(token.content, start)
            place += len(token.content)
            for piece in re.split("(~~)", token.content):
                around = content[max(start - 1, 0) : start], content[start + 2 : start + 3]
                start += len(piece)
                if piece == "~~" and around[not struck].strip():  # the side of what is struck
                    struck = not struck
                    yield Mark(piece, piece, "open" if struck else "close")
                else:
                    yield piece
        elif kind == "text_special":
            place += len(token.markup)
            yield token.content
        elif kind in ("softbreak", "hardbreak"):
            found = _BREAK.match(content, place)
            assert found is not None
            place = found.end()
            yield "\n" if kind == "softbreak" else Mark(re.sub(r"\n[ \t]*", "\n", found[0]), "", "void")
        elif kind == "link_open" and token.markup != "autolink":
            place += 1
            opened.append(place)
            yield Mark("[", "link", "open")
        elif kind == "link_close" and token.markup != "autolink":
            place = token.meta["end"]
            label, text = content[opened.pop() : start], content[start:place]
            # The text of a link may be the name of what it refers to, which stays.
            yield Mark(f"][{label}]" if text in ("]", "][]") else text, "link", "close")
        elif kind == "link_open":
            place = [next(tokens), next(tokens)][-1].meta["end"]
            yield Mark(content[start:place], "", "word")
        elif kind.startswith("math_inline"):
            place += len(token.content) + 2 * len(token.markup)
            yield Mark(content[start:place], "", "word")
        elif token.nesting:
            place += len(token.markup)
            yield Mark(token.markup, token.markup, "open" if token.nesting > 0 else "close")
        else:  # code, an image, a tag of HTML, a footnote
            place = token.meta["end"]
            text = content[start:place]
            yield (
                _html_mark(text)
                if kind == "html_inline"
                else Mark(text, "", "word" if kind == "code_inline" else "void")
            )


def _html_mark(text: str) -> Mark:
    found = _HTML_NAME.match(text)
    if found is None or text.endswith("/>") or found[2].lower() in _EMPTY_HTML:
        return Mark(text, "", "void")
    return Mark(text, f"<{found[2].lower()}", "close" if found[1] else "open")


def _tidy(text: Marked) -> Marked:
    """The text with the white space that is next to a tag on the outer side of it, as emphasis needs it."""
    parts = list(text)
    for place in range(len(parts) - 1, 0, -1):
        before, here = parts[place - 1 : place + 1]
        if isinstance(before, Tag) and before.kind == "open" and isinstance(here, str):
            inner = here.lstrip(" ")
            parts[place - 1 : place + 1] = [here[: len(here) - len(inner)], before, inner]
    place = 1
    while place < len(parts):
        before, here = parts[place - 1 : place + 1]
        if isinstance(here, Tag) and here.kind == "close" and isinstance(before, str):
            inner = before.rstrip(" ")
            parts[place - 1 : place + 1] = [inner, here, before[len(inner) :]]
        place += 1
    return stripped(tuple(parts))


def _written(text: Marked, ends: Sequence[float], kind: str, environment: dict[str, Any]) -> str:
    """The first way to write a text that is read as it: with few escapes, and with its line breaks where they can be.

    Emphasis that cannot be written with stars, as within some words, is written in HTML.
    """
    broken = wrapped(text, ends, ["\n"] * len(ends))
    for markup in (None, _INLINE_MARKUP, _PUNCTUATION):
        for parts in dict.fromkeys((broken, text)):
            content = rendered(parts, partial(_escaped, markup))
            if _reads_as(content, text, kind, environment):
                return content
    tags = [
        Tag(f"<{'/' if part.kind == 'close' else ''}{_IN_HTML[part.text]}>", part.kind)
        if isinstance(part, Tag) and part.kind in ("open", "close") and part.text in _IN_HTML
        else part
        for part in text
    ]
    return rendered(tuple(tags), partial(_escaped, _PUNCTUATION))


def _escaped(markup: re.Pattern[str] | None, text: str) -> str:
    return text if markup is None else markup.sub(r"\\\1", text)


def _reads_as(content: str, text: Marked, kind: str, environment: dict[str, Any]) -> bool:
    if kind != "paragraph" and ("\n" in content or content != content.strip()):
        return False
    if kind != "cell":
        tokens = _BLOCKS.parse(f"# {content}" if kind == "heading" else content, {})
        if [token.type for token in tokens] != _TOKENS[kind] or tokens[1].content != content:
            return False
    return _marked(content, environment)[0] == text


def _replace(lines: list[str], text: _Text, content: str) -> None:
    """Puts what a text is now into its lines."""
    last = text.line + len(text.prefixes)
    first = lines[text.line]
    end = first[len(first.rstrip("\r\n")) :]
    if text.kind == "cell":
        content = content.replace("|", "\\|")
    head, *rest = content.split("\n")
    # Where tags have brought more line breaks than there are lines they begin as the last one does.
    starts = (text.prefixes[min(number, len(text.prefixes) - 1)] for number in range(len(rest)))
    new = head + "".join(f"{end}{start}{line}" for start, line in zip(starts, rest, strict=True))
    lines[text.line : last + 1] = [first[: text.start] + new + lines[last][text.stop :]] + [""] * len(text.prefixes)
