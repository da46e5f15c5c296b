"""Marian models for CTranslate2, with the tokens of transformers.

Its converter takes the last token of the vocabulary for the padding and drops it, and the decoder starts from an
embedding of zero. New models of the recipe and OPUS-MT's have it so. For others the rows of the vocabulary are put in
that order: CTranslate2 reads and writes tokens, not ids, so that the tokenizer stays as it is. What the start's
embedding holds goes into the decoder's first position, where the start always stands.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_nmsparse.export_check import Expected, check_same, expected_of, same
from hf_nmsparse.sparsity_record import one_of

__all__ = ["BEAMS", "export_ctranslate2", "vocabulary_of"]

BEAMS = (1, 4)
"""The searches that are compared."""


def export_ctranslate2(
    model: PreTrainedModel, tokenizer: Any, folder: Path, sources: list[list[int]], quantization: str | None = None
) -> dict[int, int]:
    """Writes ``model`` into ``folder`` by CTranslate2's own converter, and checks what comes out.

    Args:
        model: A dense Marian model in fp32, which is changed.
        tokenizer: Its tokenizer.
        folder: A new folder.
        sources: The ids of the sentences that are translated with both.
        quantization: As CTranslate2's converter takes it, such as ``"int8"``; None is fp32.

    Returns:
        By the number of beams, how many sentences the written model translates as transformers does in fp32. Where
        that is in fp32 too these are all.

    Raises:
        ValueError: CTranslate2 does not know the model or the quantization, or its translations are others in fp32.
    """
    from ctranslate2.specs.model_spec import ACCEPTED_MODEL_TYPES

    one_of("quantization", quantization, (None, *ACCEPTED_MODEL_TYPES), where="export")
    names = vocabulary_of(model, tokenizer)
    expected = expected_of(model, sources, BEAMS)
    order = _padding_last(model)
    _start_from_zero(model)
    exact = quantization in (None, "float32")
    with tempfile.TemporaryDirectory() as temporary:
        fp32 = folder if exact else Path(temporary) / "fp32"
        _convert(model, tokenizer, [names[token] for token in order], fp32, None)
        for beams in BEAMS:
            check_same(_translate(fp32, "float32", names, expected, beams), expected, beams, "CTranslate2")
        if not exact:
            _convert(model, tokenizer, [names[token] for token in order], folder, quantization)
    return {
        beams: same(_translate(folder, "default", names, expected, beams), expected.translations[beams])
        for beams in BEAMS
    }


def vocabulary_of(model: PreTrainedModel, tokenizer: Any) -> list[str]:
    """The token of each id.

    Raises:
        ValueError: The tokenizer has none for an id, or one for two.
    """
    names: list[str] = tokenizer.convert_ids_to_tokens(list(range(model.config.vocab_size)))
    lacking = next((token for token, name in enumerate(names) if name is None), None)
    if lacking is not None or len(set(names)) < len(names):
        what = f"no token {lacking}" if lacking is not None else "one text for several tokens"
        raise ValueError(
            f"export: the model has {len(names)} tokens and its tokenizer {what}; give the one that it was trained with"
        )
    return names


@torch.no_grad()
def _padding_last(model: Any) -> list[int]:
    """Moves the padding to the end of the vocabulary; returns the former ids in their new order."""
    padding = model.config.pad_token_id
    order = [*(token for token in range(model.config.vocab_size) if token != padding), padding]
    tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    for table in {id(table): table for table in tables}.values():
        table.copy_(table[order])
    model.final_logits_bias.copy_(model.final_logits_bias[:, order])
    return order


@torch.no_grad()
def _start_from_zero(model: Any) -> None:
    """Adds the embedding that the decoder starts from to its first position: the padding's, which is last now."""
    config, decoder = model.config, model.get_decoder()
    start, padding = config.decoder_start_token_id, config.pad_token_id
    place = config.vocab_size - 1 if start == padding else start - (start > padding)
    decoder.embed_positions.weight[0] += decoder.embed_scale * decoder.embed_tokens.weight[place]


def _convert(model: Any, tokenizer: Any, names: list[str], folder: Path, quantization: str | None) -> None:
    """Runs CTranslate2's converter on a model in memory; ``names`` are its tokens, the padding last."""
    from ctranslate2.converters import TransformersConverter

    vocabulary = {name: place for place, name in enumerate([*names[:-1], "<pad>"])}  # by this name it knows the padding
    shown = SimpleNamespace(
        eos_token=tokenizer.eos_token, unk_token=tokenizer.unk_token or "<unk>", get_vocab=lambda: vocabulary
    )
    with tempfile.TemporaryDirectory() as settings:
        model.config.save_pretrained(settings)
        converter: Any = TransformersConverter(settings)
        converter.load_model = lambda *_, **__: model
        converter.load_tokenizer = lambda *_, **__: shown
        try:
            converter.convert(str(folder), quantization=quantization, force=True)
        except (KeyError, NotImplementedError, RuntimeError, ValueError) as error:
            raise ValueError(f"export: CTranslate2 does not convert this model: {str(error).strip()}") from error


def _translate(folder: Path, compute: str, names: list[str], expected: Expected, beams: int) -> list[list[int]]:
    """The new ids of each sentence; on one thread, since CTranslate2's and torch's are not made for one process."""
    import ctranslate2

    places = {name: token for token, name in enumerate(names)}
    translator = ctranslate2.Translator(str(folder), compute_type=compute, inter_threads=1, intra_threads=1)
    found = translator.translate_batch(
        [[names[token] for token in source] for source in expected.sources],
        beam_size=beams,
        length_penalty=0,
        max_decoding_length=expected.length,
        min_decoding_length=0,
        max_batch_size=64,
    )
    return [[places[token] for token in result.hypotheses[0]] for result in found]
