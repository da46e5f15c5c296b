"""chrF from its statistics is sacreBLEU's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import CHRF

from hf_nmsparse.chrf import ChrfStatistics

HYPOTHESES = ["Ein Mann schläft.", "Zwei Hunde im Garten", "", "der der der"]
REFERENCES = ["Ein Mann schläft im Garten.", "Zwei Katzen im Haus", "Leer", "der Hund"]


def test_by_hand() -> None:
    # "ab" beside "abc": precision 1, 1; recall 2/3, 1/2; no order beyond 2 has n-grams on both sides
    statistics = ChrfStatistics.of(["ab"], ["a bc"])
    assert statistics.counts[0].tolist() == [[2, 3, 2], [1, 2, 1], [0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    recall = (2 / 3 + 1 / 2) / 2
    assert statistics.chrf == pytest.approx(100 * 5 * recall / (4 + recall))


def test_it_is_that_of_sacrebleu() -> None:
    statistics = ChrfStatistics.of(HYPOTHESES, REFERENCES)
    assert statistics.chrf == pytest.approx(CHRF().corpus_score(HYPOTHESES, [REFERENCES]).score)
    drawn = [3, 0, 0, 1]
    hypotheses, references = [HYPOTHESES[row] for row in drawn], [REFERENCES[row] for row in drawn]
    assert statistics.chrf_of(np.array(drawn)) == pytest.approx(CHRF().corpus_score(hypotheses, [references]).score)


@given(st.text("ab c", max_size=12), st.text("ab c", max_size=12))
def test_of_one_sentence(hypothesis: str, reference: str) -> None:
    [score] = ChrfStatistics.of([hypothesis], [reference]).sentences
    assert score == pytest.approx(CHRF().sentence_score(hypothesis, [reference]).score)


def test_what_is_not_aligned_is_refused() -> None:
    with pytest.raises(ValueError, match="1 translations but 2 references"):
        ChrfStatistics.of(["a"], ["a", "b"])
