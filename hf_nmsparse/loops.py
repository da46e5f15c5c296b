"""Translations that run in a loop: the commonest way in which a model fails, and it fails without a word.

The bounds are far from what sentences hold: of 224,875 German references of Multi30k, Tatoeba and WMT news one passes
them, a word of which a letter is written fifty times.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["NO_REPEAT_NGRAM_SIZE", "forbids_loops", "loops"]

NO_REPEAT_NGRAM_SIZE = 3
"""What such a sentence is translated again with: no three tokens come twice."""

_LONGEST_PERIOD = 12
_MOST_REPEATS = 4  # of several tokens
_MOST_REPEATS_OF_ONE = 8
_FEWEST_AGAIN = min(_MOST_REPEATS_OF_ONE - 1, 2 * (_MOST_REPEATS - 1))  # tokens of a loop that were there before
_OF_THE_SOURCE = 3  # repeats of anything in the source, which the translation may have too
_RATIO, _MARGIN = 4, 24  # a translation is at most so many times its source, and so many tokens, long


def loops(tokens: Sequence[int], source: Sequence[int]) -> bool:
    """Whether a translation repeats itself as its source does not, or is far too long for it.

    Args:
        tokens: Its ids.
        source: Those of its source.
    """
    if len(tokens) > _RATIO * len(source) + _MARGIN:
        return True
    if len(tokens) - len(set(tokens)) < _FEWEST_AGAIN:
        return False
    periods = range(1, _LONGEST_PERIOD + 1)
    repeats = any(
        _repeats(tokens, period) >= (_MOST_REPEATS_OF_ONE if period == 1 else _MOST_REPEATS) for period in periods
    )
    return repeats and all(_repeats(source, period) < _OF_THE_SOURCE for period in periods)


def forbids_loops(no_repeat_ngram_size: int | None) -> bool:
    """Whether a search with this setting gives what translating again would: it forbids as much already."""
    return 0 < (no_repeat_ngram_size or 0) <= NO_REPEAT_NGRAM_SIZE


def _repeats(tokens: Sequence[int], period: int) -> int:
    """How often at most some tokens, so many of them, stand one time behind the other."""
    longest = run = 0
    for place in range(period, len(tokens)):
        run = run + 1 if tokens[place] == tokens[place - period] else 0
        longest = max(longest, run)
    return longest // period + 1
