"""Texts of several sentences: cut into sentences, and put together again with all that stood between them.

A translation model is trained on single sentences, and of a paragraph it leaves some out without a word. Where
sentences end is for sentencex to say (https://github.com/wikimedia/sentencex): it knows the abbreviations of many
languages and is compiled.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import lru_cache
from math import inf
from typing import TypeVar

import sentencex

from hf_nmsparse.placeholders import replaced

__all__ = ["Count", "Paragraphs", "is_wide", "language_code", "named_language"]

T = TypeVar("T")

Count = Callable[[list[str]], Sequence[int]]
"""How many tokens each of some texts has."""

# Where a sentence that is too long may be cut, the best places first: ends of clauses, commas, brackets, any space.
_CUTS = [
    re.compile(pattern)
    for pattern in (r"[;:\uff1b\uff1a\u2014\u2013]\s*", r"[,\u060c\u3001\uff0c]\s*|\)\s+", r"\s+")  # wide ones too
]
_EDGE = 0.2  # a cut leaves at least so much of the sentence on each side

_LINES = re.compile(r"(\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*)")
_SPACE = re.compile(r"\s")
_SPACE_AROUND = re.compile(r"(\A\s+|\s+\Z)")

# The codes of NLLB and SeamlessM4T for languages whose abbreviations sentencex knows by ISO 639-1.
_TABLE = """
amh=am arb=ar asm=as ben=bn bul=bg cat=ca ces=cs cmn=zh dan=da deu=de ell=el eng=en est=et fin=fi fra=fr guj=gu heb=he
hin=hi hrv=hr hun=hu hye=hy ind=id isl=is ita=it jpn=ja kan=kn kaz=kk kor=ko lav=lv lit=lt mal=ml mar=mr mkd=mk mya=my
nld=nl nno=nn nob=nb ory=or pan=pa pol=pl por=pt ron=ro rus=ru slk=sk slv=sl spa=es srp=sr swe=sv swh=sw tam=ta tel=te
tha=th tur=tr ukr=uk urd=ur vie=vi zho=zh
"""
_TWO_LETTERS = dict(pair.split("=") for pair in _TABLE.split())


@lru_cache
def language_code(language: str | None) -> str:
    """The ISO 639-1 code of a language as models name it: "de" of "de", "de_DE", "deu_Latn" and "__de__"; else "en"."""
    code = re.split("[_-]", (language or "").strip("_<>2").lower())[0]
    return _TWO_LETTERS.get(code, code if len(code) == 2 else "en")


def named_language(split: object) -> str | None:
    """The language that ``split`` of a translation names; None where it is True or None.

    Raises:
        ValueError: It is nothing of this.
    """
    if split is None or split is True:
        return None
    if isinstance(split, str) and re.fullmatch(r"[A-Za-z]{2,3}(?:[-_][A-Za-z0-9]+)*", split):
        return split
    raise ValueError(f"split: True, or the code of a language such as 'de', got {split!r}")


class Paragraphs:
    """Some texts as their sentences. Lines end sentences, and blank texts have none.

    Args:
        texts: The texts.
        language: Code of their language, as models name it.
        count: Counts the tokens of sentences.
        longest: Most tokens of a sentence that a model takes whole: longer ones are cut at the ends of clauses, or at
            a space.

    Attributes:
        sentences: Those of all texts, one after the other, without the white space around them.
        lengths: The tokens of each; empty without ``count``.
    """

    def __init__(
        self, texts: Iterable[str], language: str | None = None, count: Count | None = None, longest: float = inf
    ) -> None:
        code = language_code(language)
        self._texts = [_pieces(text, code) for text in texts]
        known = {} if count is None else self._cut(count, longest)
        self.sentences = [piece for pieces in self._texts for piece in pieces if piece.strip()]
        self.lengths = [known[sentence] for sentence in self.sentences] if known else []

    def _cut(self, count: Count, longest: float) -> dict[str, int]:
        """Halves what is too long until all is short or a single character; the tokens of all that was counted."""
        known: dict[str, int] = {}
        while asked := sorted({piece for pieces in self._texts for piece in pieces if piece.strip()} - set(known)):
            known |= zip(asked, count(asked), strict=True)
            self._texts = [
                [
                    part
                    for piece in pieces
                    for part in (_halves(piece) if len(piece) > 1 and known.get(piece, 0) > longest else [piece])
                ]
                for pieces in self._texts
            ]
        return known

    def gathered(self, of_sentences: Sequence[T]) -> list[list[T]]:
        """What belongs to the sentences of each text, from a list of what belongs to all."""
        rest = iter(of_sentences)
        return [[next(rest) for piece in pieces if piece.strip()] for pieces in self._texts]

    def joined(self, translations: Sequence[str]) -> list[str]:
        """The texts with a translation in the place of each sentence.

        All white space stays as it was. Where there was none between two sentences, as in Chinese, and the translation
        is of a script that has it, there is a space.

        Args:
            translations: Of each of ``sentences``.

        Raises:
            ValueError: There are more or fewer.
        """
        if len(translations) != len(self.sentences):
            raise ValueError(f"paragraphs: {len(self.sentences)} sentences, got {len(translations)} translations")
        return [self.text(place, found) for place, found in enumerate(self.gathered(translations))]

    def text(self, place: int, translations: Sequence[str]) -> str:
        """One of the texts, as `joined` gives it."""
        rest = iter(translations)
        return "".join(_filled(self._texts[place], lambda _: [next(rest)]))

    def streamed(self, translate: Callable[[str], Iterable[str]]) -> Generator[str]:
        """The texts as `joined` gives them, piece by piece.

        Args:
            translate: Gives the pieces of the translation of a sentence. It is called as they are due.
        """
        for pieces in self._texts:
            yield from _filled(pieces, translate)


def _pieces(text: str, language: str) -> list[str]:
    """A text as its sentences and the white space between them, which together are the text."""
    found: list[str] = []
    for line in _LINES.split(text):
        for sentence in _sentences(line, language) if line.strip() else [line]:
            found += _SPACE_AROUND.split(sentence)
    return [piece for piece in found if piece]


def _sentences(line: str, language: str) -> Generator[str]:
    """A line as its sentences, each with the white space behind it."""
    start = 0
    # No sentence ends in a placeholder or an address. And it panics at some spaces of several bytes, as in "A\u3000.".
    shown = _SPACE.sub(" ", replaced(line, lambda placeholder: "X" * len(placeholder)))
    for sentence in sentencex.segment(language, shown):
        yield line[start : start + len(sentence)]
        start += len(sentence)


def _halves(sentence: str) -> list[str]:
    """A sentence in two at the best place, with the white space between them."""
    middle, edge = len(sentence) / 2, len(sentence) * _EDGE
    for cut in _CUTS:
        places = [m.end() for m in cut.finditer(sentence) if edge <= m.end() <= len(sentence) - edge]
        if places:
            at = min(places, key=lambda place: abs(place - middle))
            break
    else:
        at = max(len(sentence) // 2, 1)
    first, second = sentence[:at], sentence[at:]
    kept = first.rstrip()
    return [part for part in (kept, first[len(kept) :], second) if part]


def _filled(pieces: Iterable[str], translate: Callable[[str], Iterable[str]]) -> Generator[str]:
    """The pieces of a text, those of its translations in the place of each sentence."""
    before = last = ""  # the sentence that has just been translated, and the end of its translation
    for piece in pieces:
        if not piece.strip():
            before = ""
            yield piece
            continue
        for part in filter(None, translate(piece)):
            if before and last and is_wide(before[-1]) and not is_wide(last[-1]):
                yield " "
            before, last = "", part
            yield part
        before = piece


def is_wide(character: str) -> bool:
    """Whether it is of a script that is written without spaces between sentences."""
    return unicodedata.east_asian_width(character) in "WF"
