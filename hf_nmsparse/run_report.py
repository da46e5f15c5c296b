"""What finished runs can be asked: scores with intervals, by length and by test set, and where they differ most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from hf_nmsparse.chrf import ChrfStatistics
from hf_nmsparse.metrics import Comparison, SentenceStatistics, compare_statistics, interval
from hf_nmsparse.plots import LoggedRun, read_runs
from hf_nmsparse.run_files import hypotheses_file, read_lines, reference_file, source_file, splits_of

__all__ = ["Bucket", "Difference", "Judge", "Report", "ReportedRun", "Texts", "read_report"]

Interval = tuple[float, float]

Judge = Callable[["Texts"], float]
"""Scores the translations of a test set by a metric that the recipe has not."""

BUCKETS = 5
"""Parts of a test set by length, of about equal size."""


@dataclass(frozen=True)
class Texts:
    """A test set and its translations.

    Attributes:
        sources: One text for each sentence.
        references: The same.
        hypotheses: The same.
    """

    sources: list[str]
    references: list[str]
    hypotheses: list[str]

    def is_of_one_set(self, other: Texts) -> bool:
        """Whether both translate the same."""
        return (self.sources, self.references) == (other.sources, other.references)

    @cached_property
    def bleu(self) -> SentenceStatistics:
        """What BLEU is made of."""
        return SentenceStatistics.of(self.hypotheses, self.references)

    @cached_property
    def chrf(self) -> ChrfStatistics:
        """What chrF is made of."""
        return ChrfStatistics.of(self.hypotheses, self.references)


@dataclass(frozen=True)
class ReportedRun:
    """A run with what is computed from its files.

    Attributes:
        run: As its folder tells it.
        texts: Its test sets by their names; empty where it kept none.
        statistics: What its BLEU is made of; None where it kept neither that nor its texts.
        bleu_interval: 95% interval of its BLEU; None without statistics.
        chrf_interval: The same of its chrF; None without texts.
        comparison: Its BLEU beside that of the first run; None for that itself, and where the two cannot be compared.
        judgement: Score of the metric that was asked for; None where there was none, or no text.
    """

    run: LoggedRun
    texts: dict[str, Texts]
    statistics: SentenceStatistics | None
    bleu_interval: Interval | None
    chrf_interval: Interval | None
    comparison: Comparison | None = None
    judgement: float | None = None

    @property
    def scored(self) -> Texts | None:
        """The texts that its evaluation has scored."""
        return self.texts.get(self.run.evaluation.split)


@dataclass(frozen=True)
class Bucket:
    """The sentences of some lengths.

    Attributes:
        shortest: Words of the shortest source.
        longest: Words of the longest.
        sentences: How many there are.
        scores: BLEU of each run by its name, with its 95% interval.
    """

    shortest: int
    longest: int
    sentences: int
    scores: dict[str, tuple[float, Interval]]


@dataclass(frozen=True)
class Difference:
    """A sentence that two runs translate with different success.

    Attributes:
        number: Its line in the test set, from 1.
        source: The sentence.
        reference: Its reference.
        first: The first run's translation.
        other: The other's.
        chrf: chrF of both translations.
    """

    number: int
    source: str
    reference: str
    first: str
    other: str
    chrf: tuple[float, float]


@dataclass(frozen=True)
class Report:
    """Finished runs side by side; the first is what the others are compared with.

    Attributes:
        runs: The runs.
        buckets: BLEU by length of the source, of the runs that share the first one's test set; empty without texts.
        differences: For each such run but the first, by its name, what it does worse and what it does better than the
            first: the sentences whose chrF differs most.
        sets: BLEU and chrF of each run by test set, where runs have several.
        left_out: What of this could not be made, and why.
        metric: Name of the metric behind `ReportedRun.judgement`; None without one.
    """

    runs: list[ReportedRun]
    buckets: list[Bucket] = field(default_factory=list)
    differences: dict[str, tuple[list[Difference], list[Difference]]] = field(default_factory=dict)
    sets: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    metric: str | None = None


def read_report(
    folders: Sequence[Path], metric: str | None = None, judge: Judge | None = None, shown: int = 8
) -> Report:
    """Reads finished runs and works out what they have to say beside each other.

    Args:
        folders: Of the runs, the one to compare with first, such as the dense one.
        metric: Name of what ``judge`` computes.
        judge: A metric to score the translations with.
        shown: Most sentences that are shown of those that a run does worse, and of those that it does better.

    Raises:
        ValueError: As `read_runs`; a run's files are not of one training, or ``judge`` has no translations to score.
    """
    logged = read_runs(folders)
    first, *others = [_read(run, folder) for run, folder in zip(logged, folders, strict=True)]
    runs, left_out = [first], []
    for other in others:
        try:
            runs.append(replace(other, comparison=_compared(other, first)))
        except ValueError as error:
            runs.append(other)
            left_out.append(f"{other.run.name} is not compared with {first.run.name}: {error}")
    if judge is not None:
        runs = [replace(run, judgement=None if run.scored is None else judge(run.scored)) for run in runs]
        if all(run.judgement is None for run in runs):
            raise ValueError(f"{metric}: none of the runs keeps its texts; give the output folders of runs")
    for run in runs:
        if run.scored is None:
            wanted = hypotheses_file(Path(), run.run.evaluation.split)
            left_out.append(f"{run.run.name} keeps no texts ({wanted} and its source and reference), only scores")
    alike = [run for run in runs if _shares_texts(run, first)]
    return Report(
        runs,
        _buckets(alike),
        {run.run.name: _differences(first, run, shown) for run in alike[1:]},
        _sets(runs),
        left_out,
        metric,
    )


def _read(run: LoggedRun, folder: Path) -> ReportedRun:
    """The run with its texts and intervals."""
    evaluation = run.evaluation
    texts = {split: _texts(folder, split) for split in splits_of(folder)}
    scored, kept = texts.get(evaluation.split), folder / "sentences.json"
    sources = {kept.name: SentenceStatistics.read(kept)} if kept.is_file() else {}
    if scored is not None:
        sources["its texts"] = scored.bleu
    for name, found in sources.items():
        if len(found.counts) != evaluation.sentences or abs(found.bleu - evaluation.bleu) > 0.01:
            raise ValueError(
                f"{folder}: evaluation.json says BLEU {evaluation.bleu:.2f} of {evaluation.sentences} sentences "
                f"({evaluation.signature}), and {name} give {found.bleu:.2f} of {len(found.counts)} "
                f"({found.signature}); evaluate the run again"
            )
    statistics = next(iter(sources.values()), None)
    return ReportedRun(
        run,
        texts,
        statistics,
        None if statistics is None else interval(statistics.bleu_of, len(statistics.counts)),
        None if scored is None else interval(scored.chrf.chrf_of, len(scored.sources)),
    )


def _texts(folder: Path, split: str) -> Texts:
    """The texts of a split, which are aligned."""
    files = [file(folder, split) for file in (source_file, reference_file, hypotheses_file)]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{folder} holds no {file.name} beside {files[-1].name}; the recipe writes both")
    lines = [read_lines(file) for file in files]
    counts = {file.name: len(texts) for file, texts in zip(files, lines, strict=True)}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"{folder}: lines are aligned from file to file, got {found}; evaluate the run again")
    return Texts(*lines)


def _compared(run: ReportedRun, first: ReportedRun) -> Comparison:
    """The paired test of two runs.

    Raises:
        ValueError: They have no sentences in common, or statistics of none.
    """
    if run.scored is not None and first.scored is not None and not run.scored.is_of_one_set(first.scored):
        raise ValueError("their test sets differ")
    if run.statistics is None or first.statistics is None:
        raise ValueError("sentences.json is missing")
    return compare_statistics([run.statistics], [first.statistics])


def _shares_texts(run: ReportedRun, first: ReportedRun) -> bool:
    """Whether both keep translations of one test set."""
    return run.scored is not None and first.scored is not None and run.scored.is_of_one_set(first.scored)


def _buckets(runs: Sequence[ReportedRun]) -> list[Bucket]:
    """BLEU of runs with one test set by words of its sources."""
    if not runs:
        return []
    texts = {run.run.name: run.scored for run in runs if run.scored is not None}
    lengths = np.array([len(source.split()) for source in next(iter(texts.values())).sources])
    parts = np.arange(1, BUCKETS) / BUCKETS
    borders = np.unique(np.quantile(lengths, parts, method="lower"))
    place = np.searchsorted(borders, lengths)  # what is as long as a border is in the bucket that it ends
    found = []
    for rows in (np.flatnonzero(place == bucket) for bucket in range(len(borders) + 1)):
        if not len(rows):
            continue
        scores = {}
        for name, text in texts.items():

            def bleu_of(drawn: np.ndarray, rows: np.ndarray = rows, text: Texts = text) -> float:
                return text.bleu.bleu_of(rows[drawn])

            scores[name] = text.bleu.bleu_of(rows), interval(bleu_of, len(rows))
        found.append(Bucket(int(lengths[rows].min()), int(lengths[rows].max()), len(rows), scores))
    return found


def _differences(first: ReportedRun, other: ReportedRun, shown: int) -> tuple[list[Difference], list[Difference]]:
    """The sentences that the other translates worse, and better, than the first; where the gap is largest first."""
    ours, theirs = first.scored, other.scored
    assert ours is not None
    assert theirs is not None
    pairs = np.stack([ours.chrf.sentences, theirs.chrf.sentences])
    gap = pairs[1] - pairs[0]

    def difference(row: int) -> Difference:
        texts = ours.sources[row], ours.references[row], ours.hypotheses[row], theirs.hypotheses[row]
        return Difference(row + 1, *texts, chrf=(float(pairs[0, row]), float(pairs[1, row])))

    order = np.argsort(gap, kind="stable")
    worse = [difference(int(row)) for row in order[:shown] if gap[row] < 0]
    return worse, [difference(int(row)) for row in order[::-1][:shown] if gap[row] > 0]


def _sets(runs: Sequence[ReportedRun]) -> dict[str, dict[str, tuple[float, float]]]:
    """BLEU and chrF by test set; empty where no run has several."""
    if all(len(run.texts) < 2 for run in runs):
        return {}
    names = sorted({name for run in runs for name in run.texts})
    return {
        name: {
            run.run.name: (run.texts[name].bleu.bleu, run.texts[name].chrf.chrf) for run in runs if name in run.texts
        }
        for name in names
    }
