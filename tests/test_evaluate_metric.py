"""BLEU and chrF as a metric of the evaluate library."""

from __future__ import annotations

from typing import Any

import pytest

from hf_nmsparse.evaluate_metric import TranslationScore
from hf_nmsparse.metrics import score
from tests.test_metrics import REFERENCES, drop_words


def test_the_metric_of_evaluate_works_offline() -> None:
    texts = drop_words(0.1, seed=0)
    expected = score(texts, REFERENCES)
    result = TranslationScore().compute(predictions=texts, references=REFERENCES)
    assert result == {
        "bleu": expected.bleu,
        "chrf": expected.chrf,
        "signature": expected.signature,
        "chrf_signature": expected.chrf_signature,
        "sentences": 4,
    }
    assert TranslationScore().compute(predictions=texts, references=[[r] for r in REFERENCES]) == result


def test_the_metric_of_evaluate_takes_batches_and_a_tokenizer() -> None:
    metric = TranslationScore()
    for text in REFERENCES:
        metric.add(prediction=text, reference=text)
    metric.add_batch(predictions=REFERENCES, references=REFERENCES)
    result = metric.compute(tokenize="char")
    assert result["sentences"] == 8
    assert "tok:char" in result["signature"]


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], ["a", "b"]), ([1], ["a"]), ("a", "a")])
def test_the_metric_of_evaluate_checks_its_input(predictions: Any, references: Any) -> None:
    with pytest.raises(ValueError, match=r"^score: .*predictions"):
        TranslationScore().compute(predictions=predictions, references=references)
