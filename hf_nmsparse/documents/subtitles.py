"""Subtitles: SubRip (.srt) and WebVTT (.vtt).

The libraries for them number, time and space all cues anew as they write. Here the lines of the file stay but for those
of the texts.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import IO

from hf_nmsparse.documents.base import DocumentError, Options, Translate, lines_of, read_text
from hf_nmsparse.documents.texts import Mark, as_one, one_line, rendered, translate_inner, well_nested, wrapped

__all__ = ["translate_srt", "translate_vtt"]

_TIME = r"(?:\d+:)?\d+:\d\d(?:[,.]\d+)?"
_TIMING = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}")
_NUMBER = re.compile(r"\s*\d+\s*")
_SPEAKER = re.compile(r"(?:<[^<>]*>|\{\\[^{}]*\})*\s*[-\u2013\u2014]")

_DASH = re.compile(r"\s*[-\u2013\u2014](?:\s+|(?=[^\W\d_]))")  # before what somebody says, and not of a number

# <i>, </font>, <v Roger>, <00:01.000>, and {\an8} of SubRip's players.
_TAG = re.compile(r"<(?P<end>/?)(?P<name>[a-zA-Z]+)[^<>]*>|<[\d:.]+>|\{\\[^{}]*\}")


def translate_srt(source: Path, target: IO[bytes], translate: Translate, options: Options) -> None:
    """Translates SubRip subtitles; the lines of a cue are one text, and are wrapped into as many again."""
    mark, text = read_text(source)
    lines = lines_of(text)
    starts = [place for place, line in enumerate(lines) if _TIMING.match(line)]
    # The number above the timing belongs to the next cue.
    ends = [start - 1 if start and _NUMBER.fullmatch(lines[start - 1]) else start for start in starts]
    for place in range(ends[0] if ends else len(lines)):
        if lines[place].strip():
            raise DocumentError(f"line {place + 1} belongs to no subtitle; name its format with --format")
    cues = [range(start + 1, end) for start, end in zip(starts, [*ends[1:], len(lines)], strict=bool(starts))]
    texts = [text for cue in cues for text in _between_blanks(lines, cue)]
    _translate_lines(lines, texts, translate, lambda text: text.replace("-->", "->"), str)
    target.write(mark + "".join(lines).encode())


def translate_vtt(source: Path, target: IO[bytes], translate: Translate, options: Options) -> None:
    """Translates WebVTT subtitles likewise; notes, styles and regions stay."""
    mark, text = read_text(source)
    lines = lines_of(text)
    if lines and not re.match(r"WEBVTT(?:\s|\Z)", lines[0]):
        raise DocumentError("does not begin with WEBVTT; name its format with --format")
    starts = [place for place, line in enumerate(lines) if _TIMING.match(line)]
    cues = [range(start + 1, end) for start, end in pairwise([*starts, len(lines)])]
    # A blank line ends a cue; what comes then is another block.
    texts = [text for cue in cues for text in _between_blanks(lines, cue) if text.start == cue.start]
    _translate_lines(lines, texts, translate, partial(html.escape, quote=False), html.unescape)
    target.write(mark + "".join(lines).encode())


def _between_blanks(lines: list[str], cue: range) -> Iterator[range]:
    start = cue.start
    for place in [*(place for place in cue if not lines[place].strip()), cue.stop]:
        if place > start:
            yield range(start, place)
        start = place + 1


def _translate_lines(
    lines: list[str],
    texts: list[range],
    translate: Translate,
    escape: Callable[[str], str],
    unescape: Callable[[str], str],
) -> None:
    """Translates ranges of the lines, in their place."""
    texts = [part for text in texts for part in _speakers(lines, text)]
    given, shares, around = [], [], []
    for text in texts:
        split = [_space_around(lines[place]) for place in text]
        parts, ends = as_one([list(_parts(inner, unescape, place == 0)) for place, (_, inner, _) in enumerate(split)])
        given.append(well_nested(parts))
        shares.append(ends)
        around.append([split[0][0], *(one[2] + other[0] for one, other in pairwise(split)), split[-1][2]])
    found = translate_inner(given, translate)
    for text, before, after, ends, spaces in zip(texts, given, found, shares, around, strict=True):
        if after != before:
            new = rendered(wrapped(one_line(after), ends, spaces[1:-1]), escape)
            lines[text.start : text.stop] = [spaces[0] + new + spaces[-1]] + [""] * (len(text) - 1)


def _space_around(line: str) -> tuple[str, str, str]:
    """A line as the white space before it, itself, and the white space behind it with what ends it."""
    inner = line.strip()
    start = line.index(inner)
    return line[:start], inner, line[start + len(inner) :]


def _speakers(lines: list[str], text: range) -> Iterator[range]:
    """A text in parts, where several lines of it begin with a dash: each begins another speaker's."""
    starts = [place for place in text if _SPEAKER.match(lines[place].strip())]
    starts = [place for place in starts if place > text.start] if len(starts) > 1 else []
    return (range(start, stop) for start, stop in pairwise([text.start, *starts, text.stop]))


def _parts(line: str, unescape: Callable[[str], str], first: bool) -> Iterator[str | Mark]:
    """A line as its strings and tags; the dash that the first line of a text begins with is one too."""
    end = 0
    speaks = _SPEAKER.match(line) if first else None
    if speaks and (dash := _DASH.match(line, speaks.end() - 1)):
        yield from _parts(line[: dash.start()], unescape, first=False)
        yield Mark(dash[0], "", "void")
        end = dash.end()
    for tag in _TAG.finditer(line, end):
        yield unescape(line[end : tag.start()])
        kind = "void" if tag["name"] is None else "close" if tag["end"] else "open"
        yield Mark(tag[0], tag["name"] or "", kind)
        end = tag.end()
    yield unescape(line[end:])
