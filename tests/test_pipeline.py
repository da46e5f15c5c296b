from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MBart50Tokenizer,
    MBartTokenizer,
    NllbTokenizer,
)
from transformers.pipelines import PIPELINE_REGISTRY

from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.pipeline import TASK, NMTranslationPipeline, _language_id, _register, translate
from hf_nmsparse.saving import save_packed
from hf_nmsparse.sparsify import sparsify
from tests import tiny

SENTENCES = [
    "The garden is big.",
    "A man",
    "",
    "sleeps in the garden. The garden is big.",
    " \t",
    "Der Garten",
    "A man",
]

MODEL = tiny.marian(init_std=0.5).eval()  # large weights, so that what it says depends on what it reads
TOKENIZER: Any = tiny.tokenizer()

make_pipeline: Any = transformers.pipeline  # its overloads know the built-in tasks only


def one_by_one(sentences: list[str], **kwargs: Any) -> list[str]:
    """What the model says to each sentence alone, by its plain interface."""
    texts = []
    for sentence in sentences:
        inputs = TOKENIZER(sentence, return_tensors="pt")
        output = MODEL.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **kwargs)
        texts.append(TOKENIZER.decode(output[0], skip_special_tokens=True) if sentence.strip() else "")
    return texts


@pytest.mark.parametrize("num_beams", [1, 3])
def test_order_padding_and_batches_change_nothing(num_beams: int) -> None:
    expected = one_by_one(SENTENCES, max_new_tokens=6, num_beams=num_beams)
    assert expected[2] == expected[4] == ""
    assert len(set(expected)) > 2
    for batch_size in (1, 2, 64):
        got = translate(MODEL, TOKENIZER, SENTENCES, batch_size, max_new_tokens=6, num_beams=num_beams)
        assert got == expected


@settings(max_examples=15, deadline=None)
@given(st.lists(st.text(alphabet="aem Td.\n", max_size=12), max_size=5), st.integers(1, 4))
def test_one_translation_for_each_sentence(sentences: list[str], batch_size: int) -> None:
    got = translate(MODEL, TOKENIZER, sentences, batch_size, max_new_tokens=2)
    assert len(got) == len(sentences)
    assert all(not text for text, sentence in zip(got, sentences, strict=True) if not sentence.strip())


def test_the_longest_batch_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def generate(self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        assert attention_mask.shape == input_ids.shape
        assert torch.equal(attention_mask.bool(), input_ids != TOKENIZER.pad_token_id)
        shapes.append(tuple(input_ids.shape))
        return torch.full((len(input_ids), 1), 1)

    monkeypatch.setattr(type(MODEL), "generate", generate)
    translate(MODEL, TOKENIZER, ["a", "a a a a a", "", "a a", "a a a"], batch_size=2)
    assert [rows for rows, _ in shapes] == [2, 2]
    assert shapes[0][1] > shapes[1][1]


def test_without_a_limit_it_does_not_stop_at_20_tokens() -> None:
    lengths = [len(TOKENIZER(text)["input_ids"]) for text in translate(MODEL, TOKENIZER, ["A man"])]
    assert lengths[0] > 40  # a random model runs to the end of its 64 positions


def test_the_models_own_limit_counts() -> None:
    model = tiny.marian(init_std=0.5).eval()
    model.generation_config.max_length = 5
    assert translate(model, TOKENIZER, ["A man"]) == one_by_one(["A man"], max_new_tokens=4)
    assert translate(model, TOKENIZER, ["A man"], max_new_tokens=7) == one_by_one(["A man"], max_new_tokens=7)
    model.generation_config.max_length, model.generation_config.max_new_tokens = None, 4
    assert translate(model, TOKENIZER, ["A man"]) == one_by_one(["A man"], max_new_tokens=4)
    assert translate(model, TOKENIZER, ["A man"], max_length=8) == one_by_one(["A man"], max_new_tokens=7)


def test_what_is_too_long_is_cut_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        got = translate(MODEL, TOKENIZER, ["A man", "garden " * 100], max_new_tokens=3)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.messages == ["translate: 1 of 2 sentences were cut to 64 tokens"]
    assert len(got) == 2


def test_training_mode_is_restored() -> None:
    model = tiny.marian(init_std=0.5, dropout=0.5)
    model.train()
    first = translate(model, TOKENIZER, SENTENCES, max_new_tokens=6)
    assert model.training
    assert first == translate(model.eval(), TOKENIZER, SENTENCES, max_new_tokens=6)
    assert not model.training


@pytest.mark.parametrize(
    ("sentences", "kwargs", "message"),
    [
        ("A man", {}, "expected a list of texts, got one text"),
        (["a", None], {}, "sentence 1 is no text but NoneType"),
        (["a"], {"batch_size": 0}, "batch_size needs at least 1, got 0"),
        (["a"], {"num_return_sequences": 2}, "leave num_return_sequences out"),
        (["a"], {"tgt_lang": "de"}, "one pair of languages; leave out tgt_lang, got 'de'"),
        (["a"], {"src_lang": "de"}, "one pair of languages; leave out src_lang, got 'de'"),
    ],
)
def test_bad_arguments(sentences: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^translate: ") as raised:
        translate(MODEL, TOKENIZER, sentences, **kwargs)
    assert message in str(raised.value)


def test_fsmt_has_a_source_language_and_no_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "src_lang", "en", raising=False)
    assert translate(MODEL, TOKENIZER, ["A man"], max_new_tokens=3) == one_by_one(["A man"], max_new_tokens=3)


def test_m2m100_writes_its_codes_in_another_way() -> None:
    tokenizer = SimpleNamespace(
        src_lang="en", lang_code_to_token={"de": "__de__", "fr": "__fr__"}, convert_tokens_to_ids={"__fr__": 38}.get
    )
    assert _language_id(tokenizer, "tgt_lang", "fr") == 38
    with pytest.raises(ValueError, match="'__fr__' is none of the 2 languages here, such as de, fr"):
        _language_id(tokenizer, "tgt_lang", "__fr__")


@pytest.mark.parametrize("kind", [MBartTokenizer, MBart50Tokenizer])
def test_mbart_finds_its_codes(kind: Any) -> None:
    tokenizer = kind(vocab=[("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0)])
    assert _language_id(tokenizer, "tgt_lang", "de_DE") == tokenizer.convert_tokens_to_ids("de_DE")
    assert _language_id(tokenizer, "tgt_lang", "de_DE") != tokenizer.unk_token_id
    with pytest.raises(ValueError, match=r"'de' is none of the [0-9]+ languages here, such as de_DE"):
        _language_id(tokenizer, "tgt_lang", "de")


def test_a_decoder_alone_does_not_translate() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=1))
    with pytest.raises(ValueError, match="GPT2LMHeadModel is no encoder-decoder model"):
        translate(model, TOKENIZER, ["a"])


class TestLanguages:
    """A tiny NLLB: the source starts with its language code, and the target's is forced."""

    tokenizer: Any = NllbTokenizer(
        vocab={"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "▁": 4, "▁a": 5, "▁b": 6, "a": 7, "b": 8},
        merges=[("▁", "a"), ("▁", "b")],  # type: ignore[list-item]
        extra_special_tokens=["eng_Latn", "deu_Latn", "fra_Latn"],
    )

    def model(self) -> Any:
        torch.manual_seed(0)
        config = M2M100Config(
            vocab_size=len(self.tokenizer),
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_position_embeddings=32,
        )
        return M2M100ForConditionalGeneration(config).eval()

    def test_both_codes_reach_the_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: dict[str, Any] = {}
        model = self.model()
        generate = model.generate

        def spy(**kwargs: Any) -> Any:
            seen.update(kwargs)
            return generate(**kwargs)

        monkeypatch.setattr(model, "generate", spy)
        ids = {code: self.tokenizer.convert_tokens_to_ids(code) for code in ("deu_Latn", "fra_Latn")}
        translate(model, self.tokenizer, ["a b"], src_lang="deu_Latn", tgt_lang="fra_Latn", max_new_tokens=4)
        assert seen["input_ids"].tolist() == [[ids["deu_Latn"], 5, 6, 2]]
        assert seen["forced_bos_token_id"] == ids["fra_Latn"]
        assert self.tokenizer.src_lang == "eng_Latn"

    def test_the_models_own_target_counts(self) -> None:
        model = self.model()
        model.generation_config.forced_bos_token_id = self.tokenizer.convert_tokens_to_ids("fra_Latn")
        expected = translate(model, self.tokenizer, ["a b"], tgt_lang="fra_Latn", max_new_tokens=4)
        assert translate(model, self.tokenizer, ["a b"], max_new_tokens=4) == expected

    def test_a_target_is_needed(self) -> None:
        with pytest.raises(ValueError, match="translates into several languages; name one with tgt_lang"):
            translate(self.model(), self.tokenizer, ["a b"])

    @pytest.mark.parametrize("argument", ["src_lang", "tgt_lang"])
    def test_an_unknown_language(self, argument: str) -> None:
        languages: dict[str, Any] = {"src_lang": "eng_Latn", "tgt_lang": "deu_Latn", argument: "de"}
        with pytest.raises(ValueError, match=f"{argument} 'de' is none of the 3 languages here, such as deu_Latn"):
            translate(self.model(), self.tokenizer, ["a b"], **languages)
        assert self.tokenizer.src_lang == "eng_Latn"

    def test_in_the_pipeline(self) -> None:
        translator = make_pipeline(
            TASK, model=self.model(), tokenizer=self.tokenizer, tgt_lang="deu_Latn", max_new_tokens=4
        )
        german = translator("a b")
        french = translator("a b", tgt_lang="fra_Latn", src_lang="deu_Latn")
        languages_of_calls: list[dict[str, Any]] = [
            {"tgt_lang": "deu_Latn"},
            {"tgt_lang": "fra_Latn", "src_lang": "deu_Latn"},
        ]
        expected = [
            translate(self.model(), self.tokenizer, ["a b"], max_new_tokens=4, **languages)[0]
            for languages in languages_of_calls
        ]
        assert [german[0]["translation_text"], french[0]["translation_text"]] == expected


class TestPipeline:
    expected = tuple({"translation_text": text} for text in one_by_one(SENTENCES, max_new_tokens=5, num_beams=2))

    def translator(self, **kwargs: Any) -> Any:
        return make_pipeline(
            TASK, model=MODEL, tokenizer=TOKENIZER, max_new_tokens=5, num_beams=2, device="cpu", **kwargs
        )

    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_a_list_gives_a_list(self, batch_size: int) -> None:
        assert tuple(self.translator(batch_size=batch_size)(SENTENCES)) == self.expected
        assert tuple(self.translator()(tuple(SENTENCES), batch_size=batch_size)) == self.expected

    def test_a_text_gives_a_list_of_one(self) -> None:
        assert self.translator()(SENTENCES[0]) == [self.expected[0]]
        assert self.translator()("") == [{"translation_text": ""}]

    def test_nothing_gives_nothing(self) -> None:
        assert self.translator()([]) == []
        assert list(self.translator()(iter(()))) == []

    def test_an_iterator_is_read_as_results_are_asked_for(self) -> None:
        taken = []

        def source() -> Iterator[str]:
            for sentence in SENTENCES:
                taken.append(sentence)
                yield sentence

        results = self.translator(batch_size=2)(source())
        assert next(iter(results)) == self.expected[0]
        assert len(taken) < len(SENTENCES)
        assert tuple(self.translator(batch_size=2)(iter(SENTENCES))) == self.expected

    def test_arguments_of_a_call_win(self) -> None:
        [result] = self.translator()("A man", num_beams=1, max_new_tokens=3)
        assert result["translation_text"] == one_by_one(["A man"], max_new_tokens=3)[0]

    @pytest.mark.parametrize("bad", [3, None, {"text": "a"}, [3], [["a"]], [None]])
    def test_no_text(self, bad: Any) -> None:
        with pytest.raises(ValueError, match="nmt-translation: expected a text, got "):
            self.translator()(bad)

    def test_from_a_folder_and_back(self, tmp_path: Path) -> None:
        MODEL.save_pretrained(tmp_path / "model")
        TOKENIZER.save_pretrained(tmp_path / "model")
        translator = make_pipeline(TASK, model=str(tmp_path / "model"), device="cpu")
        assert isinstance(translator, NMTranslationPipeline)
        assert tuple(translator(SENTENCES, max_new_tokens=5, num_beams=2)) == self.expected
        translator.save_pretrained(tmp_path / "again")
        assert not list((tmp_path / "again").glob("*.py"))
        assert "custom_pipelines" not in json.loads((tmp_path / "again/config.json").read_text(encoding="utf-8"))
        make_pipeline(TASK, model=str(tmp_path / "again"), device="cpu")

    def test_a_packed_folder(self, tmp_path: Path) -> None:
        model = tiny.marian(init_std=0.5)
        sparsify(model, NMSparseConfig("2:4"))
        save_packed(model, tmp_path)
        TOKENIZER.save_pretrained(tmp_path)
        texts = translate(model, TOKENIZER, SENTENCES, max_new_tokens=5)
        assert len(set(texts)) > 2
        results = make_pipeline(TASK, model=str(tmp_path), device="cpu", batch_size=4)(SENTENCES, max_new_tokens=5)
        assert results == [{"translation_text": text} for text in texts]

    def test_registering_twice_changes_nothing(self) -> None:
        before = PIPELINE_REGISTRY.supported_tasks[TASK]
        _register()
        assert PIPELINE_REGISTRY.supported_tasks[TASK] is before
