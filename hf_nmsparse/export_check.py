"""Whether a model in the format of another tool translates as it does in transformers, token by token.

Both compute in fp32, where nothing is rounded but sums. What tools do differently by design is set alike: beams are
ranked by the sum of log-probabilities alone, since not all count the end of a sentence to its length, and the search
ends as soon as there are as many finished translations as beams. One thing stays: transformers forbids the padding
after the softmax, and CTranslate2 has none, so that beams of a model that has not learnt to leave it out may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from hf_nmsparse.layers import NMLayer

__all__ = ["SENTENCES", "Expected", "as_dense", "check_marian", "check_same", "expected_of", "same"]

SENTENCES = (
    "Hello.",
    "A man sleeps in the garden.",
    "Two young girls in red coats are playing with a large dog on the beach.",
    "The device is not connected.",
    "Why did nobody tell me that the train leaves at 7:45?",
    "She bought three apples, two pears and a loaf of bread for €12.50.",
    "Select the sensors that you want to monitor, and then press the button on the right-hand side.",
    "“I don't know,” he said, “but I will find out.”",
    "In 1989 about 1,500 people lived in the village; today there are fewer than 300 of them.",
    "The quick brown fox jumps over the lazy dog while the cat watches from the roof of the old house.",
    "Parliament is expected to vote on the new law before the end of the year.",
    "Please wait",
    "Water boils at 100 °C (212 °F).",
    "A woman with a camera takes a picture of children who are standing in front of a fountain in the city.",
    "It was raining, so we stayed at home and read.",
    "https://example.org/index.html",
)
"""What is translated where the user gives no sentences."""

_LONGEST = 64  # new tokens of a sentence: whatever differs does so before
_BATCH = 64


@dataclass(frozen=True)
class Expected:
    """What transformers makes of some sentences.

    Attributes:
        sources: The ids of each sentence.
        length: The most new tokens of a translation, its end included.
        start: The token that the decoder starts from.
        end: The token that ends a sentence.
        padding: The padding, which no translation holds.
        translations: By the number of beams, the new ids of each sentence, up to its end.
    """

    sources: list[list[int]]
    length: int
    start: int
    end: int
    padding: int
    translations: dict[int, list[list[int]]]


def as_dense(model: PreTrainedModel) -> PreTrainedModel:
    """Makes ``model`` an ordinary dense one, in place: what is packed unpacked, what trains masked.

    Args:
        model: One that was loaded in fp32: positions that are computed would else stay rounded.
    """
    for module in [module for module in model.modules() if isinstance(module, NMLayer)]:
        module.finalize()
        module.to_stock()
    if getattr(model, "hf_quantizer", None) is not None:
        model.dequantize()
    model.config.__dict__.pop("quantization_config", None)
    dense: PreTrainedModel = model.eval()
    return dense


def check_marian(model: PreTrainedModel, tool: str) -> None:
    """Refuses what the export for ``tool`` does not know.

    Raises:
        ValueError: The model is no Marian, or source and target have vocabularies of their own.
    """
    config: Any = model.config
    if config.model_type != "marian":
        raise ValueError(
            f"export: --for {tool} writes Marian models, which the recipe trains, and this one is {config.model_type}; "
            "without --for it becomes a dense one for the tool's own converter"
        )
    if not config.share_encoder_decoder_embeddings:
        raise ValueError(
            f"export: --for {tool} needs one vocabulary for source and target, and this model has two; without --for "
            "it becomes a dense one for the tool's own converter"
        )


@torch.inference_mode()
def expected_of(model: PreTrainedModel, sources: Sequence[Sequence[int]], beams: Sequence[int]) -> Expected:
    """Translates ``sources``, ids of sentences, in transformers.

    Args:
        model: A dense Marian model.
        sources: No sentence longer than the model has positions.
        beams: The numbers of beams; 1 is greedy.
    """
    config: Any = model.config
    length = min(_LONGEST, config.max_position_embeddings - 1)
    rows = [list(source) for source in sources]
    translations = {}
    for count in beams:
        found: list[list[int]] = []
        for first in range(0, len(rows), _BATCH):
            found += _generate(model, rows[first : first + _BATCH], count, length)
        translations[count] = found
    start, end, padding = config.decoder_start_token_id, config.eos_token_id, config.pad_token_id
    return Expected(rows, length, start, end, padding, translations)


def _generate(model: Any, rows: list[list[int]], beams: int, length: int) -> list[list[int]]:
    config = model.config
    model.generation_config = GenerationConfig(
        num_beams=beams,
        **({"early_stopping": True, "length_penalty": 0.0} if beams > 1 else {}),
        max_new_tokens=length,
        do_sample=False,
        bad_words_ids=[[config.pad_token_id]],
        decoder_start_token_id=config.decoder_start_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    ids = torch.full((len(rows), max(map(len, rows))), config.pad_token_id)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
    found = type(model).generate(model, ids, attention_mask=mask)  # its own may be the engine's
    ends = (config.eos_token_id, config.pad_token_id)
    return [[token for token in row if token not in ends] for row in found[:, 1:].tolist()]


def same(found: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> int:
    """How many translations are the same."""
    return sum(list(ours) == list(theirs) for ours, theirs in zip(found, expected, strict=True))


def check_same(found: Sequence[Sequence[int]], expected: Expected, beams: int, tool: str) -> None:
    """Refuses what ``tool`` translates otherwise than transformers.

    Raises:
        ValueError: It does.
    """
    theirs = expected.translations[beams]
    if same(found, theirs) == len(theirs):
        return
    place = next(place for place, row in enumerate(theirs) if list(found[place]) != row)
    how = "greedily" if beams == 1 else f"with {beams} beams"
    raise ValueError(
        f"export: {tool} translates {len(theirs) - same(found, theirs)} of {len(theirs)} sentences {how} otherwise "
        f"than transformers, both in fp32; of the first, number {place + 1}, it makes the tokens "
        f"{list(found[place])[:12]} and transformers {theirs[place][:12]}; nothing is written"
    )
