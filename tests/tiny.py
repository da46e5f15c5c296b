"""Tiny configurations and a Marian model of them, tokenised pairs of uneven length, and masks as booleans."""

from __future__ import annotations

import json
from typing import Any

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, MarianConfig, MarianMTModel, PreTrainedTokenizerFast

from hf_nmsparse.masks import magnitude_mask, unpack_bits
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.tokenizer import train_tokenizer

VOCABULARY = 300

hf: Any = transformers  # whose configurations take keywords that their signatures do not name


def bart(vocab_size: int, d_model: int, layers: int) -> dict[str, Any]:
    """Settings of a tiny BART, and of what has its shape: Marian, mBART, Pegasus, M2M100."""
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 2 * d_model,
        "decoder_ffn_dim": 2 * d_model,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    }


def t5(vocab_size: int, d_model: int, layers: int) -> dict[str, Any]:
    """Settings of a tiny T5."""
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_kv": d_model // 2,
        "d_ff": 2 * d_model,
        "num_layers": layers,
        "num_heads": 2,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    }


def marian(seed: int = 0, **overrides: Any) -> MarianMTModel:
    """Two layers on each side, d_model 32, no dropout unless asked for: 32 linear layers in its blocks."""
    torch.manual_seed(seed)
    settings = bart(VOCABULARY, d_model=32, layers=2) | {
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "forced_eos_token_id": None,
    }
    return MarianMTModel(MarianConfig(**(settings | overrides)))


def resnet(**overrides: Any) -> Any:
    """A ResNet of images of one channel in ten classes, of two stages if not told otherwise."""
    settings = {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 10}
    return hf.ResNetForImageClassification(hf.ResNetConfig(**(settings | {"layer_type": "basic"} | overrides)))


def kept(weight: Tensor, pattern: NMPattern) -> Tensor:
    """Which weights the magnitude mask keeps, as booleans of their shape."""
    return unpack_bits(magnitude_mask(weight, pattern), weight.shape)


def token_pairs(count: int, seed: int = 0) -> Dataset:
    """Random pairs of 3 to 12 tokens a side, each ending with </s>."""
    generator = torch.Generator().manual_seed(seed)

    def sentence() -> list[int]:
        length = int(torch.randint(2, 12, (), generator=generator))
        return [*torch.randint(3, VOCABULARY, (length,), generator=generator).tolist(), 1]

    return Dataset.from_list([{"input_ids": sentence(), "labels": sentence()} for _ in range(count)])


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few German and English sentences, its padding first, as that of older models."""
    texts = ["Ein Mann schläft im Garten.", "A man sleeps in the garden.", "Der Garten ist groß.", "The garden is big."]
    trained = train_tokenizer(texts * 5, VOCABULARY, max_length=64)
    state = json.loads(trained.backend_tokenizer.to_str())
    moved = {name: place + 1 for name, place in state["model"]["vocab"].items()} | {"<pad>": 0}
    state["model"]["vocab"] = moved
    for token in state["added_tokens"]:
        token["id"] = moved[token["content"]]
    for token in state["post_processor"]["special_tokens"].values():
        token["ids"] = [moved[name] for name in token["tokens"]]
    state["added_tokens"].sort(key=lambda token: token["id"])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        model_max_length=64,
        clean_up_tokenization_spaces=False,
        **trained.special_tokens_map,
    )


def collator(model: MarianMTModel) -> DataCollatorForSeq2Seq:
    """Pads pairs as the recipe does."""
    return DataCollatorForSeq2Seq(tokenizer(), model=model)
