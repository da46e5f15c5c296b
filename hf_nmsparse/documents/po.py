"""Message catalogues of gettext (.po): what is not translated yet is, and marked as fuzzy.

A library would wrap all messages anew as it writes and move what is obsolete. Here the lines of the file stay but for
the translations that are new, so that a version control system shows these alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from hf_nmsparse.documents.base import DocumentError, Options, Translate, lines_of, read_text
from hf_nmsparse.documents.texts import plain, translate_inner

__all__ = ["translate_po"]

_KEYWORD = re.compile(r'\s*(msgctxt|msgid_plural|msgid|msgstr\[\d+\]|msgstr)\s*(".*")\s*')
_QUOTED = re.compile(r'\s*"((?:[^"\\]|\\.)*)"\s*')
_ESCAPE = re.compile(r"\\([0-7]{1,3}|x[0-9a-fA-F]{2}|.)")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v", '"': '"', "\\": "\\"}
_CHARSET = re.compile(r"charset=([^\s;]+)", re.IGNORECASE)
_PLURALS = re.compile(r"nplurals\s*=\s*(\d{1,2})\s*;", re.IGNORECASE)


@dataclass
class _Field:
    """A keyword with its text, and the lines where it stands."""

    text: str
    lines: range


@dataclass
class _Entry:
    """A message.

    Attributes:
        fields: By their keywords.
        flags: Number of the line of its flags.
        previous: Number of the first line with what the message was before.
    """

    fields: dict[str, _Field] = field(default_factory=dict)
    flags: int | None = None
    previous: int | None = None

    @property
    def translations(self) -> list[_Field]:
        return [found for name, found in self.fields.items() if name.startswith("msgstr")]


def translate_po(source: Path, target: IO[bytes], translate: Translate, options: Options) -> None:
    """Translates the messages of a catalogue that have no translation; with ``overwrite`` all of them.

    Of a message with plural forms the first form is a translation of the singular and the others one of the plural;
    there are as many as the header says.
    """
    mark, text = read_text(source)
    lines = lines_of(text)
    entries = list(_entries(lines))
    forms = _forms(entries)
    todo = [
        entry
        for entry in entries
        if entry.fields["msgid"].text and (options.overwrite or not all(found.text for found in entry.translations))
    ]
    given = [entry.fields[name].text for entry in todo for name in ("msgid", "msgid_plural") if name in entry.fields]
    found = iter(translate_inner([(text,) for text in given], translate))
    for entry in todo:
        one = plain(next(found))
        many = plain(next(found)) if "msgid_plural" in entry.fields else None
        _write(lines, entry, {"msgstr": one} if many is None else _plurals(one, many, forms), options)
    target.write(mark + "".join(lines).encode())


def _plurals(one: str, many: str, forms: int) -> dict[str, str]:
    return {f"msgstr[{form}]": one if form == 0 and forms > 1 else many for form in range(forms)}


def _write(lines: list[str], entry: _Entry, translations: dict[str, str], options: Options) -> None:
    """Puts the translations of an entry into its lines; what has been translated before stays."""
    begin = entry.fields["msgid"].lines.start
    end = lines[begin][len(lines[begin].rstrip("\r\n")) :] or "\n"
    old = {name: found.text for name, found in entry.fields.items() if name.startswith("msgstr")}
    kept = {name: text for name, text in old.items() if text and not options.overwrite}
    new = {name: text for name, text in translations.items() if text.strip() and name not in kept}
    if not new:
        return
    place = entry.translations[0].lines.start
    last = entry.translations[-1].lines
    whole = lines[last.stop - 1].endswith(("\r", "\n"))
    raw = {name: "".join(lines[n] for n in found.lines) for name, found in entry.fields.items()}
    for found in entry.translations:
        lines[found.lines.start : found.lines.stop] = [""] * len(found.lines)
    names = sorted(old.keys() | new.keys(), key=lambda name: int(name[7:-1] or 0))
    text = "".join(f"{name} {_quoted(new[name], end)}{end}" if name in new else raw[name] for name in names)
    lines[place] = text if whole else text.removesuffix(end)
    if entry.flags is None:
        place = min(found.lines.start for found in entry.fields.values())
        place = place if entry.previous is None else entry.previous
        lines[place] = f"#, fuzzy{end}{lines[place]}"
    elif not re.search(r"\bfuzzy\b", lines[entry.flags]):
        lines[entry.flags] = lines[entry.flags].replace("#,", "#, fuzzy,", 1)


def _quoted(text: str, end: str) -> str:
    """A text between quotation marks; one of several lines begins in the next line, as gettext writes it."""
    names = {character: f"\\{name}" for name, character in _ESCAPES.items()}
    parts = ["".join(names.get(character, character) for character in line) for line in text.split("\n")]
    parts = [f'"{part}\\n"' for part in parts[:-1]] + ([f'"{parts[-1]}"'] if parts[-1] or len(parts) == 1 else [])
    return parts[0] if len(parts) == 1 else end.join(['""', *parts])


def _forms(entries: list[_Entry]) -> int:
    """How many plural forms the header asks for."""
    header = next(
        (entry for entry in entries if not entry.fields["msgid"].text and "msgctxt" not in entry.fields), None
    )
    text = header.translations[0].text if header is not None else ""
    charset = _CHARSET.search(text)
    if charset and charset[1].lower() not in ("utf-8", "utf8"):
        raise DocumentError(f"its header names the charset {charset[1]}; make it UTF-8, such as with msgconv -t UTF-8")
    plurals = _PLURALS.search(text)
    if plurals is None and any("msgid_plural" in entry.fields for entry in entries):
        raise DocumentError("its header does not say nplurals, and there are plural forms; add Plural-Forms to it")
    return max(int(plurals[1]), 1) if plurals else 1


def _entries(lines: list[str]) -> Iterator[_Entry]:
    entry, last = _Entry(), ""
    for place, line in enumerate(lines):
        if not line.strip():
            continue
        comment = line.lstrip().startswith("#")
        keyword = None if comment else _KEYWORD.fullmatch(line)
        quoted = _QUOTED.fullmatch(keyword[2] if keyword else line)
        if not comment and (quoted is None or not (keyword or last)):
            raise DocumentError(f"line {place + 1} is no line of a message catalogue: {line.strip()[:50]!r}")
        if (comment or (keyword and keyword[1] in ("msgctxt", "msgid"))) and entry.translations:
            yield _checked(entry, place)
            entry, last = _Entry(), ""
        if line.lstrip().startswith("#~") and not entry.fields:
            entry = _Entry()  # what stands before an obsolete message is that one's
        if comment:
            if line.lstrip().startswith("#,") and (entry.flags is None or "fuzzy" in line):
                entry.flags = place
            elif line.lstrip().startswith("#|") and entry.previous is None:
                entry.previous = place
        elif keyword and quoted:
            last = keyword[1]
            if last in entry.fields:
                raise DocumentError(f"line {place + 1}: another {last} in one message")
            entry.fields[last] = _Field(_unescaped(quoted[1], place), range(place, place + 1))
        elif quoted:
            known = entry.fields[last]
            known.text += _unescaped(quoted[1], place)
            known.lines = range(known.lines.start, place + 1)
    if entry.fields:
        yield _checked(entry, len(lines))


def _checked(entry: _Entry, place: int) -> _Entry:
    if "msgid" not in entry.fields or not entry.translations:
        raise DocumentError(f"the message before line {place + 1} lacks a msgid or a msgstr")
    return entry


def _unescaped(text: str, place: int) -> str:
    def character(found: re.Match[str]) -> str:
        name = found[1]
        if name in _ESCAPES:
            return _ESCAPES[name]
        code = int(name[1:], 16) if name[0] == "x" and len(name) == 3 else int(name, 8) if name.isdecimal() else 128
        if code < 128:  # others are bytes of a character
            return chr(code)
        raise DocumentError(f"line {place + 1}: unknown escape \\{name}; write the character itself")

    return _ESCAPE.sub(character, text)
