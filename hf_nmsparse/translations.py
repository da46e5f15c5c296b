"""What a `Translator` gives: translations with their scores, attention and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from hf_nmsparse.kernels.engine import Array
from hf_nmsparse.paragraphs import Paragraphs

__all__ = ["Scored", "Translation", "of_paragraphs"]


@dataclass(frozen=True)
class Translation:
    """One translation.

    Attributes:
        text: The text; empty from `Translator.translate_ids`.
        tokens: Its ids without those that it was begun with; EOS, where it ends with it, is there.
        score: What beams are ranked by: the sum of the tokens' log-probabilities, over their number to the power of
            ``length_penalty``. None for greedy search without ``return_scores``, which computes none, and for what was
            blank.
        token_scores: The log-probability of each token; None without ``return_scores``.
        alternatives: Further ones, the next best first, where ``num_return_sequences`` asks for them.
        attention: fp32 ``[tokens, source]``, how much each token looked at each of the source's, the mean over the
            heads of the last layer; None without ``return_attention``.
        source: The ids of the source, which the columns of ``attention`` belong to.
        looped: Whether a first translation ran in a loop, so that this is another; with ``break_loops`` alone.
        masked: Whether a first translation had lost placeholders, so that this is one of the text with short ones in
            their place, and ``tokens``, ``source`` and ``attention`` belong to that; with ``keep_placeholders`` alone.
        sentences: With ``split``, the translations of the sentences of a text of several. It has their tokens and the
            sum of their scores, and its first alternative is made of their first ones; attention is theirs alone.
    """

    text: str
    tokens: tuple[int, ...]
    score: float | None = None
    token_scores: tuple[float, ...] | None = None
    alternatives: tuple[Translation, ...] = ()
    attention: Array | None = field(default=None, compare=False, repr=False)
    source: tuple[int, ...] = field(default=(), repr=False)
    looped: bool = False
    masked: bool = False
    sentences: tuple[Translation, ...] = ()


@dataclass(frozen=True)
class Scored:
    """How likely a model holds a given translation to be.

    Attributes:
        total: The sum of the log-probabilities of its tokens.
        tokens: Its ids, EOS included.
        token_scores: The log-probability of each.
    """

    total: float
    tokens: tuple[int, ...]
    token_scores: tuple[float, ...]


def of_paragraphs(paragraphs: Paragraphs, found: Sequence[Translation]) -> list[Translation]:
    """The translations of texts from those of their sentences."""
    each = enumerate(paragraphs.gathered(found))
    return [_paragraph(paragraphs, place, sentences) for place, sentences in each]


def _paragraph(paragraphs: Paragraphs, place: int, sentences: list[Translation]) -> Translation:
    """The translation of a text from those of its sentences, with its alternatives."""
    ranked = [(one, *one.alternatives) for one in sentences]
    most = max(map(len, ranked), default=1)  # a sentence with fewer has its last in what is further behind

    def joined(rank: int) -> Translation:
        each = [those[min(rank, len(those) - 1)] for those in ranked]
        return _joined(paragraphs.text(place, [one.text for one in each]), each)

    best, *others = map(joined, range(most))
    return replace(best, alternatives=tuple(others))


def _joined(text: str, sentences: list[Translation]) -> Translation:
    """A text's translation of one translation of each of its sentences."""
    if len(sentences) == 1:
        return replace(sentences[0], text=text)
    scores = [one.score for one in sentences if one.score is not None]
    each = [one.token_scores for one in sentences if one.token_scores is not None]
    return Translation(
        text,
        tuple(chain.from_iterable(one.tokens for one in sentences)),
        sum(scores) if scores else None,
        tuple(chain.from_iterable(each)) if each else None,
        source=tuple(chain.from_iterable(one.source for one in sentences)),
        looped=any(one.looped for one in sentences),
        sentences=tuple(sentences),
    )
