from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pytest
import torch
import transformers
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    M2M100Config,
    M2M100ForConditionalGeneration,
    NllbTokenizer,
    TextIteratorStreamer,
)
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.pt_utils import KeyDataset

from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.pipeline import TASK, NMTranslationPipeline, _register, generated, translate
from hf_nmsparse.placeholders import keeps_placeholders
from hf_nmsparse.saving import save_packed
from hf_nmsparse.sparse_model import sparsify
from tests import tiny
from tests.test_positions import MODELS

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

TOKENIZER_OF_40: Any = transformers.BertTokenizer(
    vocab={word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"])}
)

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


CONFIG = GenerationConfig


class TestGenerationSettings:
    """Whatever sets them: a keyword goes before the caller's configuration, and that before the model's own."""

    @pytest.mark.parametrize(
        "own", [{}, {"max_length": 20}, {"max_new_tokens": 20}, {"max_length": 20, "max_new_tokens": 9}]
    )
    @pytest.mark.parametrize(
        "given",
        [
            {"max_new_tokens": 3},
            {"max_length": 4},
            {"max_new_tokens": 3, "max_length": 50},
            {"generation_config": CONFIG(max_new_tokens=3)},
            {"generation_config": CONFIG(max_length=4)},
            {"generation_config": CONFIG(max_new_tokens=30), "max_length": 4},
            {"generation_config": CONFIG(max_length=30), "max_new_tokens": 3},
            {"generation_config": CONFIG(max_new_tokens=3), "max_length": None},
        ],
        ids=str,
    )
    def test_the_nearest_limit_counts(
        self, own: dict[str, Any], given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = one_by_one(["A man"], max_new_tokens=3)
        monkeypatch.setattr(MODEL, "generation_config", copy.deepcopy(MODEL.generation_config))
        MODEL.generation_config.update(**own)
        assert translate(MODEL, TOKENIZER, ["A man"], **given) == expected

    def test_every_setting_of_a_configuration(self) -> None:
        config = CONFIG(max_new_tokens=6, num_beams=3, length_penalty=3.0, no_repeat_ngram_size=1, bad_words_ids=[[40]])
        keywords = {key: value for key, value in config.to_diff_dict().items() if key != "transformers_version"}
        expected = one_by_one(SENTENCES, **keywords)
        assert translate(MODEL, TOKENIZER, SENTENCES, generation_config=config) == expected
        assert expected != one_by_one(SENTENCES, max_new_tokens=6)
        other = translate(MODEL, TOKENIZER, SENTENCES, generation_config=config, num_beams=1)
        assert other == one_by_one(SENTENCES, **{**keywords, "num_beams": 1})

    @pytest.mark.parametrize("name", MODELS)
    def test_no_model_is_asked_for_more_than_its_positions(self, name: str) -> None:
        make, _, positions = MODELS[name]
        model = make()
        most = positions or 40

        def lengths(**kwargs: Any) -> set[int]:
            batches = generated(model, TOKENIZER_OF_40, ["a", "b b b"], 1, None, None, kwargs)
            return {output.shape[1] for _, _, output in batches}

        assert lengths(max_new_tokens=most) == lengths(max_length=most + 1) == {most + 1}
        model.generation_config.max_length = 500
        assert lengths(num_beams=1) == ({most + 1} if positions else {500})
        if positions is None:
            return
        for key, least in (("max_new_tokens", most), ("max_length", most + 1)):
            message = f"{key} {least + 1} is beyond the {most} positions of the decoder; give at most {least}"
            for asked in ({key: least + 1}, {"generation_config": CONFIG(**{key: least + 1})}):
                with pytest.raises(ValueError, match=f"^translate: {message}$"):
                    lengths(**asked)
        model.generation_config.max_length = None
        assert lengths() == {most + 1}

    def test_stop_strings_need_no_tokenizer(self) -> None:
        spelled = [TOKENIZER(letter)["input_ids"][-2] for letter in "xyz"]
        forced: dict[str, Any] = {"prefix_allowed_tokens_fn": lambda _, tokens: [spelled[len(tokens) - 1]]}
        assert translate(MODEL, TOKENIZER, ["A man"], max_new_tokens=3, **forced) == ["xyz"]
        assert translate(MODEL, TOKENIZER, ["A man"], max_new_tokens=3, stop_strings=["y"], **forced) == ["xy"]
        config = CONFIG(stop_strings=["y"], max_new_tokens=3)
        assert translate(MODEL, TOKENIZER, ["A man"], generation_config=config, **forced) == ["xy"]

    def test_prefix_allowed_tokens_are_asked_by_the_place_of_the_sentence(self) -> None:
        texts = ["a", "a man sleeps in the garden", "a man"]  # translated in another order
        allowed = [TOKENIZER(letter)["input_ids"][-2:-1] for letter in "xyz"]
        by_place: dict[str, Any] = {"prefix_allowed_tokens_fn": lambda place, _: allowed[place]}
        for batch_size in (1, 2, 3):
            assert translate(MODEL, TOKENIZER, texts, batch_size, max_new_tokens=3, **by_place) == ["xxx", "yyy", "zzz"]

    def test_what_the_checkpoint_asks_for_beside_tokens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(MODEL, "generation_config", copy.deepcopy(MODEL.generation_config))
        MODEL.generation_config.update(
            return_dict_in_generate=True, output_scores=True, num_return_sequences=2, num_beams=2
        )
        expected = [MODEL.generate(**TOKENIZER("A man", return_tensors="pt"), max_new_tokens=4).sequences[0]]
        got = translate(MODEL, TOKENIZER, ["A man"], max_new_tokens=4)
        assert got == TOKENIZER.batch_decode(expected, skip_special_tokens=True)
        results = make_pipeline(TASK, model=MODEL, tokenizer=TOKENIZER, device="cpu")("A man", max_new_tokens=4)
        assert [len(results), results[0]["translation_text"]] == [2, got[0]]

    def test_a_streamer_follows_one_sentence(self) -> None:
        queue = TextIteratorStreamer(TOKENIZER, skip_special_tokens=True)
        [text] = translate(MODEL, TOKENIZER, ["A man"], max_new_tokens=4, streamer=queue)
        assert "".join(queue) == text
        with pytest.raises(ValueError, match="a streamer follows one sentence, got 2; leave it out"):
            translate(MODEL, TOKENIZER, ["a", "b"], max_new_tokens=4, streamer=queue)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"generation_config": {"num_beams": 2}}, "generation_config needs a GenerationConfig, got dict"),
            ({"max_new_tokens": 0}, "max_new_tokens needs at least 1, got 0"),
            ({"max_length": 2.5}, "max_length needs at least 1, got 2.5"),
            ({"max_length": "9"}, "max_length needs at least 1, got '9'"),
            ({"max_new_tokens": True}, "max_new_tokens needs at least 1, got True"),
            ({"num_return_sequences": 2}, "leave num_return_sequences out"),
            ({"generation_config": CONFIG(num_beams=2, num_return_sequences=2)}, "leave num_return_sequences out"),
            ({"return_dict_in_generate": True}, "return_dict_in_generate has no place beside translations"),
            ({"generation_config": CONFIG(output_scores=True, return_dict_in_generate=True)}, "has no place beside"),
            ({"decoder_input_ids": torch.zeros(1, 1)}, "decoder_input_ids is made from the sentences, batch by batch"),
            ({"attention_mask": torch.ones(1, 1)}, "attention_mask is made from the sentences, batch by batch"),
            (
                {"decoder_start_token_id": [0, 0]},
                "decoder_start_token_id needs one token for all sentences, got a list",
            ),
            ({"num_beems": 2}, "num_beems"),
            ({"num_beams": -1}, "num_beams needs at least 1, got -1"),
            ({"num_beams": 2.0}, "num_beams needs at least 1, got 2.0"),
            ({"num_beams": "2"}, "num_beams needs at least 1, got '2'"),
            ({"generation_config": CONFIG(eos_token_id=[2, 9999])}, "eos_token_id: 9999 is none of the 300 tokens"),
            ({"pad_token_id": -1}, "pad_token_id: -1 is none of the 300 tokens"),
            ({"eos_token_id": "2"}, "eos_token_id: '2' is none of the 300 tokens"),
            ({"suppress_tokens": [1, 300]}, "suppress_tokens: 300 is none of the 300 tokens"),
            ({"begin_suppress_tokens": [-1]}, "begin_suppress_tokens: -1 is none of the 300 tokens"),
            ({"bad_words_ids": [[5], [6, 300]]}, "bad_words_ids: 300 is none of the 300 tokens"),
            ({"forced_bos_token_id": 300}, "forced_bos_token_id: 300 is none of the 300 tokens"),
            ({"forced_eos_token_id": [300]}, "forced_eos_token_id: 300 is none of the 300 tokens"),
            ({"decoder_start_token_id": -5}, "decoder_start_token_id: -5 is none of the 300 tokens"),
            ({"prefix": "translate: "}, "prefix"),
            ({"batch_size": True}, "batch_size needs at least 1, got True"),
            ({"batch_size": "8"}, "batch_size needs at least 1, got '8'"),
        ],
    )
    def test_what_cannot_be_followed(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=rf"^.*{re.escape(message)}"):
            translate(MODEL, TOKENIZER, ["A man"], **given)

    @pytest.mark.parametrize("most", [0, 1, -1, "64", None, True, float("nan")])
    def test_a_tokenizer_that_leaves_no_room(self, most: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(TOKENIZER, "model_max_length", most)
        with pytest.raises(ValueError, match="the tokenizer's model_max_length needs at least 2"):
            translate(MODEL, TOKENIZER, ["A man"])

    def test_a_tokenizer_that_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class PanicException(BaseException):  # as that of Rust's
            pass

        for error in (Exception("WordLevel error:\nMissing [UNK]"), TypeError("no"), PanicException("unwrap")):

            def fail(*_: Any, error: BaseException = error, **__: Any) -> None:
                raise error

            monkeypatch.setattr(type(TOKENIZER), "__call__", fail)
            with pytest.raises(
                ValueError, match=rf"the tokenizer has failed: {type(error).__name__}: .*; load"
            ) as raised:
                translate(MODEL, TOKENIZER, ["A man"])
            assert "\n" not in str(raised.value)

    def test_a_text_without_tokens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(type(TOKENIZER), "__call__", lambda *_, **__: {"input_ids": [[5], []]})
        with pytest.raises(ValueError, match="the tokenizer gives no tokens for 'b'; load"):
            translate(MODEL, TOKENIZER, ["a", "b"])

    def test_a_tokenizer_without_padding(self) -> None:
        tokenizer = tiny.tokenizer()
        tokenizer.pad_token = None
        with pytest.raises(ValueError, match="the tokenizer has no padding token; set "):
            translate(MODEL, tokenizer, ["A man"])


def test_only_what_was_training_trains_again() -> None:
    model = tiny.marian(dropout=0.5).train()
    frozen = model.get_encoder().eval()
    before = [module.training for module in model.modules()]
    translate(model, TOKENIZER, ["A man"], max_new_tokens=2)
    assert [module.training for module in model.modules()] == before
    assert not frozen.training


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

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            (3, "expected a list of texts, got int"),
            (None, "expected a list of texts, got NoneType"),
            ({"text": "a"}, "expected a list of texts, got dict"),
            (b"a", "expected a list of texts, got bytes"),
            ([3], "sentence 0 is no text but int"),
            (["a", ["a"]], "sentence 1 is no text but list"),
            ([None], "sentence 0 is no text but NoneType"),
        ],
    )
    def test_no_text(self, bad: Any, message: str) -> None:
        with pytest.raises(ValueError, match=f"^nmt-translation: {message}$"):
            self.translator()(bad)

    def test_a_generator_names_the_place(self) -> None:
        with pytest.raises(ValueError, match="sentence 1 is no text but float"):
            list(self.translator()(text for text in ("a", float("nan"))))

    @pytest.mark.parametrize(
        "texts",
        [
            pytest.param(pd.Series(SENTENCES[::-1], index=range(len(SENTENCES))[::-1])[::-1], id="a Series"),
            pytest.param(np.array(SENTENCES), id="an array"),
            pytest.param(dict(enumerate(SENTENCES)).values(), id="values"),
            pytest.param(Dataset.from_dict({"text": SENTENCES})["text"], id="a column"),
        ],
    )
    def test_texts_are_read_by_place(self, texts: Any) -> None:
        assert tuple(self.translator(batch_size=2)(texts)) == self.expected
        assert translate(MODEL, TOKENIZER, texts, 2, max_new_tokens=5, num_beams=2) == [
            result["translation_text"] for result in self.expected
        ]

    def test_a_column_of_a_data_set_is_read_as_results_are_asked_for(self) -> None:
        rows = KeyDataset(Dataset.from_dict({"text": SENTENCES}), "text")
        results = self.translator(batch_size=2)(rows)
        assert not isinstance(results, list)
        assert tuple(results) == self.expected

    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_several_sequences_of_each_text(self, batch_size: int) -> None:
        results = self.translator(batch_size=batch_size)(SENTENCES, num_return_sequences=2)
        assert [texts[0] for texts in results] == list(self.expected)
        for sentence, texts in zip(SENTENCES, results, strict=True):
            inputs = TOKENIZER(sentence, return_tensors="pt")
            output = MODEL.generate(**inputs, max_new_tokens=5, num_beams=2, num_return_sequences=2)
            expected = TOKENIZER.batch_decode(output, skip_special_tokens=True) if sentence.strip() else ["", ""]
            assert [result["translation_text"] for result in texts] == expected
        assert self.translator()(SENTENCES[0], num_return_sequences=2) == results[0]
        assert self.translator()([SENTENCES[0]], num_return_sequences=2) == [results[0]]
        assert list(self.translator()(iter(SENTENCES), num_return_sequences=2)) == results

    @pytest.mark.parametrize("count", [0, -1, "2", True, 1.5])
    def test_a_number_of_sequences_that_is_none(self, count: Any) -> None:
        with pytest.raises(ValueError, match=f"num_return_sequences needs at least 1, got {count!r}"):
            self.translator()("A man", num_return_sequences=count)

    def test_tokens_in_place_of_texts(self) -> None:
        [result] = self.translator()("A man", return_tensors=True)
        output = MODEL.generate(**TOKENIZER("A man", return_tensors="pt"), max_new_tokens=5, num_beams=2)
        assert result.keys() == {"translation_token_ids"}
        assert torch.equal(result["translation_token_ids"], output[0])
        [both] = self.translator()("A man", return_tensors=True, return_text=True)
        assert torch.equal(both.pop("translation_token_ids"), output[0])
        assert both == self.expected[1]
        with pytest.raises(ValueError, match="return_text=False needs return_tensors=True"):
            self.translator()("A man", return_text=False)

    def test_clean_up_is_for_decoding(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(TOKENIZER, "decode", lambda tokens, **kwargs: str(kwargs["clean_up_tokenization_spaces"]))
        assert self.translator()("A man", clean_up_tokenization_spaces=True) == [{"translation_text": "True"}]
        assert self.translator()("A man") == [{"translation_text": "False"}]

    def test_truncation_of_the_old_pipeline(self) -> None:
        assert self.translator()(SENTENCES[0], truncation=True) == [self.expected[0]]
        with pytest.raises(ValueError, match="what is too long for the model is always cut; leave truncation out"):
            self.translator()(SENTENCES[0], truncation=False)

    @pytest.mark.parametrize("given", [{"max_length": 4}, {"generation_config": GenerationConfig(max_new_tokens=3)}])
    def test_a_limit_of_a_call_wins_over_any_of_the_pipeline(self, given: dict[str, Any]) -> None:
        [result] = self.translator()("A man", **given, num_beams=1)
        assert result["translation_text"] == one_by_one(["A man"], max_new_tokens=3)[0]
        [result] = make_pipeline(TASK, model=MODEL, tokenizer=TOKENIZER, device="cpu", **given)("A man")
        assert result["translation_text"] == one_by_one(["A man"], max_new_tokens=3)[0]

    def test_an_assistant(self) -> None:
        translator = self.translator(assistant_model=MODEL)
        assert translator("A man", num_beams=1) == [{"translation_text": one_by_one(["A man"], max_new_tokens=5)[0]}]

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

    @pytest.mark.parametrize("batch_size", [1, 2])
    def test_paragraphs_loops_and_placeholders(self, batch_size: int) -> None:
        texts = ["A {dog} runs. A man sleeps.\n\nThe dog", "", "A man"]
        ways: dict[str, Any] = {"split": "de", "break_loops": True, "keep_placeholders": True, "max_new_tokens": 12}
        expected = translate(MODEL, TOKENIZER, texts, **ways)
        translator = make_pipeline(TASK, model=MODEL, tokenizer=TOKENIZER, device="cpu", batch_size=batch_size)
        assert [result["translation_text"] for result in translator(texts, **ways)] == expected
        assert translator(texts[0], **ways) == [{"translation_text": expected[0]}]
        assert keeps_placeholders(texts[0], expected[0])
        assert expected[0].count("\n") == 2
        with pytest.raises(ValueError, match="there are texts alone; leave return_tensors out"):
            translator(texts, return_tensors=True, **ways)
        with pytest.raises(ValueError, match="leave num_return_sequences out"):
            translator(texts, num_beams=2, num_return_sequences=2, **ways)
