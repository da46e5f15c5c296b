"""What the table says of each family, tried by a model that is computed from nothing else, against transformers'."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_nmsparse.engine_spec import FAMILIES, Spec, read
from hf_nmsparse.kernels.engine import Activation, Side, TableSlot
from tests.reference_engine import ReferenceModel
from tests.tiny import bart, hf, t5

BART, T5 = bart(40, d_model=16, layers=2), t5(40, d_model=16, layers=2)
BART["max_position_embeddings"] = 48
NAMES = {"m2m_100": "M2M100", "marian": "Marian", "bart": "Bart", "mbart": "MBart", "pegasus": "Pegasus"}

# Family, and the settings in which a case differs from the tiny model.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "marian": ("marian", {}),
    "marian, scaled and swish": ("marian", {"scale_embedding": True, "activation_function": "swish"}),
    "marian, two vocabularies": (
        "marian",
        {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 50, "tie_word_embeddings": False},
    ),
    "marian, two vocabularies and a tied head": (
        "marian",
        {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 50},
    ),
    "marian, 1+3": ("marian", {"encoder_layers": 1, "decoder_layers": 3, "decoder_ffn_dim": 24}),
    "marian, heads": ("marian", {"encoder_attention_heads": 4, "decoder_attention_heads": 1}),
    "bart": ("bart", {}),
    "bart, scaled, tanh": ("bart", {"scale_embedding": True, "activation_function": "gelu_new"}),
    "bart, untied": ("bart", {"tie_word_embeddings": False}),
    "mbart": ("mbart", {}),
    "mbart, scaled": ("mbart", {"scale_embedding": True, "activation_function": "relu"}),
    "pegasus": ("pegasus", {}),
    "pegasus, scaled": ("pegasus", {"scale_embedding": True}),
    "m2m_100": ("m2m_100", {}),
    "m2m_100, padding 1": ("m2m_100", {"pad_token_id": 1, "bos_token_id": 0}),
    "m2m_100, unscaled": ("m2m_100", {"scale_embedding": False}),
    "fsmt": ("fsmt", {}),
    "fsmt, tied": ("fsmt", {"tie_word_embeddings": True, "pad_token_id": 1, "bos_token_id": 0}),
    "fsmt, two vocabularies": ("fsmt", {"src_vocab_size": 44, "tgt_vocab_size": 36}),
    "t5": ("t5", {}),
    "t5 1.1": ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5, gated silu": ("t5", {"feed_forward_proj": "gated-silu"}),
    "t5, few buckets": ("t5", {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 11}),
    "t5, 2+1": ("t5", {"num_decoder_layers": 1, "d_kv": 12, "layer_norm_epsilon": 1e-3}),
    "mt5": ("mt5", {}),
    "umt5": ("umt5", {}),
    "umt5, relu": ("umt5", {"feed_forward_proj": "relu", "relative_attention_max_distance": 20}),
}


def tiny_model(family: str, seed: int = 0, **settings: Any) -> Any:
    """A model of the family whose weights, biases and norms are all random, and so matter."""
    torch.manual_seed(seed)
    name = {"fsmt": "FSMT", "t5": "T5", "mt5": "MT5", "umt5": "UMT5"}.get(family) or NAMES[family]
    base = T5 if family.endswith("t5") else BART
    if family == "fsmt":
        base = BART | {"langs": ["en", "de"], "src_vocab_size": 40, "tgt_vocab_size": 40}
    model = getattr(hf, FAMILIES[family].architecture)(getattr(hf, f"{name}Config")(**(base | settings)))
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "embed_positions" in key and family not in ("bart", "mbart"):
            continue  # sines
        centre = 1.0 if key.endswith(("norm.weight", "layernorm_embedding.weight")) else 0.0
        with torch.no_grad():
            tensor.copy_(centre + 0.3 * torch.randn(tensor.shape))
    return model.eval()


def tensors_of(model: Any) -> dict[str, Tensor]:
    return {**model.state_dict(), **dict(model.named_buffers())}


def reference(spec: Spec, tensors: Mapping[str, Tensor]) -> ReferenceModel:
    """What the specification makes of tensors by their names."""
    weights: dict[Any, Any] = {}
    tables: dict[Any, Tensor] = {}
    for source in spec.weights:
        weight = next(tensors[f"{name}.weight"] for name in source.names if f"{name}.weight" in tensors)
        assert weight.shape == (source.out_features, source.in_features)
        assert source.bias is None or source.bias in tensors or source.bias_may_lack
        bias = None if source.bias is None else tensors.get(source.bias)
        weights[source.side, source.layer, source.slot] = weight, None if bias is None else bias.flatten()
    for table in spec.tables:
        rows = []
        for names, shape in zip(table.names, table.shapes, strict=True):
            found = next((tensors[name].numpy() for name in names if name in tensors), None)
            if found is None:
                assert table.made is not None, names
                found = table.made()
            assert all(size is None or size == got for size, got in zip(shape, found.shape, strict=True))
            rows.append(found)
        built = rows[0] if table.build is None else table.build(*rows)
        assert built.dtype == np.float32
        assert built.flags.c_contiguous
        tables[table.side, table.layer, table.slot] = torch.from_numpy(built)
    return ReferenceModel(spec.config, weights, tables)


def sentence(length: int, seed: int) -> list[int]:
    return [*torch.randint(3, 36, (length - 1,), generator=torch.Generator().manual_seed(seed)).tolist(), 2]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_spec_says_all_that_a_model_computes(case: str) -> None:
    family, settings = CASES[case]
    model = tiny_model(family, **settings)
    ours = reference(read(model.config.to_dict()), tensors_of(model))
    for seed, (source, target) in enumerate([(40, 40), (7, 12), (1, 1)]):
        ids, given = sentence(source, seed), [2, *sentence(target, 9 + seed)[:-1]]
        inputs = {"input_ids": torch.tensor([ids]), "decoder_input_ids": torch.tensor([given])}
        expected = model(**inputs, use_cache=False).logits[0]  # with a cache FSMT lets a prompt see what follows
        assert expected.std() > 0.1
        found = ours.logits(ours.run(ids, Side.ENCODER), given)
        assert (found - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_saved_configuration_says_the_same(case: str, tmp_path: Path) -> None:
    """config.json leaves out what the class fills in, and holds what older settings were made into."""
    family, settings = CASES[case]
    model = tiny_model(family, **settings)
    model.save_pretrained(tmp_path)
    said = read(json.loads((tmp_path / "config.json").read_text()))
    expected = read(model.config.to_dict())
    assert bytes(said.config) == bytes(expected.config)
    assert said.weights == expected.weights


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_file_leaves_out_is_what_transformers_fills_in(family: str) -> None:
    name = {"fsmt": "FSMT", "t5": "T5", "mt5": "MT5", "umt5": "UMT5"}.get(family) or NAMES[family]
    config = getattr(hf, f"{name}Config")()
    expected = {key: getattr(config, key) for key in FAMILIES[family].defaults if key != "vocab_size"}
    if family == "marian":
        expected["decoder_vocab_size"] = None  # filled in with vocab_size, which may be given
    assert {key: value for key, value in FAMILIES[family].defaults.items() if key != "vocab_size"} == expected
    assert FAMILIES[family].defaults["vocab_size"] == config.vocab_size or family == "fsmt"
    assert bytes(read({"model_type": family}).config) == bytes(read(config.to_dict()).config)


@pytest.mark.parametrize("family", ["marian", "pegasus", "m2m_100", "fsmt"])
def test_positions_that_a_file_lacks_are_those_of_transformers(family: str) -> None:
    model = tiny_model(family, d_model=64, max_position_embeddings=512)
    spec, tensors = read(model.config.to_dict()), tensors_of(model)
    [table] = [table for table in spec.tables if table.slot == TableSlot.POSITION and table.side == Side.DECODER]
    assert table.made is not None
    assert table.build is not None
    [name] = [name for name in table.names[0] if name in tensors]
    made, own = table.build(table.made()), table.build(tensors[name].numpy())
    assert made.shape == own.shape == (spec.config.decoder.positions, 64)
    if family in ("marian", "pegasus"):
        assert np.abs(made - own).max() < 1e-7  # one rounding
    else:
        assert np.abs(made - own).max() < 5e-5  # exp in fp32 is off by a bit, and positions multiply that
    assert np.abs(made[:8] - own[:8]).max() < 1e-6


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no family": ({"model_type": "nllb-moe"}, "model_type 'nllb-moe' is none of marian, bart, "),
    "nothing": ({}, "model_type None is none of"),
    "another task": (
        {"model_type": "bart", "architectures": ["BartForSequenceClassification"]},
        "bart: the engine runs BartForConditionalGeneration, got ['BartForSequenceClassification']",
    ),
    "a decoder": ({"model_type": "marian", "is_decoder": True}, "marian: is_decoder is False in models that translate"),
    "activation": (
        {"model_type": "marian", "activation_function": "quick_gelu"},
        "marian: activation_function is one of relu, gelu, ",
    ),
    "no list as activation": ({"model_type": "bart", "activation_function": ["relu"]}, "activation_function is one of"),
    "gate": ({"model_type": "t5", "feed_forward_proj": "doubly-gelu"}, "t5: feed_forward_proj is an activation"),
    "heads": ({"model_type": "bart", "encoder_attention_heads": 5}, "d_model 1024 does not divide into 5 heads"),
    "size": ({"model_type": "bart", "d_model": "wide"}, "bart: d_model is a whole number from 1 on, got 'wide'"),
    "flag": ({"model_type": "bart", "d_model": True}, "d_model is a whole number"),
    "scale": ({"model_type": "bart", "scale_embedding": 1}, "bart: scale_embedding is true or false, got 1"),
    "norms": ({"model_type": "marian", "normalize_before": True}, "marian: normalize_before is False in this family"),
    "no final norm": ({"model_type": "mbart", "add_final_layer_norm": False}, "add_final_layer_norm is True in this"),
    "static positions": ({"model_type": "bart", "static_position_embeddings": True}, "static_position_embeddings is"),
    "aliases": ({"model_type": "bart", "d_model": 64, "hidden_size": 32}, "which say the same and differ"),
    "epsilon": ({"model_type": "t5", "layer_norm_epsilon": 2}, "layer_norm_epsilon is a number between 0 and 1, got 2"),
    "buckets": ({"model_type": "t5", "relative_attention_num_buckets": 31}, "relative_attention_num_buckets is even"),
    "distance": ({"model_type": "t5", "relative_attention_max_distance": 16}, "relative_attention_num_buckets is even"),
    "quantized": (
        {"model_type": "t5", "quantization_config": {"quant_method": "gptq"}},
        "t5: quantization_config of 'gptq' is not ours",
    ),
    "padding": ({"model_type": "m2m_100", "pad_token_id": 1025}, "pad_token_id 1025 leaves no positions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_one_line(case: str) -> None:
    config, message = REFUSED[case]
    with pytest.raises(ValueError, match=r"^engine: ") as error:
        read(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_of_published_models_are_known() -> None:
    """As the configurations of these models on the Hub say it, in the words of older versions."""
    opus = {"model_type": "marian", "architectures": ["MarianMTModel"], "normalize_before": False}
    opus |= {"normalize_embedding": False, "add_final_layer_norm": False, "static_position_embeddings": True}
    opus |= {"d_model": 512, "num_hidden_layers": 6, "encoder_layers": 6, "decoder_layers": 6}
    opus |= {"encoder_attention_heads": 8, "decoder_attention_heads": 8, "encoder_ffn_dim": 2048}
    opus |= {"activation_function": "swish", "scale_embedding": True, "add_bias_logits": False}
    config = read(opus).config
    assert (config.hidden, config.activation, config.encoder.layers) == (512, Activation.SILU, 6)
    assert config.encoder.embedding_scale == pytest.approx(512**0.5)
    nllb = {"model_type": "m2m_100", "architectures": ["M2M100ForConditionalGeneration"], "hidden_size": None}
    assert read(nllb | {"vocab_size": 256206, "num_hidden_layers": 12}).config.target_vocabulary == 256206
    t511 = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    assert read(t511).config.head_scale == 1.0
    assert read({"model_type": "t5"}).config.head_scale == pytest.approx(512**-0.5)


def test_neither_torch_nor_transformers_is_needed() -> None:
    code = (
        "import sys, hf_nmsparse.engine_spec, hf_nmsparse.kernels.engine;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
