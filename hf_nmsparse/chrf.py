"""What corpus chrF is made of, sentence by sentence, so that it can be resampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sacrebleu.metrics import CHRF
from sacrebleu.metrics.helpers import extract_all_char_ngrams

from hf_nmsparse.metrics import reference_streams

__all__ = ["ChrfStatistics"]


@dataclass(frozen=True)
class ChrfStatistics:
    """The n-grams of characters that make chrF2 (Popović, WMT 2015), of translations with one reference each.

    Attributes:
        counts: Integers ``[sentences, 6, 3]``: for each order the n-grams of the translation, of the reference, and of
            both.
    """

    counts: np.ndarray

    @classmethod
    def of(cls, hypotheses: Sequence[str], references: Sequence[str]) -> ChrfStatistics:
        """The statistics of a translation.

        Raises:
            ValueError: The two cannot be scored.
        """
        reference_streams(hypotheses, references)
        rows = []
        for texts in zip(hypotheses, references, strict=True):
            pairs = zip(*(extract_all_char_ngrams(text, CHRF.CHAR_ORDER) for text in texts), strict=True)
            rows.append([(one.total(), other.total(), (one & other).total()) for one, other in pairs])
        return cls(np.array(rows, dtype=np.int64))

    @property
    def chrf(self) -> float:
        """Corpus chrF of all sentences, as sacreBLEU computes it."""
        return self.chrf_of(slice(None))

    def chrf_of(self, rows: np.ndarray | slice) -> float:
        """Corpus chrF of some sentences, by their places; one that is named twice counts twice."""
        return float(_chrf(self.counts[rows].sum(axis=0)))

    @property
    def sentences(self) -> np.ndarray:
        """ChrF of each sentence by itself."""
        return np.array([_chrf(counts) for counts in self.counts])


def _chrf(counts: np.ndarray) -> float:
    """F2 of mean precision and mean recall over the orders that both sides have."""
    theirs, ours, both = counts[(counts[:, 0] > 0) & (counts[:, 1] > 0)].T
    if not both.sum():
        return 0.0
    precision, recall, factor = np.mean(both / theirs), np.mean(both / ours), CHRF.BETA**2
    return float(100 * (1 + factor) * precision * recall / (factor * precision + recall))
