"""How models are named, what they are told, and which of them translates a pair."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_nmsparse.serve.errors import RequestError
from hf_nmsparse.serve.limits import Limits
from hf_nmsparse.serve.metrics import Metrics
from hf_nmsparse.serve.models import Models, load_models


class Told:
    """A translator that takes some ways to be told languages, and remembers what it was loaded as."""

    def __init__(self, path: str, *, compute: str, threads: int) -> None:
        assert (compute, threads) == ("int8", 1)
        self.path, kind = path, path.partition("/")[0]
        codes = {"nllb": ["eng_Latn", "deu_Latn", "fra_Latn"]}.get(kind, [])
        self.tokenizer: Any = SimpleNamespace(supported_language_codes=[f">>{code}<<" for code in codes])
        self.kind = kind

    def translate(self, texts: list[str], *, src_lang: str | None = None, tgt_lang: str | None = None) -> list[Any]:
        assert texts == []
        told = src_lang is not None, tgt_lang is not None
        takes = {"pair": (False, False), "opus": (False, True), "t5": (True, True), "nllb": (True, True)}
        if told != takes.get(self.kind):
            raise ValueError(f"{self.kind} is told {told}")
        return []


def loaded(*names: str) -> Models:
    return load_models(names, threads=1, compute="int8", load=Told)


@pytest.mark.parametrize(
    ("name", "path", "told"),
    [
        ("en:de=pair/x", "pair/x", (False, False)),
        ("zh-Hans:pt_BR=opus/a=b:c=d", "opus/a=b:c=d", (False, True)),
        ("en:de=t5", "t5", (True, True)),
    ],
)
def test_names(name: str, path: str, told: tuple[bool, bool]) -> None:
    [model] = loaded(name)._models
    assert model.translator.path == path  # type: ignore[attr-defined]
    assert (model.names_source, model.names_target) == told
    source, target = name.split("=")[0].split(":")
    assert (model.sources, model.targets) == ((source,), (target,))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pair/x", "pair/x does not say its languages; name them, as in en:de=pair/x"),
        ("en:en=pair", "a model translates from one language into another"),
        ("", "a model is named as PATH or SOURCE:TARGET=PATH"),
        ("en:de=", "en:de= does not say its languages"),
        ("en:de=none", "none is told"),
    ],
)
def test_names_that_are_none(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loaded(name)


def test_no_model() -> None:
    with pytest.raises(ValueError, match="there is no model"):
        loaded()


@pytest.mark.parametrize(
    "names",
    [
        ("en:de=pair/x", "en:fr=pair/y", "en:de=pair/z"),
        ("nllb/600M", "eng_Latn:deu_Latn=pair/z"),
        ("nllb/600M", "nllb/3B"),
    ],
)
def test_a_model_that_would_never_be_asked(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"^serve: {names[-1]}: models before it translate all that it does; name it"):
        loaded(*names)


def test_the_first_that_translates_a_pair_does() -> None:
    models = loaded("eng_Latn:deu_Latn=pair/better", "nllb/600M", "en:de=pair/x")
    models.start(Limits(), Metrics())
    try:
        assert models.languages == {
            "eng_Latn": ["deu_Latn", "fra_Latn"],
            "deu_Latn": ["eng_Latn", "fra_Latn"],
            "fra_Latn": ["eng_Latn", "deu_Latn"],
            "en": ["de"],
            "de": [],
        }
        route = models.route("eng_Latn", "deu_Latn")
        assert route._translator.path == "pair/better"  # type: ignore[attr-defined]
        assert route._languages == {"src_lang": None, "tgt_lang": None}
        assert models.route("eng_Latn", "fra_Latn")._languages == {"src_lang": "eng_Latn", "tgt_lang": "fra_Latn"}
        assert models.route("en", "de")._languages == {"src_lang": None, "tgt_lang": None}
        for source, target in (("en", "deu_Latn"), ("de", "en"), ("auto", "de"), ("en", "en")):
            with pytest.raises(RequestError) as refused:
                models.route(source, target)
            assert refused.value.status == 400
    finally:
        models.close()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder"):
        load_models([f"en:de={tmp_path / 'none'}"], threads=1)
