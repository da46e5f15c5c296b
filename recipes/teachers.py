"""Who translates the sources: one model, or several whose probabilities are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoTokenizer

from hf_nmsparse.bulk import BulkTranslator, TorchTranslator, load_translator
from hf_nmsparse.loading import load_seq2seq
from recipes.ensemble import Ensemble


def load_teacher(models: Sequence[str], compute: str, threads: int, device: torch.device) -> BulkTranslator:
    """One model as `load_translator` has it, or the mean of several.

    Raises:
        ValueError: A model cannot be loaded, they cannot be averaged, or ``compute`` is asked for and the engine cannot
            be taken.
    """
    if len(models) == 1:
        return load_translator(models[0], compute, threads, str(device))
    if compute != "auto":
        raise ValueError(
            f"compute: {compute!r} is for the native engine, which is not taken for the mean of {len(models)} models; "
            "leave it out"
        )
    try:
        return mean_of(models, device)
    except (OSError, ImportError) as error:
        [reason, *_] = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"teachers: {', '.join(models)}: {reason}") from error


def mean_of(models: Sequence[str], device: torch.device) -> TorchTranslator:
    """Several models of the same tokens as an `Ensemble`.

    Raises:
        ValueError: They have other tokens, or cannot be averaged otherwise.
    """
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    for other in models[1:]:
        if AutoTokenizer.from_pretrained(other).get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"teachers: {models[0]} and {other} have other tokens; average models of the same")
    dtype = torch.float32 if device.type == "cpu" else "auto"
    members: list[Any] = [load_seq2seq(model, dtype=dtype).eval().to(device) for model in models]
    return TorchTranslator(Ensemble(members), tokenizer, f"transformers on {device}, the mean of {len(models)} models")
