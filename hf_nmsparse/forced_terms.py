"""Where the terms of a glossary come into a translation: where it looked at them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_nmsparse.alignment import Span, word_spans
from hf_nmsparse.glossary import Term
from hf_nmsparse.kernels.engine import Array

__all__ = ["looks_at", "next_term"]


def next_term(
    text: str, looked: Array, target_shares: Array, terms: Sequence[Term], begun: int, end: int
) -> tuple[Term, int]:
    """The term that comes first into a translation, and the token that it comes in place of.

    Args:
        text: The text.
        looked: What its translation looked at: fp32 ``[target words, source words]``.
        target_shares: What each token of the translation has of each word: fp32 ``[tokens, target words]``.
        terms: Terms of the text that the translation lacks.
        begun: So many tokens of the translation stay.
        end: The token behind the last of its words, for a term that nothing looked at.
    """
    spans = word_spans(text)
    first = [int(column.argmax()) for column in target_shares.T > 0]  # the first token of each word
    free = [word for word, at in enumerate(first) if at >= begun]
    places = []
    for term in terms:
        heard = looked[np.ix_(free, _words_of(term, spans))]  # [free words, words of the term]
        if not heard.size or heard.max() <= 0:
            places.append(max(begun, end))
            continue
        # The word that looked at the term the most, or one just before it that did at another of its words.
        best = int(heard.sum(1).argmax())
        near = [word for word in heard.argmax(0).tolist() if abs(word - best) < heard.shape[1]]
        places.append(first[free[min([best, *near])]])
    at = min(places)
    return terms[places.index(at)], at


def looks_at(text: str, source_shares: Array, term: Term) -> Array:
    """What a token looks at that looks at a term alone: fp32 ``[source]``, of ``[source tokens, source words]``."""
    letters: Array = source_shares[:, _words_of(term, word_spans(text))].sum(1)
    return letters / max(float(letters.sum()), 1.0)


def _words_of(term: Term, spans: Sequence[Span]) -> list[int]:
    """The words of a text that a term has a part of."""
    return [word for word, (start, end) in enumerate(spans) if start < term.span[1] and term.span[0] < end]
