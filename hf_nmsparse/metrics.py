"""BLEU and chrF with their signatures, and a paired test against the dense model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

__all__ = [
    "Comparison",
    "Score",
    "SentenceStatistics",
    "compare",
    "compare_statistics",
    "interval",
    "reference_streams",
    "score",
]

References = Sequence[str] | Sequence[Sequence[str]]
"""One raw reference for each sentence, or several."""

SIGNIFICANT = 0.05


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
    streams = reference_streams(hypotheses, references)
    bleu, chrf = _bleu(tokenize), CHRF()
    return Score(
        bleu=float(bleu.corpus_score(list(hypotheses), streams).score),
        chrf=float(chrf.corpus_score(list(hypotheses), streams).score),
        signature=str(bleu.get_signature()),
        chrf_signature=str(chrf.get_signature()),
        sentences=len(hypotheses),
    )


@dataclass(frozen=True)
class SentenceStatistics:
    """What corpus BLEU is made of, sentence by sentence, so that a paired test needs no text.

    Attributes:
        counts: Integers ``[sentences, 10]``: matched and all n-grams of each order, and the two lengths.
        signature: sacreBLEU's signature.
    """

    counts: np.ndarray
    signature: str

    @classmethod
    def of(cls, hypotheses: Sequence[str], references: References, tokenize: str = "13a") -> SentenceStatistics:
        """The statistics of a translation.

        Args:
            hypotheses: As in `score`.
            references: As in `score`.
            tokenize: As in `score`.

        Raises:
            ValueError: As in `score`.
        """
        streams = reference_streams(hypotheses, references)
        bleu = _bleu(tokenize)
        bleu.corpus_score(list(hypotheses), streams)  # the signature names the number of references
        # effective_order has no part in the counts; without it sacreBLEU advises against scores of sentences.
        metric = BLEU(tokenize=tokenize, effective_order=True)
        rows = []
        for hypothesis, *texts in zip(hypotheses, *streams, strict=True):
            sentence = metric.sentence_score(hypothesis, [text for text in texts if text is not None])
            rows.append([*sentence.counts, *sentence.totals, sentence.sys_len, sentence.ref_len])
        return cls(np.array(rows, dtype=np.int64), str(bleu.get_signature()))

    @property
    def bleu(self) -> float:
        """Corpus BLEU of all sentences."""
        return self.bleu_of(slice(None))

    def bleu_of(self, rows: np.ndarray | slice) -> float:
        """Corpus BLEU of some sentences, by their places; one that is named twice counts twice."""
        return _corpus_bleu(self.counts[rows])

    def write(self, path: Path) -> None:
        """Writes them as JSON, without the numbers that follow from the lengths."""
        rows = ",".join(str(row).replace(" ", "") for row in self.counts[:, [0, 1, 2, 3, 8, 9]].tolist())
        path.write_text(f'{{"signature": "{self.signature}",\n"sentences": [{rows}]}}\n', encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> SentenceStatistics:
        """Reads what `write` wrote.

        Raises:
            ValueError: It is no such file; the message names it.
        """
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            rows = np.array(record["sentences"], dtype=np.int64).reshape(-1, 6)
            signature = str(record["signature"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: holds no sentence statistics: {error}; the recipe writes them") from error
        lengths = rows[:, 4:5]
        totals = np.maximum(lengths - np.arange(4), 0)  # n-grams in a sentence of so many words
        return cls(np.hstack([rows[:, :4], totals, rows[:, 4:]]), signature)


def interval(
    score_of: Callable[[np.ndarray], float], sentences: int, samples: int = 1000, seed: int = 12345
) -> tuple[float, float]:
    """The 95% interval of a corpus score by bootstrap over its sentences (Koehn, EMNLP 2004).

    Args:
        score_of: The score of the sentences at some places, such as `SentenceStatistics.bleu_of`.
        sentences: How many there are.
        samples: Bootstrap samples.
        seed: Seed of the resampling, as in `compare`.
    """
    drawn = np.random.default_rng(seed).choice(sentences, size=(samples, sentences), replace=True)
    return _middle(np.array([score_of(rows) for rows in drawn]))


def _middle(values: np.ndarray) -> tuple[float, float]:
    """What holds the middle 95% of the values."""
    return float(np.quantile(values, 0.025, method="lower")), float(np.quantile(values, 0.975, method="higher"))


@dataclass(frozen=True)
class Comparison:
    """A paired bootstrap test of two translations of the same corpus.

    Attributes:
        bleu: BLEU of the system.
        bleu_baseline: BLEU of the baseline.
        interval: 95% interval of the difference, from the bootstrap.
        p: Two-sided p-value of "there is no difference".
        samples: Bootstrap samples.
        seed: Seed of the resampling.
        signature: sacreBLEU's signature of both scores.
        sentences: Number of sentences.
    """

    bleu: float
    bleu_baseline: float
    interval: tuple[float, float]
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
        """What the test allows to say, at p < 0.05."""
        if self.p >= SIGNIFICANT:
            return "no difference shown"
        return "better than the baseline" if self.difference > 0 else "worse than the baseline"

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"BLEU {self.bleu:.2f} against {self.bleu_baseline:.2f}: {self.difference:+.2f} "
            f"(95% interval {low:+.2f} to {high:+.2f}, p = {self.p:.3f}), {self.verdict}"
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

    Sentences are drawn with replacement, the same ones for both systems. The interval holds the middle 95% of the
    differences; the p-value is twice the fraction of samples on the rarer side of zero, so that both agree, and a
    system compared with itself has p = 1.

    Args:
        hypotheses: The system's translations.
        baseline: The baseline's translations of the same sentences, such as those of the dense model.
        references: As in `score`.
        samples: Bootstrap samples, at least 100.
        seed: Seed of the resampling. The default is sacreBLEU's, and so are the resamples.
        tokenize: As in `score`.

    Raises:
        ValueError: As in `score`, or there are too few samples.
    """
    system = SentenceStatistics.of(hypotheses, references, tokenize)
    reference_streams(baseline, references, "baseline translations")
    return compare_statistics([system], [SentenceStatistics.of(baseline, references, tokenize)], samples, seed)


def compare_statistics(
    systems: Sequence[SentenceStatistics],
    baselines: Sequence[SentenceStatistics],
    samples: int = 1000,
    seed: int = 12345,
) -> Comparison:
    """`compare` for one or several trainings of each side, such as several seeds, from their statistics.

    With several, BLEU is the mean over the trainings. Each sample draws sentences, and of either side as many
    trainings as there are, so that the interval covers the spread between trainings as well as that between
    sentences. A few trainings tell little of that spread: the interval is too narrow rather than too wide.

    Args:
        systems: One for each training of the system.
        baselines: One for each training of the baseline.
        samples: As in `compare`.
        seed: As in `compare`.

    Raises:
        ValueError: The sides score different sentences or differ in their signatures, one is empty, or there are too
            few samples.
    """
    if samples < 100:
        raise ValueError(f"compare: p < {SIGNIFICANT} takes at least 100 samples, got {samples!r}")
    sides = [list(systems), list(baselines)]
    every = [*sides[0], *sides[1]]
    if not sides[0] or not sides[1]:
        raise ValueError("compare: a side has no translations; give at least one training of each")
    sentences = len(every[0].counts)
    for other in every[1:]:
        like = (len(other.counts), other.signature) == (sentences, every[0].signature)
        # With several references the length that counts is the closest one, which depends on the translation.
        one_reference = other.signature.startswith("nrefs:1|")
        if not like or (one_reference and not np.array_equal(other.counts[:, 9], every[0].counts[:, 9])):
            raise ValueError(
                f"compare: the translations are not of the same references, {sentences} sentences with "
                f"{every[0].signature} and {len(other.counts)} with {other.signature}; score one test set alike"
            )
    rng = np.random.default_rng(seed)
    drawn = rng.choice(sentences, size=(samples, sentences), replace=True)
    differences = np.empty(samples)
    for sample, rows in enumerate(drawn):
        means = []
        for side in sides:
            trainings = rng.integers(len(side), size=len(side)) if len(side) > 1 else [0]
            means.append(np.mean([side[training].bleu_of(rows) for training in trainings]))
        differences[sample] = means[0] - means[1]
    rarer = min((differences <= 0).sum(), (differences >= 0).sum())
    return Comparison(
        bleu=float(np.mean([system.bleu for system in sides[0]])),
        bleu_baseline=float(np.mean([system.bleu for system in sides[1]])),
        interval=_middle(differences),
        p=min(1.0, 2 * (int(rarer) + 1) / (samples + 1)),
        samples=samples,
        seed=seed,
        signature=every[0].signature,
        sentences=sentences,
    )


def _bleu(tokenize: str) -> BLEU:
    if tokenize not in BLEU.TOKENIZERS:
        raise ValueError(f"score: tokenize {tokenize!r} is unknown; sacreBLEU knows {', '.join(BLEU.TOKENIZERS)}")
    try:
        return BLEU(tokenize=tokenize)
    except (Exception, SystemExit) as error:  # each needs packages, a dictionary or a download of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"score: tokenize {tokenize!r} is not ready on this machine: {reason}") from error


def _corpus_bleu(statistics: np.ndarray) -> float:
    """BLEU of the sentences whose statistics are given, ``[sentences, 10]``."""
    total = statistics.sum(axis=0).tolist()
    return float(BLEU.compute_bleu(total[:4], total[4:8], total[8], total[9], smooth_method="exp").score)


def reference_streams(
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
