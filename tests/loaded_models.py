"""Small models of five families, how tests load what `save_packed` wrote of them, and what they compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.quantization_config import NMSparseQuantizationConfig
from hf_nmsparse.sparse_model import finalize, sparsify
from tests.tiny import bart, hf, t5

BART = bart(100, d_model=32, layers=2) | {"forced_eos_token_id": None}
T5 = t5(100, d_model=32, layers=2)
FAMILIES: dict[str, Callable[[], Any]] = {
    "marian": lambda: hf.MarianMTModel(hf.MarianConfig(**BART)),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)),
    "m2m100": lambda: hf.M2M100ForConditionalGeneration(hf.M2M100Config(**BART)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    "t5-untied": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
}
FC1 = "model.encoder.layers.0.fc1"  # [64, 32]: 8 groups of 2:4 a row, 16 values and 3 bytes of codes


def build(family: str = "marian") -> Any:
    torch.manual_seed(0)
    return FAMILIES[family]()


def training(family: str = "marian", pattern: str = "2:4", **rules: Any) -> Any:
    model = build(family)
    sparsify(model, NMSparseConfig(pattern, **rules))
    return model


def logits(model: Any) -> Tensor:
    model.eval()
    ids = torch.tensor([[5, 6, 7, 8, 2], [9, 10, 2, 0, 0]])
    with torch.no_grad():
        output: Tensor = model(
            input_ids=ids, attention_mask=ids.ne(0).long(), decoder_input_ids=torch.tensor([[2, 5, 9], [2, 4, 3]])
        )[0]
    return output


def masked(model: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy of a model in training, masked for good and then cast, as `save_packed` is to write it."""
    twin = copy.deepcopy(model)
    finalize(twin)
    return twin.to(dtype)


def same_files(left: Path, right: Path) -> bool:
    contents = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in (left, right)]
    return contents[0] == contents[1]


def load(path: Path, compute: str = "dense", cls: Any = hf.AutoModelForSeq2SeqLM, **kwargs: Any) -> Any:
    return cls.from_pretrained(path, quantization_config=NMSparseQuantizationConfig(compute=compute), **kwargs)
