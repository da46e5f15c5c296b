"""Terms that have one right translation, and where a text has them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, zip_longest
from pathlib import Path

from hf_nmsparse.alignment import Span
from hf_nmsparse.placeholders import replaced

__all__ = ["Glossary", "Term", "missing"]

_OTHER_FORM = "|"
_LARGEST = 1 << 26  # characters of a file
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class _Entry:
    """A term of a glossary.

    Attributes:
        is_small: Whether it is in small letters, and found in capitals too.
        written: It, with one space between words.
        length: Its words.
        forms: Its translations.
    """

    is_small: bool
    written: str
    length: int
    forms: tuple[str, ...]


@dataclass(frozen=True)
class Term:
    """A term in a text.

    Attributes:
        span: Where it stands.
        forms: What a translation may have for it; the first is what it is given if it has none.
    """

    span: Span
    forms: tuple[str, ...]


class Glossary:
    """Terms of a source language with their translations.

    A term is found as whole words. One in small letters is found in capitals too; others as they are.

    Args:
        terms: The translation of each term; several forms of it stand apart by ``|``, the one to force first.

    Raises:
        ValueError: A side is blank or no text.
    """

    def __init__(self, terms: Mapping[str, str]) -> None:
        self._by_first: dict[str, list[_Entry]] = {}
        if not isinstance(terms, Mapping):
            raise ValueError(f"glossary: terms are no mapping but {type(terms).__name__}; give each its translation")
        for source, target in terms.items():
            if not (_is_text(source) and _is_text(target)):
                raise ValueError(f"glossary: {source!r} is {target!r}; a term and its translation are text")
            forms = tuple(form.strip() for form in target.split(_OTHER_FORM))
            words = _words(source)
            if not words or not all(forms):
                raise ValueError(f"glossary: {source!r} is {target!r}; a term and its forms are no blanks")
            entry = _Entry(source == source.lower(), _written(words), len(words), forms)
            self._by_first.setdefault(words[0].group().lower(), []).append(entry)
        for entries in self._by_first.values():  # so that "red wine" is one term and not "red"
            entries.sort(key=lambda entry: -entry.length)

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> Glossary:
        """The glossary in a file: a term a line, with a tab before its translation; blank lines are nothing.

        Raises:
            ValueError: There is no such file, it is no UTF-8, too long or without terms, or a line is no pair or a term
                that was there before.
        """
        path, terms = Path(file), dict[str, str]()
        try:
            with path.open(encoding="utf-8-sig") as opened:
                text = opened.read(_LARGEST + 1)  # /dev/zero has no end
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ValueError(f"glossary: {path} cannot be read: {reason}") from error
        if len(text) > _LARGEST:
            raise ValueError(f"glossary: {path} is none: it has more than {_LARGEST:,} characters")
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            if "\0" in line:
                raise ValueError(f"glossary: {path} line {number} holds a NUL; make the file UTF-8")
            source, tab, target = line.partition("\t")
            if not tab or "\t" in target or not source.strip() or not target.strip():
                raise ValueError(f"glossary: {path} line {number} is no term, tab and translation, got {line[:50]!r}")
            if source.strip() in terms:
                raise ValueError(f"glossary: {path} line {number} has {source.strip()!r} again; leave one of them out")
            terms[source.strip()] = target.strip()
        if not terms:
            raise ValueError(f"glossary: {path} has no terms; give it some or leave it out")
        try:
            return cls(terms)
        except ValueError as error:
            raise ValueError(f"{error}, in {path}") from None

    def terms(self, text: str) -> list[Term]:
        """The terms of a text, in their order; none of them overlap, and none is in a placeholder or an address."""
        # What is for a program is no term, as in "{name}".
        shown = replaced(text, lambda placeholder: "\0" * len(placeholder))
        words, found, place = _words(shown), list[Term](), 0
        while place < len(words):
            entry = self._at(words, place)
            if entry is not None:
                last = words[place + entry.length - 1]
                found.append(Term((words[place].start(), last.end()), entry.forms))
            place += 1 if entry is None else entry.length
        return found

    def _at(self, words: Sequence[re.Match[str]], place: int) -> _Entry | None:
        for entry in self._by_first.get(words[place].group().lower(), ()):
            written = _written(words[place : place + entry.length])
            if entry.written == (written.lower() if entry.is_small else written):
                return entry
        return None


def missing(terms: Iterable[Term], translation: str) -> list[Term]:
    """The terms that a translation lacks: each form counts for one term."""
    rest, found = translation, []
    for term in terms:
        for form in term.forms:
            # Whole words; where a form begins or ends with a mark, that is its bound.
            if match := re.search(rf"(?<!\w(?=\w)){re.escape(form)}(?<!\w(?=\w))", rest):
                rest = rest[: match.start()] + "\n" + rest[match.end() :]
                break
        else:
            found.append(term)
    return found


def _is_text(side: object) -> bool:
    """Whether it is text that a tokenizer takes: without NULs, and without halves of characters."""
    return isinstance(side, str) and not any(char == "\0" or "\ud800" <= char <= "\udfff" for char in side)


def _words(text: str) -> list[re.Match[str]]:
    return list(_WORD.finditer(text))


def _written(words: Sequence[re.Match[str]]) -> str:
    """Words with one space in the place of any between them."""
    between = ("" if one.end() == other.start() else " " for one, other in pairwise(words))
    return "".join(chain.from_iterable(zip_longest(map(re.Match.group, words), between, fillvalue="")))
