"""Parallel text from local files, the Hub and, refused, from elsewhere."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from hf_nmsparse import corpus
from hf_nmsparse.corpus import load_corpus, load_text

PAIRS = [("A man sleeps.", "Ein Mann schläft."), ('He said "no".', "Er sagte „nein“."), ("NA", "null")]
MULTI30K = Path("../shared/data/multi30k")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder: Path, kind: str) -> None:
    folder.mkdir()
    rows = [{"en": en, "de": de} for en, de in PAIRS]
    nested = [{"translation": row} for row in rows]
    if kind == "nested.jsonl":
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, nested)) + "\n")
    elif kind == "flat.jsonl.gz":
        (folder / "train.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    elif kind == "tsv":
        lines = ["en\tde", *("\t".join(pair) for pair in PAIRS)]
        (folder / "train.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif kind == "parquet":
        Dataset.from_list(nested).to_parquet(folder / "train.parquet")
    else:
        for index, lang in enumerate(("en", "de")):
            (folder / f"train.{lang}").write_text("\n".join(pair[index] for pair in PAIRS), encoding="utf-8")


@pytest.mark.parametrize("kind", ["nested.jsonl", "flat.jsonl.gz", "tsv", "parquet", "text"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_format_gives_the_same_text(tmp_path: Path, kind: str, streaming: bool) -> None:
    write(tmp_path / "corpus", kind)
    splits = load_corpus(str(tmp_path / "corpus"), "en", "de", streaming=streaming)
    assert list(splits) == ["train"]
    assert isinstance(splits["train"], IterableDataset if streaming else Dataset)
    for _ in range(2):
        assert [list(row.items()) for row in splits["train"]] == [[("source", a), ("target", b)] for a, b in PAIRS]
    assert list(zip(splits["train"]["source"], splits["train"]["target"], strict=True)) == PAIRS


def test_of_a_stream_only_the_training_split_is_one(tmp_path: Path) -> None:
    write(tmp_path / "corpus", "nested.jsonl")
    for split in ("validation", "test"):
        shutil.copy(tmp_path / "corpus" / "train.jsonl", tmp_path / "corpus" / f"{split}.jsonl")
    splits = load_corpus(str(tmp_path / "corpus"), "en", "de", streaming=True)
    assert {split: type(rows) for split, rows in splits.items()} == {
        "train": IterableDataset,
        "validation": Dataset,
        "test": Dataset,
    }
    assert list(splits["test"]) == list(splits["train"])


def test_a_bad_row_of_a_stream_is_told_when_it_comes(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("en\tde\na\tb\nc\t \n")
    rows = load_corpus(str(tmp_path), "en", "de", streaming=True)["train"]
    with pytest.raises(ValueError, match=r"train.tsv, line 3: no 'de' text, got ' '; drop the row"):
        list(rows)


def test_the_languages_can_be_turned_round(tmp_path: Path) -> None:
    write(tmp_path / "corpus", "nested.jsonl")
    assert load_corpus(str(tmp_path / "corpus"), "de", "en")["train"][0] == {
        "source": "Ein Mann schläft.",
        "target": "A man sleeps.",
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no file named train"),
        ({"train.xml": "<a/>"}, "cannot read train.xml; the formats are jsonl, json, parquet, tsv, en.de"),
        ({"train.jsonl": ""}, "train.jsonl is empty"),
        ({"train.jsonl": '{"en": "a", "de": '}, "cannot read .*train.jsonl"),
        ({"train.en": "a\nb\n", "train.de": "c\n"}, "train.en has 2 lines, .*train.de has 1; they are not aligned"),
        ({"train.en": "a\n"}, "train.de is missing beside its other half"),
        ({"train.jsonl": '{"en": "a", "fr": "b"}'}, "no language 'de'; it has en, fr"),
        ({"train.jsonl": '{"translation": {"en": "a", "fr": "b"}}'}, "no language 'de'; it has en, fr"),
        ({"train.jsonl": '{"translation": "a"}'}, "line 1: holds str, not one text a language"),
        ({"train.jsonl": '{"en": "a", "de": "b"}\n{"en": "a", "de": " "}'}, "line 2: no 'de' text, got ' '"),
        ({"train.jsonl": '{"en": "a", "de": "b"}\n{"en": null, "de": "b"}'}, "line 2: no 'en' text, got None"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_refusals(tmp_path: Path, files: dict[str, str], message: str, streaming: bool) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        list(load_corpus(str(folder), "en", "de", streaming=streaming)["train"])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_header_alone_is_refused(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "train.tsv").write_text("en\tde\n")
    with pytest.raises(ValueError, match=r"corpus: .*train.tsv has no rows$"):
        load_corpus(str(tmp_path), "en", "de", streaming=streaming)


def test_neither_folder_nor_hub() -> None:
    with pytest.raises(ValueError, match="corpus 'no/such': no local folder, and the Hub has not answered") as refused:
        load_corpus("no/such", "en", "de")
    assert "\n" not in str(refused.value)


def of_the_hub(rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Has `load_corpus` find these rows in both splits of whatever it asks the Hub for."""

    def found(name: str, config: str | None, streaming: bool) -> dict[str, Any]:
        splits = {split: Dataset.from_list(rows) for split in ("train", "test")}
        return {name: split.to_iterable_dataset() if streaming else split for name, split in splits.items()}

    monkeypatch.setattr("datasets.load_dataset", found)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_rows_of_the_hub_without_text_are_left_out_of_training(
    nested: bool, streaming: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody can drop them there; but what is scored is what the others score."""
    rows = [{"en": en, "de": de} for en, de in [("a", "b"), (" ", "c"), ("d", None), ("e", "f")]]
    table = [{"translation": row} for row in rows] if nested else rows
    of_the_hub(table, monkeypatch)
    with pytest.raises(ValueError, match="corpus some/texts, split test: row 1 has no 'en' text, got ' '; drop the"):
        load_corpus("some/texts", "en", "de", streaming=streaming)
    monkeypatch.setattr(corpus, "SPLITS", ("train",))
    pairs = load_corpus("some/texts", "en", "de", streaming=streaming)["train"]
    assert list(pairs) == [{"source": "a", "target": "b"}, {"source": "e", "target": "f"}]
    said = "rows that lack a text are left out of the stream" if streaming else "2 of 4 rows lack a text: left out"
    assert f"corpus some/texts, split train: {said}" in caplog.text


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"en": 7, "de": "b"}], "split train: 'en' holds int, not text"),
        ([{"en": "a", "fr": "b"}], "split train: no language 'de'; it has en, fr"),
        ([{"translation": "a"}], "split train: translation holds str, not one text a language"),
        ([{"en": "a", "de": None}], "split train: each of the 1 rows lacks a text"),
    ],
)
def test_datasets_of_the_hub_that_are_refused(
    rows: list[dict[str, Any]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_the_hub(rows, monkeypatch)
    with pytest.raises(ValueError, match=message):
        load_corpus("some/texts", "en", "de")


def test_a_file_is_no_corpus(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"train.jsonl: a file; name its folder, in which the files are train\.\*"):
        load_corpus(str(file), "en", "de")


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "corpus", "text")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(ValueError, match=r"train.en cannot be kept in the cache, .*file: .*File exists"):
        load_corpus(str(tmp_path / "corpus"), "en", "de")


@pytest.mark.skipif(not MULTI30K.is_dir(), reason="the real corpus does not lie beside the project")
def test_real_corpus() -> None:
    splits = load_corpus(str(MULTI30K), "en", "de")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 29_000, "validation": 1_014, "test": 1_000}
    assert splits["train"][0] == {
        "source": "Two young, White males are outside near many bushes.",
        "target": "Zwei junge weiße Männer sind im Freien in der Nähe vieler Büsche.",
    }


def test_a_text_of_one_language_has_a_row_for_each_line(tmp_path: Path) -> None:
    """Blank ones too, and after a change the file is read anew."""
    file = tmp_path / "mono.txt.gz"
    for lines in (["eins", "", " zwei\u2028drei"], ["vier"]):
        file.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode()))
        assert load_text(str(file)).to_dict() == {"source": lines}


def test_a_text_that_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"\xe4\n")
    for name, message in (
        ("none.txt", "text: no file "),
        ("empty.txt", r"text: .* is empty"),
        ("latin.txt", r"latin\.txt, line 1 is not UTF-8"),
    ):
        with pytest.raises(ValueError, match=message):
            load_text(str(tmp_path / name))
