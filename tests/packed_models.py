"""Tiny sparse models of four families and what the tests of packed files ask of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.packed_format import check_int8, check_weight
from hf_nmsparse.packing import stored
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.sparse_model import sparsify
from tests.tiny import bart, hf, marian, t5

BART, T5 = bart(60, d_model=16, layers=1), t5(60, d_model=16, layers=1)
UNTIED: dict[str, Any] = {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}
BUILDERS: dict[str, Any] = {
    "marian": marian,
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)),
    "m2m100": lambda: hf.M2M100ForConditionalGeneration(hf.M2M100Config(**BART)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    "t5 untied": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, **UNTIED)),
}


def sparse(family: str = "marian", pattern: str = "2:4", **rules: Any) -> Any:
    """A model in training, in evaluation mode."""
    torch.manual_seed(0)
    model = BUILDERS[family]()
    sparsify(model, NMSparseConfig(pattern, **rules))
    return model.eval()


@torch.no_grad()
def output(model: Any) -> Tensor:
    """Logits of a translation model, hidden states of its base model."""
    result = model(input_ids=torch.tensor([[5, 6, 7, 2]]), decoder_input_ids=torch.tensor([[2, 8, 9]]))
    first: Tensor = result[0]
    return first


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def check_tensors(
    values: Tensor,
    codes: Tensor,
    pattern: NMPattern,
    dtype: str,
    shape: tuple[int, int] | None = None,
    name: str = "layer",
    file: str = "file",
    scale: Tensor | None = None,
) -> None:
    """`check_weight` on what a file would hold of these tensors."""
    held = None if scale is None else stored(scale, file)
    check_weight(stored(values, file), stored(codes, file), pattern, dtype, shape, name, held)


def check_int8_tensors(values: Tensor, scale: Tensor | None, name: str = "layer", file: str = "file") -> None:
    check_int8(stored(values, file), None if scale is None else stored(scale, file), name)
