"""TranslationScore: BLEU and chrF as a metric of the evaluate library."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import evaluate
from datasets import Features, Value
from datasets import Sequence as ListOf

from hf_nmsparse.metrics import reference_streams, score

__all__ = ["TranslationScore"]


class TranslationScore(evaluate.Metric):  # type: ignore[misc]
    """`score` as a metric of the evaluate library, which needs no network.

    ``TranslationScore().compute(predictions=[...], references=[...])`` returns a dictionary with ``bleu``, ``chrf``,
    ``signature``, ``chrf_signature`` and ``sentences``; ``references`` holds a text, or a list of texts, for each
    prediction. ``compute`` takes ``tokenize`` as `score` does.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = Value("string")
        return evaluate.MetricInfo(
            description="Corpus BLEU and chrF by sacreBLEU, each with its signature.",
            citation="https://aclanthology.org/W18-6319",
            inputs_description="predictions: texts; references: for each of them a text or a list of texts.",
            features=[
                Features({"predictions": text, "references": text}),
                Features({"predictions": text, "references": ListOf(text)}),
            ],
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Adds sentences, after the checks that `score` makes."""
        if predictions is not None and references is not None:
            reference_streams(predictions, references, "predictions")
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions: list[str], references: list[Any], tokenize: str = "13a") -> dict[str, Any]:
        return asdict(score(predictions, references, tokenize))
