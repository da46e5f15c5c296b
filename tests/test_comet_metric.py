"""COMET, by a stand-in for its package: that is a gigabyte with its model."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hf_nmsparse.comet_metric import comet_judge
from hf_nmsparse.run_report import Texts

TEXTS = Texts(["A"], ["Ein"], ["Eine"])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model.ckpt").touch()
    return tmp_path / "model.ckpt"


def test_it_is_given_source_translation_and_reference(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def predict(data: list[dict[str, str]], **settings: Any) -> SimpleNamespace:
        asked.update(settings, data=data)
        return SimpleNamespace(system_score=0.75)

    def load(path: str) -> SimpleNamespace:
        asked["path"] = path
        return SimpleNamespace(predict=predict)

    stand_in = ModuleType("comet")
    monkeypatch.setattr(stand_in, "load_from_checkpoint", load, raising=False)
    monkeypatch.setitem(sys.modules, "comet", stand_in)
    assert comet_judge(model)(TEXTS) == 0.75
    assert asked["path"] == str(model)
    assert asked["data"] == [{"src": "A", "mt": "Eine", "ref": "Ein"}]
    assert asked["gpus"] == 0


def test_what_is_missing_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"--comet: no file nowhere; give the \.ckpt of a COMET model"):
        comet_judge(Path("nowhere"))
    monkeypatch.setitem(sys.modules, "comet", None)
    with pytest.raises(ValueError, match="--comet: needs unbabel-comet; pip install unbabel-comet"):
        comet_judge(model)
    stand_in = ModuleType("comet")

    def load(path: str) -> None:
        raise RuntimeError("damaged\nfile")

    monkeypatch.setattr(stand_in, "load_from_checkpoint", load, raising=False)
    monkeypatch.setitem(sys.modules, "comet", stand_in)
    with pytest.raises(ValueError, match=r"model\.ckpt cannot be loaded: damaged file"):
        comet_judge(model)
