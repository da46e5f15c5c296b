"""Who translates the sources: one model on the native engine or in torch, or several whose probabilities are averaged.

A teacher gives the tokens of texts, so that texts that are too long are found before, and for each text its best
translations, the best first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AutoTokenizer

from hf_nmsparse import Translator
from hf_nmsparse.loading import load_seq2seq
from hf_nmsparse.pipeline import NMTranslationPipeline
from hf_nmsparse.positions import positions_of
from hf_nmsparse.texts import longest_text
from recipes.ensemble import Ensemble


@dataclass(frozen=True)
class Search:
    """How a source is translated.

    Attributes:
        beams: Beam size.
        count: How many translations are wanted.
        batch_size: Sentences of a batch.
        languages: ``src_lang`` and ``tgt_lang``, None for models of one pair.
    """

    beams: int
    count: int
    batch_size: int
    languages: dict[str, str | None]


class Teacher(Protocol):
    """What translates."""

    name: str
    """What it computes with, in words."""
    tokenizer: Any
    longest: float
    """How many tokens of a source it takes."""

    def translate(self, texts: Sequence[str], search: Search) -> list[list[str]]:
        """For each text, none of them blank, its translations."""


class EngineTeacher:
    """One model on the native engine.

    Args:
        model: Its folder, or its name on the Hub.
        compute: As `Translator` takes it.
        threads: The same.

    Raises:
        ValueError: The engine does not run it.
    """

    def __init__(self, model: str, compute: str, threads: int) -> None:
        self._translator = Translator(model, compute=compute, threads=threads)
        self.name = f"the native engine, {threads} thread(s)"
        self.tokenizer = self._translator.tokenizer
        self.longest = self._translator.longest_source

    def translate(self, texts: Sequence[str], search: Search) -> list[list[str]]:
        """As `Teacher`."""
        found = self._translator.translate(
            texts,
            num_beams=search.beams,
            num_return_sequences=search.count,
            batch_size=search.batch_size,
            **search.languages,
        )
        return [[best.text, *(other.text for other in best.alternatives)] for best in found]


class TorchTeacher:
    """One model of transformers, or several as an `Ensemble`.

    Args:
        models: Their folders, or their names on the Hub.
        device: Where they compute.

    Raises:
        ValueError: They have other tokens, or cannot be averaged otherwise.
    """

    def __init__(self, models: Sequence[str], device: torch.device) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(models[0])
        for other in models[1:]:
            if AutoTokenizer.from_pretrained(other).get_vocab() != self.tokenizer.get_vocab():
                raise ValueError(f"teachers: {models[0]} and {other} have other tokens; average models of the same")
        dtype = torch.float32 if device.type == "cpu" else "auto"
        members: list[Any] = [load_seq2seq(model, dtype=dtype).eval().to(device) for model in models]
        model = members[0] if len(members) == 1 else Ensemble(members).eval()
        self.name = f"transformers on {device}" + (f", the mean of {len(members)} models" if len(members) > 1 else "")
        self.longest = min(longest_text(self.tokenizer), positions_of(model.get_encoder()) or float("inf"))
        self._pipeline = NMTranslationPipeline(model=model, tokenizer=self.tokenizer, device=device)

    def translate(self, texts: Sequence[str], search: Search) -> list[list[str]]:
        """As `Teacher`; texts of like length make a batch."""
        order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
        results = self._pipeline(
            [texts[place] for place in order],
            batch_size=search.batch_size,
            num_beams=search.beams,
            num_return_sequences=search.count,
            **search.languages,
        )
        translations: list[list[str]] = [[] for _ in texts]
        for place, rows in zip(order, results, strict=True):
            rows = rows if isinstance(rows, list) else [rows]
            translations[place] = [row["translation_text"] for row in rows]
        return translations


def load_teacher(models: Sequence[str], compute: str, threads: int, device: torch.device) -> Teacher:
    """The engine where it runs the one model that is given and a CPU is to translate, torch otherwise.

    Raises:
        ValueError: A model cannot be loaded, or ``compute`` is asked for and the engine cannot be taken.
    """
    why = None
    if len(models) > 1:
        why = f"the mean of {len(models)} models"
    elif device.type != "cpu":
        why = f"a device of {device.type}"
    else:
        try:
            return EngineTeacher(models[0], compute, threads)
        except ValueError as error:
            why = str(error)
    if compute != "auto":
        raise ValueError(f"compute: {compute!r} is for the native engine, which is not taken for {why}; leave it out")
    try:
        return TorchTeacher(models, device)
    except (OSError, ImportError) as error:
        [reason, *_] = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"teachers: {', '.join(models)}: {reason}") from error
