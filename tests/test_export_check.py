"""What is compared before a model goes to another tool."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, GenerationConfig

from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.export_check import SENTENCES, Expected, as_dense, check_marian, check_same, expected_of, same
from hf_nmsparse.saving import export_dense, save_packed
from hf_nmsparse.sparse_model import sparsify
from tests import packed_models, tiny


def expected(translations: list[list[int]]) -> Expected:
    return Expected([[5, 1]] * len(translations), 8, start=0, end=1, padding=0, translations={1: translations})


@pytest.mark.parametrize("form", ["training", "fp32", "bf16", "int8"])
def test_as_dense_is_what_export_dense_writes(form: str, tmp_path: Path) -> None:
    model = tiny.marian()
    sparsify(model, NMSparseConfig("2:4"))
    if form == "training":
        model.save_pretrained(tmp_path / "model")
    else:
        save_packed(model, tmp_path / "model", form)
    export_dense(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model"), tmp_path / "dense")
    stock = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).state_dict()
    dense = as_dense(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model", dtype=torch.float32))
    assert not hasattr(dense.config, "quantization_config")
    assert {type(module) for module in dense.modules() if "Linear" in type(module).__name__} == {nn.Linear}
    assert stock.keys() == dense.state_dict().keys()
    assert all(torch.equal(tensor, stock[key]) for key, tensor in dense.state_dict().items())


def test_translations_hold_no_special_token_and_settings_of_the_model_do_not_count() -> None:
    model = tiny.marian(init_std=0.5)
    model.generation_config = GenerationConfig(max_length=3, num_beams=2, no_repeat_ngram_size=1)
    model.generation_config.decoder_start_token_id = 0
    found = expected_of(model, [[5, 6, 1], [7, 1]], (1, 4))
    assert found.translations.keys() == {1, 4}
    assert (found.start, found.end, found.padding, found.length) == (0, 1, 0, 63)
    for rows in found.translations.values():
        assert max(map(len, rows)) > 3
        assert not any({0, 1} & set(row) for row in rows)


def test_a_difference_is_an_error_that_shows_the_first() -> None:
    check_same([[3, 4], [5]], expected([[3, 4], [5]]), 1, "tool")
    assert same([[3, 4], [6]], [[3, 4], [5]]) == 1
    told = r"tool translates 1 of 2 sentences greedily otherwise .* number 2, .* tokens \[6\] and transformers \[5\]"
    with pytest.raises(ValueError, match=told):
        check_same([[3, 4], [6]], expected([[3, 4], [5]]), 1, "tool")


def test_only_marian_with_one_vocabulary() -> None:
    check_marian(tiny.marian(), "onnx")
    with pytest.raises(ValueError, match=r"--for onnx writes Marian models, .* this one is bart; without --for"):
        check_marian(packed_models.BUILDERS["bart"](), "onnx")
    two = tiny.marian(share_encoder_decoder_embeddings=False, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="needs one vocabulary for source and target, and this model has two"):
        check_marian(two, "ctranslate2")


def test_sentences_differ() -> None:
    assert len(set(SENTENCES)) == len(SENTENCES) == 16
