"""Marian models for ONNX, in the three files that optimum reads, with the tokens of transformers.

``encoder_model.onnx`` encodes. ``decoder_model.onnx`` takes the first tokens of a translation and gives the logits,
and keys and values of each layer; ``decoder_with_past_model.onnx`` takes those with the next token, and gives the keys
and values of the decoder alone, since the encoder's stay. Names of inputs and outputs are optimum's.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from hf_nmsparse.export_check import Expected, check_same, expected_of, same
from hf_nmsparse.sparsity_record import one_of

__all__ = ["ENCODER", "FIRST", "NEXT", "Run", "export_onnx", "greedy", "sessions"]

ENCODER, FIRST, NEXT = "encoder_model", "decoder_model", "decoder_with_past_model"
"""The three files, without ``.onnx``."""

Run = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Runs one file: arrays by the names of its inputs to arrays by the names of its outputs."""


def export_onnx(model: PreTrainedModel, folder: Path, sources: list[list[int]], quantization: str | None = None) -> int:
    """Writes ``model`` into ``folder``, and checks in onnxruntime what comes out.

    Args:
        model: A dense Marian model in fp32, whose attention is set to the plain one.
        folder: A folder that is there.
        sources: The ids of the sentences that are translated with both, greedily.
        quantization: ``"int8"`` rounds weights to int8 and activations as it computes; None is fp32.

    Returns:
        How many sentences the written model translates as transformers does in fp32. In fp32 these are all.

    Raises:
        ValueError: The quantization is unknown, or the translations are others in fp32.
    """
    one_of("quantization", quantization, (None, "int8"), where="export")
    settings = model.generation_config
    expected = expected_of(model, sources, (1,))
    model.generation_config = settings
    with tempfile.TemporaryDirectory() as temporary:
        fp32 = folder if quantization is None else Path(temporary)
        _write(model, fp32)
        found = greedy(sessions(fp32), expected)
        check_same(found, expected, 1, "onnxruntime")
        if quantization is not None:
            _round(fp32, folder)
            found = greedy(sessions(folder), expected)
    model.config.save_pretrained(folder)
    if settings is not None:
        settings.save_pretrained(folder)
    return same(found, expected.translations[1])


class _Encoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.get_encoder()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """fp32 ``[batch, source, d]`` of tokens ``[batch, source]``."""
        states: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return states


class _Decoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, encoder_attention_mask: Tensor, input_ids: Tensor, encoder_hidden_states: Tensor) -> list[Tensor]:
        """The logits ``[batch, target, vocabulary]``, then of each layer keys and values, its own and the encoder's."""
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        logits = _decode(self.model, encoder_attention_mask, input_ids, encoder_hidden_states, cache)
        pairs = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
        return [logits, *_tensors(layer for pair in pairs for layer in pair)]


class _DecoderWithPast(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, encoder_attention_mask: Tensor, input_ids: Tensor, *past: Tensor) -> list[Tensor]:
        """The logits ``[batch, 1, vocabulary]``, then of each layer its own keys and values, those of before first."""
        layers = [past[start : start + 4] for start in range(0, len(past), 4)]
        own, encoders = ([layer[part : part + 2] for layer in layers] for part in (0, 2))
        cache = EncoderDecoderCache(DynamicCache(own), DynamicCache(encoders))
        # Nothing reads these but for their shape: keys and values of the encoder are there.
        states = past[0].new_zeros(1).expand(*encoder_attention_mask.shape, self.model.config.d_model)
        logits = _decode(self.model, encoder_attention_mask, input_ids, states, cache)
        return [logits, *_tensors(cache.self_attention_cache.layers)]


def _tensors(layers: Iterable[Any]) -> list[Tensor]:
    """Keys and values of parts of a cache."""
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


def _decode(model: Any, mask: Tensor, tokens: Tensor, states: Tensor, cache: EncoderDecoderCache) -> Tensor:
    logits: Tensor = model(
        encoder_outputs=(states,),
        attention_mask=mask,
        decoder_input_ids=tokens,
        past_key_values=cache,
        use_cache=True,
    ).logits
    return logits


def _write(model: Any, folder: Path) -> None:
    """Writes the three files."""
    config = model.config
    layers, heads = config.decoder_layers, config.decoder_attention_heads
    batch, source, target, past = (
        Dim(name) for name in ("batch_size", "encoder_sequence_length", "decoder_sequence_length", "past_length")
    )
    # Sizes differ wherever they may: torch.export takes equal ones for the same.
    tokens, mask, first, following = (torch.ones(2, length, dtype=torch.long) for length in (7, 7, 3, 1))
    states = torch.zeros(2, 7, config.d_model)
    caches = [torch.zeros(2, heads, n, config.d_model // heads) for _ in range(layers) for n in (3, 3, 7, 7)]
    cache_shapes = tuple({0: batch, 2: n} for _ in range(layers) for n in (past, past, source, source))
    whole = {0: batch, 1: source}

    def names(word: str, sides: tuple[str, ...]) -> list[str]:
        return [
            f"{word}.{layer}.{side}.{kind}" for layer in range(layers) for side in sides for kind in ("key", "value")
        ]

    both = ("decoder", "encoder")
    parts: list[tuple[str, nn.Module, tuple[Any, ...], Any, list[str], list[str]]] = [
        (
            ENCODER,
            _Encoder(model),
            (tokens, mask),
            (whole, whole),
            ["input_ids", "attention_mask"],
            ["last_hidden_state"],
        ),
        (
            FIRST,
            _Decoder(model),
            (mask, first, states),
            (whole, {0: batch, 1: target}, whole),
            ["encoder_attention_mask", "input_ids", "encoder_hidden_states"],
            ["logits", *names("present", both)],
        ),
        (
            NEXT,
            _DecoderWithPast(model),
            (mask, following, *caches),
            (whole, {0: batch}, cache_shapes),
            ["encoder_attention_mask", "input_ids", *names("past_key_values", both)],
            ["logits", *names("present", ("decoder",))],
        ),
    ]
    model.set_attn_implementation("eager")  # the other asks in Python whether there is one token or more
    with torch.no_grad(), _quiet():
        for name, module, given, shapes, inputs, outputs in parts:
            torch.onnx.export(
                module.eval(),
                given,
                str(folder / f"{name}.onnx"),
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=shapes,
                dynamo=True,
                external_data=False,
                verbose=False,
            )


def _round(source: Path, target: Path) -> None:
    """Writes the files once more with int8 weights, a scale for each column."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        for name in (ENCODER, FIRST, NEXT):
            quantize_dynamic(
                source / f"{name}.onnx", target / f"{name}.onnx", per_channel=True, weight_type=QuantType.QInt8
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to itself what torch and onnxruntime say of packages that are not needed here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def sessions(folder: Path, threads: int = 1) -> dict[str, Run]:
    """What runs each of the files in a folder, in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1

    def run_of(name: str) -> Run:
        session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), options, ["CPUExecutionProvider"])
        outputs = [output.name for output in session.get_outputs()]
        return lambda given: dict(zip(outputs, session.run(outputs, dict(given)), strict=True))

    return {name: run_of(name) for name in (ENCODER, FIRST, NEXT)}


def greedy(runs: Mapping[str, Run], task: Expected, batch: int = 64) -> list[list[int]]:
    """Translates greedily with what runs the three files, whichever tool that is.

    Args:
        runs: What runs each file, by its name.
        task: The sentences, special tokens and length; not its translations.
        batch: Sentences at once, sorted by length.

    Returns:
        The new ids of each sentence, up to its end.
    """
    places = sorted(range(len(task.sources)), key=lambda place: -len(task.sources[place]))
    found: dict[int, list[int]] = {}
    for start in range(0, len(places), batch):
        now = places[start : start + batch]
        found |= zip(now, _greedy(runs, task, [task.sources[place] for place in now]), strict=True)
    return [found[place] for place in range(len(places))]


def _greedy(runs: Mapping[str, Run], task: Expected, rows: list[list[int]]) -> list[list[int]]:
    ids = np.full((len(rows), max(map(len, rows))), task.padding, dtype=np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
    mask = (np.arange(ids.shape[1]) < np.array([[len(row)] for row in rows])).astype(np.int64)
    states = runs[ENCODER]({"input_ids": ids, "attention_mask": mask})["last_hidden_state"]
    token = np.full((len(rows), 1), task.start, dtype=np.int64)
    given = {"encoder_attention_mask": mask, "input_ids": token}
    made = runs[FIRST](given | {"encoder_hidden_states": states})
    tokens = np.full((len(rows), task.length), task.end)
    open_ = np.ones(len(rows), dtype=bool)
    cache: dict[str, Any] = {}
    for step in range(task.length):
        if step:
            made = runs[NEXT](given | cache)
        cache |= {name.replace("present", "past_key_values"): made[name] for name in made if name != "logits"}
        logits = np.array(made["logits"][:, -1])
        logits[:, task.padding] = -np.inf
        tokens[open_, step] = logits[open_].argmax(-1)
        open_ &= tokens[:, step] != task.end
        if not open_.any():
            break
        given["input_ids"] = tokens[:, step, None].copy()
    return [row[: row.index(task.end)] if task.end in row else row for row in tokens.tolist()]
