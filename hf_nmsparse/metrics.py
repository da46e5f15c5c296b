"""BLEU and chrF with their signatures, a paired test against the dense model, and the record of an evaluation."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import evaluate
import numpy as np
import torch
from datasets import Features, List, Value
from sacrebleu.metrics import BLEU, CHRF

import hf_nmsparse
from hf_nmsparse.pattern import NMPattern

__all__ = [
    "Comparison",
    "Evaluation",
    "Score",
    "TranslationScore",
    "compare",
    "evaluation_record",
    "score",
    "versions",
]

References = Sequence[str] | Sequence[Sequence[str]]
"""One raw reference for each sentence, or several."""

_SIGNIFICANT = 0.05
_SMALLEST_BOOTSTRAP = 100

_AGAINST_DENSE = ("bleu_dense", "difference", "low", "high", "p", "verdict")
"""What a record says of the comparison with the dense model, at least."""

_LATER_KEYS = {"beams", "processes", "source_lang", "target_lang"}
"""Records published before the format had these keys do not say; they are read as None."""


@dataclass(frozen=True)
class Score:
    """How well a corpus is translated.

    Attributes:
        bleu: Corpus BLEU, 0 to 100.
        chrf: Corpus chrF2, 0 to 100.
        signature: sacreBLEU's signature of ``bleu``; scores with different signatures are not comparable.
        chrf_signature: The same of ``chrf``.
        sentences: Number of sentences.
    """

    bleu: float
    chrf: float
    signature: str
    chrf_signature: str
    sentences: int

    def __str__(self) -> str:
        return f"BLEU {self.bleu:.2f}  {self.signature}\nchrF {self.chrf:.2f}  {self.chrf_signature}"


def score(hypotheses: Sequence[str], references: References, tokenize: str = "13a") -> Score:
    """Scores detokenised translations against raw references.

    Args:
        hypotheses: One translation for each sentence.
        references: One text for each sentence, or a list of texts for each. Raw: never decoded from label ids.
        tokenize: sacreBLEU's tokenizer for BLEU; ``"zh"``, ``"ja-mecab"`` and ``"ko-mecab"`` for these languages.

    Raises:
        ValueError: There are no sentences, the two lists are not aligned, or something is not a text.
    """
    streams = _reference_streams(hypotheses, references)
    bleu, chrf = _bleu(tokenize), CHRF()
    return Score(
        bleu=float(bleu.corpus_score(list(hypotheses), streams).score),
        chrf=float(chrf.corpus_score(list(hypotheses), streams).score),
        signature=str(bleu.get_signature()),
        chrf_signature=str(chrf.get_signature()),
        sentences=len(hypotheses),
    )


@dataclass(frozen=True)
class Comparison:
    """A paired bootstrap test of two translations of the same corpus.

    Attributes:
        bleu: BLEU of the system.
        bleu_baseline: BLEU of the baseline.
        low: Lower end of the 95% interval of the difference.
        high: Upper end of it.
        p: Two-sided p-value of "there is no difference"; at most 0.05 just where the interval leaves out 0.
        samples: Bootstrap samples.
        seed: Seed of the resampling.
        signature: sacreBLEU's signature of both scores.
        sentences: Number of sentences.
    """

    bleu: float
    bleu_baseline: float
    low: float
    high: float
    p: float
    samples: int
    seed: int
    signature: str
    sentences: int

    @property
    def difference(self) -> float:
        """BLEU of the system minus BLEU of the baseline."""
        return self.bleu - self.bleu_baseline

    @property
    def verdict(self) -> str:
        """What the test allows to say, such as "no difference shown (p = 0.41)"."""
        said = "no difference shown"
        if self.p <= _SIGNIFICANT:
            # The interval has the sign: the difference of the whole corpus may lie outside of a skewed one.
            said = "better than the baseline" if self.low > 0 else "worse than the baseline"
        return f"{said} (p = {self.p:.2g})"

    def to_dict(self) -> dict[str, Any]:
        """What `Evaluation.against_dense` holds; the interval also as a pair, as tables of results read it."""
        return {
            "bleu_dense": self.bleu_baseline,
            "difference": self.difference,
            "low": self.low,
            "high": self.high,
            "interval": [self.low, self.high],
            "p": self.p,
            "verdict": self.verdict,
            "samples": self.samples,
            "seed": self.seed,
        }

    def __str__(self) -> str:
        return (
            f"BLEU {self.bleu:.2f} against {self.bleu_baseline:.2f}: {self.difference:+.2f} "
            f"(95% interval {self.low:+.2f} to {self.high:+.2f}), {self.verdict}"
        )


def compare(
    hypotheses: Sequence[str],
    baseline: Sequence[str],
    references: References,
    samples: int = 1000,
    seed: int = 12345,
    tokenize: str = "13a",
) -> Comparison:
    """Tests whether a system differs from a baseline in BLEU, by paired bootstrap (Koehn, EMNLP 2004).

    Sentences are drawn with replacement, the same ones for both systems; draws and scores are those of sacreBLEU's
    paired test. Its p-value is not: it calls a system different from itself, with p = 1 / (samples + 1), and comes
    without an interval of the difference. Here p is twice the share of samples on the rarer side of zero, and the
    interval leaves out as many samples at either end as p = 0.05 allows for, so that the two agree.

    Args:
        hypotheses: The system's translations.
        baseline: The baseline's translations of the same sentences, such as those of the dense model.
        references: As in `score`.
        samples: Bootstrap samples, at least 100.
        seed: Seed of the resampling. The default is sacreBLEU's.
        tokenize: As in `score`.

    Raises:
        ValueError: As in `score`, or there are too few samples.
    """
    if samples < _SMALLEST_BOOTSTRAP:
        raise ValueError(f"compare: a bootstrap takes at least {_SMALLEST_BOOTSTRAP} samples, got {samples!r}")
    streams = _reference_streams(hypotheses, references)
    _reference_streams(baseline, references, "baseline translations")
    bleu = _bleu(tokenize)
    drawn = np.random.default_rng(seed).choice(len(references), size=(samples, len(references)), replace=True)
    points, resampled = [], []
    for texts in (hypotheses, baseline):
        counts = np.array(bleu._extract_corpus_statistics(list(texts), streams))  # [sentences, n-grams and lengths]
        points.append(float(bleu._compute_score_from_stats(counts.sum(axis=0)).score))
        resampled.append([bleu._compute_score_from_stats(counts[rows].sum(axis=0)).score for rows in drawn])
    differences = np.sort(np.subtract(*resampled))
    rarer = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    left_out = (samples + 1) // 40 - 1  # 2 * (rarer + 1) / (samples + 1) <= 0.05, solved for rarer
    return Comparison(
        bleu=points[0],
        bleu_baseline=points[1],
        low=float(differences[left_out]),
        high=float(differences[-1 - left_out]),
        p=min(1.0, 2 * (rarer + 1) / (samples + 1)),
        samples=samples,
        seed=seed,
        signature=str(bleu.get_signature()),
        sentences=len(hypotheses),
    )


def _bleu(tokenize: str) -> BLEU:
    if tokenize not in BLEU.TOKENIZERS:
        raise ValueError(f"score: tokenize {tokenize!r} is unknown; sacreBLEU knows {', '.join(BLEU.TOKENIZERS)}")
    return BLEU(tokenize=tokenize)


def _reference_streams(
    hypotheses: Sequence[str], references: References, what: str = "translations"
) -> list[list[str | None]]:
    """The references as sacreBLEU takes them: the first of every sentence, the second of every sentence, and so on.

    Raises:
        ValueError: The two cannot be scored.
    """
    for name, texts in ((what, hypotheses), ("references", references)):
        if isinstance(texts, str):
            raise ValueError(f"score: {name} are a list of texts, got one text; put it into a list")
    if not len(hypotheses):
        raise ValueError(f"score: there are no {what}; translate the corpus first")
    if len(hypotheses) != len(references):
        raise ValueError(
            f"score: {len(hypotheses)} {what} but {len(references)} references; they must be aligned line by line"
        )
    rows: list[Sequence[str]] = [[row] if isinstance(row, str) else row for row in references]
    for index, (hypothesis, row) in enumerate(zip(hypotheses, rows, strict=True)):
        if not isinstance(hypothesis, str):
            raise ValueError(f"score: sentence {index} of the {what} is no text but {type(hypothesis).__name__}")
        if not isinstance(row, Sequence) or not row or not all(isinstance(text, str) for text in row):
            raise ValueError(f"score: sentence {index} needs a text, or a list of texts, as reference, got {row!r}")
    return [list(stream) for stream in zip_longest(*rows)]


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
                Features({"predictions": text, "references": List(text)}),
            ],
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Adds sentences, after the checks that `score` makes."""
        if predictions is not None and references is not None:
            _reference_streams(predictions, references, "predictions")
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions: list[str], references: list[Any], tokenize: str = "13a") -> dict[str, Any]:
        return asdict(score(predictions, references, tokenize))


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ("torch", "transformers", "accelerate", "datasets", "sacrebleu")
    return {
        "python": platform.python_version(),
        "hf_nmsparse": hf_nmsparse.__version__,
        **{package: version(package) for package in packages},
    }


def _processes() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


@dataclass(frozen=True)
class Evaluation:
    """The record of one evaluated run; as JSON it is the source of every number on a model card.

    Attributes:
        corpus: The corpus, as `load_corpus` takes it.
        split: The part of the corpus that is scored.
        model: A few words on the model, such as "Transformer base, 6+6 layers".
        method: How it was trained: a name in `METHODS`, or "dense".
        seed: Seed of the training.
        steps: Optimizer steps of the training.
        bleu: As in `Score`; so are the next four.
        chrf: chrF2.
        signature: Signature of BLEU.
        chrf_signature: Signature of chrF.
        sentences: Sentences scored.
        dense_bytes: Size of the weights in a dense file of the same number type.
        packed_bytes: Size of the weights in the packed file; None for a dense model.
        pattern: N:M; None for a dense model.
        decay: lambda of SR-STE; None where the method has none.
        values: Number type in the file: fp32, fp16 or bf16.
        base_model: The model it was trained from; None for training from scratch.
        source_lang: Code of the language it translates from, such as "en" or "eng_Latn".
        target_lang: The same of the language it translates to.
        beams: Beam size of the scored translations.
        train_seconds: Wall time of the training.
        flip_rate: Fraction of mask entries that a step changed at the end of the training.
        against_dense: `Comparison.to_dict` of the comparison with the dense model; None where there was none.
        threads: CPU threads of torch in each process.
        processes: Processes of the training; by default those that run now.
        versions: See `versions`.
    """

    corpus: str
    split: str
    model: str
    method: str
    seed: int
    steps: int
    bleu: float
    chrf: float
    signature: str
    chrf_signature: str
    sentences: int
    dense_bytes: int
    packed_bytes: int | None = None
    pattern: str | None = None
    decay: float | None = None
    values: str | None = None
    base_model: str | None = None
    source_lang: str | None = None
    target_lang: str | None = None
    beams: int | None = None
    train_seconds: float | None = None
    flip_rate: float | None = None
    against_dense: dict[str, Any] | None = None
    threads: int = field(default_factory=torch.get_num_threads)
    processes: int | None = field(default_factory=_processes)
    versions: dict[str, str] = field(default_factory=versions)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not _fits(value, hints[entry.name]):
                raise ValueError(f"{entry.name} must be {entry.type}, got {value!r}")
        if self.pattern is not None:
            NMPattern.parse(self.pattern)
        for key in _AGAINST_DENSE:
            if self.against_dense is not None and key not in self.against_dense:
                raise ValueError(f"against_dense: key {key!r} is missing; Comparison.to_dict has it")

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], where: str = "evaluation") -> Evaluation:
        """Reads the record that `to_dict` writes.

        Args:
            record: The record, with every key.
            where: How errors name it.

        Raises:
            ValueError: A key is unknown or missing, or a value is of the wrong type.
        """
        record = {**dict.fromkeys(_LATER_KEYS), **record}
        known = {entry.name for entry in fields(cls)}
        for problem, keys in (("unknown", set(record) - known), ("missing", known - set(record))):
            if keys:
                raise ValueError(f"{where}: key {min(keys)!r} is {problem}; write the file with Evaluation.write")
        test = record["against_dense"]
        if isinstance(test, dict) and "interval" in test:  # published records hold the pair alone
            record["against_dense"] = {**dict(zip(("low", "high"), test["interval"], strict=True)), **test}
        try:
            return cls(**record)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON holds it."""
        return asdict(self)

    @classmethod
    def read(cls, path: str | Path) -> Evaluation:
        """Reads a file that `write` wrote.

        Raises:
            ValueError: It is no such file; the message names it.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read as JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}: an evaluation is one JSON object, got {type(record).__name__}")
        return cls.from_dict(record, str(path))

    def write(self, path: str | Path) -> None:
        """Writes the record as JSON with sorted keys, one a line; folders are made as needed."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")

    def __str__(self) -> str:
        languages = f" {self.source_lang}-{self.target_lang}" if self.source_lang and self.target_lang else ""
        method = self.method if self.pattern is None else f"{self.pattern} {self.method}"
        decay = "" if self.decay is None else f", decay {self.decay:g}"
        lines = [
            f"{method}{decay}, seed {self.seed}, {self.steps:,} steps",
            f"{self.corpus}{languages}, {self.split}, {self.sentences:,} sentences",
            f"BLEU {self.bleu:.2f}  {self.signature}",
            f"chrF {self.chrf:.2f}  {self.chrf_signature}",
        ]
        if self.against_dense is not None:
            test = self.against_dense
            lines.append(
                f"dense BLEU {test['bleu_dense']:.2f}, difference {test['difference']:+.2f} "
                f"(95% interval {test['low']:+.2f} to {test['high']:+.2f}), {test['verdict']}"
            )
        return "\n".join(lines)


def evaluation_record(result: Score, against_dense: Comparison | None = None, **run: Any) -> Evaluation:
    """The record of a run from its scores and the facts about it.

    Args:
        result: The scores of the files that are published.
        against_dense: The comparison with the dense model.
        **run: The other fields of `Evaluation`; those with a default may be left out.

    Raises:
        ValueError: The comparison scored something else.
    """
    if against_dense is not None and (against_dense.bleu, against_dense.sentences) != (result.bleu, result.sentences):
        raise ValueError(
            f"evaluation_record: the comparison is of BLEU {against_dense.bleu:.2f} on {against_dense.sentences} "
            f"sentences, the score of {result.bleu:.2f} on {result.sentences}; compare the same translations"
        )
    return Evaluation(**asdict(result), against_dense=against_dense and against_dense.to_dict(), **run)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON is of a field's type; no field is a truth value, and numbers are finite."""
    options = get_args(hint) if type(None) in get_args(hint) else (hint,)
    kinds = tuple(get_origin(option) or option for option in options)
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        return False
    return isinstance(value, (*kinds, int) if float in kinds else kinds)
