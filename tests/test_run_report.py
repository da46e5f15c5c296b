"""What runs have to say beside each other, by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_nmsparse.evaluation import Evaluation
from hf_nmsparse.metrics import SentenceStatistics, score
from hf_nmsparse.run_files import hypotheses_file, reference_file, source_file, write_lines
from hf_nmsparse.run_report import Texts, read_report
from tests.test_plots import write_run

SOURCES = ["A dog", "A man", "Two men sleep", "A man sleeps in a large garden", "Two dogs run over the green grass"]
REFERENCES = ["Ein Hund", "Ein Mann", "Zwei Männer schlafen", "Ein Mann schläft", "Zwei Hunde laufen über das Gras"]
OTHER = ["Ein Hund", "Ein Haus", "Zwei Männer", "Ein Mann schläft", "Zwei Hunde laufen über das Gras"]


def write_scored(
    folder: Path, hypotheses: Sequence[str], sets: Mapping[str, Sequence[str]] | None = None, **facts: Any
) -> Path:
    """A run whose files agree with each other."""
    write_run(folder, 0.0, **facts)
    file = folder / "evaluation.json"
    evaluation, found = Evaluation.read(file), score(hypotheses, REFERENCES)
    replace(evaluation, **vars(found)).write(file)
    for split, texts in {"test": hypotheses, **(sets or {})}.items():
        for place, lines in ((source_file, SOURCES), (reference_file, REFERENCES), (hypotheses_file, texts)):
            write_lines(place(folder, split), lines)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    dense = write_scored(tmp_path / "dense", REFERENCES, method="dense")
    return [dense, write_scored(tmp_path / "sparse", OTHER, method="ste", pattern="2:4", layers=True)]


def test_scores_intervals_and_the_test(folders: list[Path]) -> None:
    dense, sparse = read_report(folders).runs
    assert dense.comparison is None
    assert dense.bleu_interval is not None
    assert dense.bleu_interval[1] == pytest.approx(100)
    assert dense.chrf_interval is not None
    assert list(dense.chrf_interval) == pytest.approx([100, 100])
    assert sparse.comparison is not None
    assert sparse.comparison.difference == pytest.approx(sparse.run.evaluation.bleu - 100)
    assert sparse.bleu_interval is not None
    assert sparse.chrf_interval is not None
    assert sparse.bleu_interval[0] < sparse.run.evaluation.bleu < sparse.bleu_interval[1]
    assert sparse.chrf_interval[0] < sparse.run.evaluation.chrf < sparse.chrf_interval[1]


def test_what_differs_most_comes_first(folders: list[Path]) -> None:
    worse, better = read_report(folders).differences["sparse"]
    assert [found.number for found in worse] == [2, 3]
    assert (worse[0].first, worse[0].other) == ("Ein Mann", "Ein Haus")
    assert better == []
    worse, better = read_report(folders[::-1], shown=1).differences["dense"]
    assert (worse, [found.number for found in better]) == ([], [2])


def test_buckets_hold_each_sentence_once_and_none_is_split(folders: list[Path]) -> None:
    buckets = read_report(folders).buckets
    assert [(found.shortest, found.longest, found.sentences) for found in buckets] == [(2, 2, 2), (3, 3, 1), (7, 7, 2)]
    assert buckets[2].scores["dense"][0] == pytest.approx(100)
    assert buckets[2].scores["sparse"] == buckets[2].scores["dense"]


def test_several_test_sets(folders: list[Path], tmp_path: Path) -> None:
    assert read_report(folders).sets == {}
    several = write_scored(tmp_path / "several", REFERENCES, {"news": OTHER}, method="dense")
    sets = read_report([several, folders[1]]).sets
    assert {name: set(found) for name, found in sets.items()} == {"news": {"several"}, "test": {"several", "sparse"}}
    assert sets["news"]["several"] == sets["test"]["sparse"]
    assert sets["test"]["several"] == pytest.approx((100, 100))


def test_what_cannot_be_said_is_said_to_be_left_out(folders: list[Path], tmp_path: Path) -> None:
    write_lines(source_file(folders[1], "test"), ["B", *SOURCES[1:]])
    report = read_report(folders)
    assert report.left_out == ["sparse is not compared with dense: their test sets differ"]
    assert (report.differences, report.runs[1].comparison) == ({}, None)
    bare = write_run(tmp_path / "bare", 30.0, method="dense")
    report = read_report([bare, folders[0]])
    assert report.left_out[0] == "dense is not compared with bare: sentences.json is missing"
    assert report.left_out[1].startswith("bare keeps no texts (test.hypotheses.txt and its source and reference)")
    assert (report.buckets, report.differences) == ([], {})


def test_statistics_without_texts_are_compared(folders: list[Path]) -> None:
    for folder in folders:
        texts = [file(folder, "test") for file in (source_file, reference_file, hypotheses_file)]
        given = OTHER if folder.name == "sparse" else REFERENCES
        SentenceStatistics.of(given, REFERENCES).write(folder / "sentences.json")
        for file in texts:
            file.unlink()
    _, sparse = read_report(folders).runs
    assert sparse.comparison is not None
    assert sparse.chrf_interval is None


def test_files_of_different_runs_are_refused(folders: list[Path]) -> None:
    write_lines(hypotheses_file(folders[1], "test"), REFERENCES)
    with pytest.raises(ValueError, match=r"sparse: evaluation.json says BLEU .* and its texts give 100.00 of 5"):
        read_report(folders)
    write_lines(hypotheses_file(folders[1], "test"), REFERENCES[:-1])
    with pytest.raises(ValueError, match=r"lines are aligned .* test.reference.txt 5, test.hypotheses.txt 4"):
        read_report(folders)
    reference_file(folders[1], "test").unlink()
    with pytest.raises(ValueError, match=r"sparse holds no test.reference.txt beside test.hypotheses.txt"):
        read_report(folders)
    reference_file(folders[1], "test").write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match=r"test.reference.txt is not UTF-8, at byte 0"):
        read_report(folders)


def test_another_metric(folders: list[Path], tmp_path: Path) -> None:
    def judge(texts: Texts) -> float:
        return float(len(texts.hypotheses))

    report = read_report(folders, "count", judge)
    assert (report.metric, [run.judgement for run in report.runs]) == ("count", [5, 5])
    with pytest.raises(ValueError, match="count: none of the runs keeps its texts; give the output folders of runs"):
        read_report([write_run(tmp_path / "bare", 30.0, method="dense")], "count", judge)
