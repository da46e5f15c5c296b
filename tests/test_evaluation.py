"""The record of an evaluated run: its file, its facts, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from hf_nmsparse import evaluation
from hf_nmsparse.evaluation import Evaluation, evaluation_record, versions
from hf_nmsparse.metrics import Comparison, Score, score

RUN: dict[str, Any] = {
    "corpus": "multi30k",
    "split": "test",
    "model": "tiny Transformer",
    "method": "sr-ste",
    "seed": 1,
    "steps": 100,
    "dense_bytes": 1000,
}


def record(**changes: Any) -> Evaluation:
    """A record of a made-up run."""
    return evaluation_record(Score(30.123, 50.5, "sig|b", "sig|c", 1000), **{**RUN, **changes})


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    comparison = Comparison(30.123, 31.0, (-2.0, 0.25), 0.12, 1000, 12345, "sig|b", 1000)
    written = evaluation_record(Score(30.123, 50.5, "sig|b", "sig|c", 1000), comparison, **RUN)
    path = tmp_path / "new" / "run.json"
    written.write(path)
    assert Evaluation.read(path) == written
    with pytest.raises(ValueError, match=r"^evaluation: path is empty; name a path"):
        written.write("")
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert list(stored) == sorted(stored)
    assert stored["against_dense"] == {
        "bleu_dense": 31.0,
        "difference": 30.123 - 31.0,
        "interval": [-2.0, 0.25],
        "p": 0.12,
        "samples": 1000,
        "seed": 12345,
        "verdict": "no difference shown",
    }
    assert stored["bleu"] == 30.123
    assert stored["versions"] == versions()
    assert stored["threads"] >= 1
    assert stored["packed_bytes"] is None


def test_versions_name_all_that_counts() -> None:
    names = {"python", "torch", "transformers", "accelerate", "datasets", "sacrebleu", "hf_nmsparse", "kernels"}
    assert set(versions()) == names


def test_a_package_that_is_not_there_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(evaluation, "version", version)
    assert versions()["datasets"] == "none"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blue": 3}, "key 'blue' is unknown"),
        ({"bleu": "30"}, "bleu is float or int, got '30'"),
        ({"seed": 1.5}, "seed is int, got 1.5"),
        ({"seed": True}, "seed is int, got True"),
        ({"decay": "x"}, "decay is float or null or int, got 'x'"),
        ({"chrf": float("nan")}, "chrf is float or int, got nan"),
        ({"versions": None}, "versions is dict, got None"),
        ({"pattern": "4:2"}, "N:M needs 1 <= N < M"),
    ],
)
def test_a_bad_record_names_file_and_key(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**record().to_dict(), **change}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"run\.json: ") as raised:
        Evaluation.read(path)
    assert message in str(raised.value)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    values = record(decay=1).to_dict()
    del values["signature"]
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match=r"run\.json: key 'signature' is missing"):
        Evaluation.read(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_file_that_is_no_record(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"run\.json: "):
        Evaluation.read(path)
    with pytest.raises(ValueError, match=r"none\.json: cannot be read"):
        Evaluation.read(tmp_path / "none.json")


def test_a_record_wants_its_facts() -> None:
    with pytest.raises(ValueError, match="'method' is missing"):
        evaluation_record(score(["a"], ["a"]), corpus="c", split="s", model="m", seed=1, steps=1, dense_bytes=1)
    with pytest.raises(ValueError, match="'patern' is unknown"):
        record(patern="2:4")


def test_the_comparison_must_be_of_the_same_translations() -> None:
    comparison = Comparison(29.0, 31.0, (-2.0, 0.25), 0.12, 1000, 12345, "sig|b", 1000)
    with pytest.raises(ValueError, match="compare the same translations"):
        evaluation_record(Score(30.0, 50.5, "b", "c", 1000), comparison, **RUN)


def test_a_record_is_frozen_and_can_be_replaced() -> None:
    assert replace(record(), seed=2).seed == 2
