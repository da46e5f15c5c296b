"""What a checkpoint lacks is an error, and no random weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_nmsparse import NMSparseConfig, save_packed, sparsify
from hf_nmsparse.loading import load_seq2seq
from tests.tiny import hf, marian, t5


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    """A dense checkpoint."""
    marian().save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def test_a_whole_checkpoint_is_loaded_as_from_pretrained_does(stock: Path, tmp_path: Path) -> None:
    expected = hf.AutoModelForSeq2SeqLM.from_pretrained(stock).state_dict()
    found = load_seq2seq(str(stock), dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
    model = marian()
    sparsify(model, NMSparseConfig("2:4"))
    save_packed(model, tmp_path / "packed")
    assert load_seq2seq(str(tmp_path / "packed")).config.quantization_config.format == "packed"


@pytest.mark.parametrize("lost", ["model.decoder.", "model.encoder.layers.1.", "model.encoder.layers.0.fc1.b"])
def test_what_is_missing_is_told_of(stock: Path, lost: str) -> None:
    tensors = load_file(stock / "model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(lost)}
    save_file(kept, stock / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"{lost}\S* (and \d+ more tensors are|is) missing; save the whole model again$"
    ):
        load_seq2seq(str(stock))


def test_all_of_those_that_are_tied_are_missing_together(stock: Path) -> None:
    tensors = load_file(stock / "model.safetensors")
    del tensors["model.shared.weight"]
    save_file(tensors, stock / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head.weight and 3 more tensors are missing"):
        load_seq2seq(str(stock))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_wrappers_prefix_is_named(stock: Path, prefix: str) -> None:
    tensors = {prefix + key: tensor for key, tensor in load_file(stock / "model.safetensors").items()}
    save_file(tensors, stock / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"missing: the keys begin with '{prefix.partition('.')[0]}\.'"):
        load_seq2seq(str(stock))


def test_an_encoder_alone_is_no_translation_model(tmp_path: Path) -> None:
    settings: dict[str, Any] = t5(100, d_model=32, layers=1)
    hf.T5EncoderModel(hf.T5Config(**settings)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"decoder\.\S+ and \d+ more tensors are missing"):
        load_seq2seq(str(tmp_path))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["model.encoder.layers.0.fc1.weight", "model.shared.weight", "final_logits_bias"])
def test_what_is_no_number_is_told_of(stock: Path, key: str, number: float) -> None:
    tensors = load_file(stock / "model.safetensors")
    tensors[key].view(-1)[3] = number
    save_file(tensors, stock / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"^[^\n]*{key} holds NaN or infinity; take an earlier checkpoint$"):
        load_seq2seq(str(stock))


@pytest.mark.parametrize("form", ["stock", "packed", "training"])
def test_layers_that_the_configuration_does_not_count_are_told_of(form: str, tmp_path: Path) -> None:
    model = marian()
    if form != "stock":
        sparsify(model, NMSparseConfig("2:4"))
    (save_packed if form == "packed" else type(model).save_pretrained)(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"decoder_layers": 1}))
    with pytest.raises(ValueError, match=r"^[^\n]+: model.decoder.layers has 2 layers here and 1 by config.json; "):
        load_seq2seq(str(tmp_path))
    if form != "stock":
        for cls in (hf.AutoModel, hf.MarianMTModel):
            with pytest.raises(ValueError, match=r"decoder.layers has 2 layers here and 1 by config.json"):
                cls.from_pretrained(tmp_path)
