"""The demo's corpus from a wheel that is made here, and what is wrong with one."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from recipes import homeassistant
from recipes.corpora import read_corpus
from recipes.homeassistant import homeassistant_corpus


def wheel(folder: Path, monkeypatch: pytest.MonkeyPatch, texts: dict[str, dict[str, Any]]) -> Path:
    """A wheel with the translations of one integration, taken for the real one."""
    folder.mkdir(exist_ok=True)
    path = folder / homeassistant.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        for lang, content in texts.items():
            archive.writestr(f"homeassistant/components/sun/translations/{lang}.json", json.dumps(content))
    monkeypatch.setattr(homeassistant, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_homeassistant_pairs_texts_by_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    english = {
        "title": "Sun",  # too short
        "step": {"one": "Where does the sun rise?", "two": "Only here in English, alas", "same": "a b c d"},
        "many": {str(i): f"Text number {i} of many" for i in range(6)},
    }
    german = {
        "title": "Sonne",
        "step": {"one": "Wo geht die Sonne auf?", "three": "Nur hier auf Deutsch", "same": "a b c d"},
        "many": {str(i): f"Text Nummer {i} von vielen" for i in range(6)},
    }
    wheel(tmp_path, monkeypatch, {"en": english, "de": german, "fr": {}})
    monkeypatch.setattr(homeassistant, "HELD_OUT", 2)
    splits = homeassistant_corpus("en", "de", cache=tmp_path)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 3, "validation": 2, "test": 2}
    pairs = {(row["source"], row["target"]) for rows in splits.values() for row in rows}
    expected = {(f"Text number {i} of many", f"Text Nummer {i} von vielen") for i in range(6)}
    assert pairs == expected | {("Where does the sun rise?", "Wo geht die Sonne auf?")}
    again = homeassistant_corpus("en", "de", cache=tmp_path)
    assert {split: rows[:] for split, rows in again.items()} == {split: rows[:] for split, rows in splits.items()}


def test_homeassistant_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = wheel(tmp_path, monkeypatch, {"en": {"a": "one two three four"}, "de": {"a": "eins zwei drei vier"}})
    with pytest.raises(ValueError, match="no texts in both 'en' and 'fr'"):
        homeassistant_corpus("en", "fr", cache=tmp_path)
    with pytest.raises(ValueError, match="only 1 texts in 'en' and 'de'"):
        homeassistant_corpus("en", "de", cache=tmp_path)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match="is not the expected file; delete it and run again"):
        homeassistant_corpus("en", "de", cache=tmp_path)


def test_homeassistant_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(ValueError, match=r"pip could not download homeassistant==[0-9.]+: ERROR: No matching"):
        homeassistant_corpus("en", "de", cache=tmp_path)


def test_the_recipe_knows_it_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"source": ["a"], "target": ["b"]}
    splits = {split: Dataset.from_dict(rows) for split in ("train", "validation", "test")}
    monkeypatch.setattr("recipes.corpora.homeassistant_corpus", lambda *languages: splits)
    assert read_corpus("homeassistant", "en", "de", None, streaming=False) == splits
    streamed = read_corpus("homeassistant", "en", "de", None, streaming=True)
    assert isinstance(streamed["train"], IterableDataset)
    assert list(streamed["train"]) == list(splits["train"])
    assert streamed["test"] is splits["test"]


def test_pairs_are_written_as_json_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"en": {"a": "Where does the sun rise?"}, "de": {"a": "Wo geht die Sonne auf, ähm?"}}
    path = wheel(tmp_path, monkeypatch, texts)
    monkeypatch.setattr(homeassistant, "fetch_wheel", lambda folder: path)
    monkeypatch.setattr(sys, "argv", ["homeassistant", "en", "de"])
    homeassistant.main()
    assert json.loads(capsys.readouterr().out) == {
        "translation": {"en": "Where does the sun rise?", "de": "Wo geht die Sonne auf, ähm?"}
    }
