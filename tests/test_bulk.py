"""Texts in bulk: the engine and torch say the same, and what is equal is translated once."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_nmsparse import NMSparseConfig, Translator, finalize, save_packed, sparsify
from hf_nmsparse.bulk import (
    BLANK,
    TOO_LONG,
    BulkTranslator,
    Candidate,
    EngineTranslator,
    Search,
    TorchTranslator,
    load_translator,
    score_each,
    translate_each,
)
from hf_nmsparse.glossary import Glossary
from hf_nmsparse.loading import load_seq2seq
from hf_nmsparse.placeholders import keeps_placeholders
from tests.recipe_runs import PAIRS
from tests.teachers import save_teacher
from tests.test_texts import FAMILIES
from tests.test_texts import folder as tokenizer_files  # noqa: F401  # a fixture

TEXTS = [source for source, _ in PAIRS[:8]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, and a packed one of it."""
    folder = tmp_path_factory.mktemp("bulk")
    dense = save_teacher(folder / "dense")
    model = load_seq2seq(str(dense), dtype=torch.float32)
    sparsify(model, NMSparseConfig("2:4"))
    finalize(model)
    save_packed(model, folder / "packed", values="fp32")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(dense / name, folder / "packed" / name)
    return folder


def both(place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[BulkTranslator, BulkTranslator]:
    """The model on the engine and in torch."""
    engine = load_translator(str(place / name), "auto", 1, "cpu")
    with monkeypatch.context() as patch:
        patch.setenv("HF_NMSPARSE_ENGINE", "0")
        stock = load_translator(str(place / name), "auto", torch.get_num_threads(), "cpu")
    assert isinstance(engine, EngineTranslator)
    assert isinstance(stock, TorchTranslator)
    assert engine.longest == stock.longest == 40
    return engine, stock


@pytest.mark.parametrize("name", ["dense", "packed"])
def test_the_engine_and_torch_give_the_same(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams, their tokens and their scores, whatever the batch."""
    translators = both(place, name, monkeypatch)
    for settings, count in (({"num_beams": 3}, 2), ({"num_beams": 1}, 1)):
        for scores in (False, True):
            search = Search(count, 3, scores, settings=settings)
            found = [translator.translate(TEXTS, search) for translator in translators]
            assert {len(each) for each in found[0]} == {count}
            flat = [[one for each in texts for one in each] for texts in found]
            assert [one[:2] for one in flat[0]] == [one[:2] for one in flat[1]]
            for one, other in zip(*flat, strict=True):
                assert one.score == pytest.approx(other.score, abs=1e-3) if scores else one.score is other.score is None


def test_samples_are_those_of_their_seed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"do_sample": True, "num_beams": 1, "top_k": 0, "temperature": 30.0}
    for translator in both(place, "dense", monkeypatch):
        one, same, other = (translator.translate(TEXTS, Search(2, seed=seed, settings=settings)) for seed in (1, 1, 2))
        assert one == same != other


def test_placeholders_come_back(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all translations of a text, whoever translates; what has none is as it was."""
    texts = [*TEXTS[:2], "The {dog} runs to %s.", "Give {name} the <b>red</b> ball."]
    settings: dict[str, Any] = {"settings": {"num_beams": 3}}
    for translator in both(place, "dense", monkeypatch):
        plain = translator.translate(texts, Search(2, **settings))
        assert not any(keeps_placeholders(texts[3], one.text) for one in plain[3])
        found = translator.translate(texts, Search(2, keep_placeholders=True, scores=True, **settings))
        assert [[one.text for one in each] for each in found[:2]] == [[one.text for one in each] for each in plain[:2]]
        for text, each in zip(texts, found, strict=True):
            assert each
            assert all(keeps_placeholders(text, one.text) and one.score is not None for one in each)


def test_terms_of_a_glossary_come_out_of_the_engine(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, stock = both(place, "dense", monkeypatch)
    search = Search(glossary=Glossary({"dog": "Schwan"}))
    texts = ["The dog runs.", "The cat runs."]
    found = [each[0].text for each in engine.translate(texts, search)]
    assert "Schwan" in found[0]
    assert found[1] == engine.translate(texts, Search())[1][0].text
    with pytest.raises(
        ValueError, match=r"^glossary: needs the native engine, and transformers on cpu translates; lea"
    ):
        stock.translate(texts, search)


@pytest.mark.parametrize("name", ["dense", "packed"])
def test_given_translations_have_the_same_scores(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the engine and in torch, whatever the batch; those of `Translator.score`."""
    engine, stock = both(place, name, monkeypatch)
    assert engine.longest_target == stock.longest_target == 40
    targets = [target for _, target in PAIRS[:8]]
    assert engine.count(targets, Search(), target=True) == stock.count(targets, Search(), target=True)
    given = [*PAIRS[:8], ("a", " "), ("", "b"), ("The dog runs. " * 20, "b"), ("a", "Der Hund. " * 20), PAIRS[0]]
    own = Translator(place / name, threads=1).score(TEXTS, targets)
    for translator, size in ((engine, 64), (stock, 64), (stock, 3)):
        found = score_each(given, translator, Search(batch_size=size))
        assert found[8:12] == [BLANK, BLANK, TOO_LONG, TOO_LONG]
        assert found[12] == found[0]
        for one, other in zip(found, own, strict=False):
            if not isinstance(one, str):
                assert one.tokens == other.tokens
                assert one.token_scores == pytest.approx(other.token_scores, abs=1e-3)
                assert one.total == pytest.approx(sum(one.token_scores), abs=1e-3)
    assert score_each(PAIRS[:1], engine, Search(), longest=2) == [TOO_LONG]
    assert score_each([], engine, Search()) == score_each([], stock, Search()) == []


@pytest.mark.parametrize("family", ["nllb", "m2m100", "mbart", "mbart-50", "t5"])
def test_given_translations_are_in_the_language_of_the_call(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    case = FAMILIES[family]
    tokenizer = case.tokenizer(request.getfixturevalue("tokenizer_files"))
    model = case.model(tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    search = Search(languages={"src_lang": case.source, "tgt_lang": case.target})
    engine, stock = EngineTranslator(str(tmp_path), "auto", 1), TorchTranslator(model, tokenizer, "torch")
    assert engine.count(["a man"], search) == stock.count(["a man"], search)
    for one, other in zip(*(each.score([("a man", "red tree")], search) for each in (engine, stock)), strict=True):
        assert one.tokens == other.tokens
        assert one.token_scores == pytest.approx(other.token_scores, abs=1e-3)


class Told:
    """Says a text once more."""

    name, longest = "told", 4.0

    def __init__(self) -> None:
        self.asked = list[str]()

    def count(self, texts: Sequence[str], search: Search, target: bool = False) -> list[int]:
        return [len(text.split()) for text in texts]

    def translate(self, texts: Sequence[str], search: Search) -> list[list[Candidate]]:
        self.asked += texts
        return [[Candidate(f"{text} {text}", 2)] for text in texts]


def test_what_is_equal_is_translated_once() -> None:
    told: Any = Told()
    found = translate_each(["b", "", "a", "b", "a b c d", "\t"], told, Search(), prefix="> ")
    a, b = ([Candidate(f"> {text} > {text}", 2)] for text in "ab")
    assert found == [b, BLANK, a, b, TOO_LONG, BLANK]
    assert told.asked == ["> b", "> a"]
    assert translate_each(["a b", "c"], told, Search(), longest=1)[0] == TOO_LONG
    assert translate_each([" "], told, Search()) == [BLANK]


def test_a_batch_that_does_not_fit_is_one_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nAdvice")

    _, stock = both(place, "dense", monkeypatch)
    monkeypatch.setattr("hf_nmsparse.pipeline.generated", full)
    with pytest.raises(
        ValueError, match=r"^batch_size: 64 does not fit transformers on cpu: CUDA out of memory\.; lower"
    ):
        stock.translate(TEXTS, Search())


def test_what_cannot_be_loaded_is_one_line(place: Path) -> None:
    with pytest.raises(ValueError, match=r"^compute: 'int8' is for the native engine, which is not taken for a device"):
        load_translator(str(place / "dense"), "int8", 1, "cuda")
    with pytest.raises(ValueError, match=r"^model: .*nowhere cannot be loaded: ."):
        load_translator(str(place / "nowhere"), "auto", torch.get_num_threads(), "cpu")
