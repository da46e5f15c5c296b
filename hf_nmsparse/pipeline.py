"""Text in, text out: `translate`, and the pipeline task ``nmt-translation`` over it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSeq2SeqLM, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import logging

__all__ = ["TASK", "NMTranslationPipeline", "translate"]

logger = logging.get_logger(__name__)

TASK = "nmt-translation"
"""The name that ``transformers.pipeline`` takes; importing this module registers it."""

DEFAULT_MAX_NEW_TOKENS = 256
"""Where neither the caller nor the model sets a limit: transformers would stop after 20 tokens."""


def translate(
    model: Any,
    tokenizer: Any,
    sentences: Sequence[str],
    batch_size: int = 64,
    *,
    src_lang: str | None = None,
    tgt_lang: str | None = None,
    **generate_kwargs: Any,
) -> list[str]:
    """Translates sentences in their order.

    Batches hold sentences of like length, the longest first, so that little is computed for padding. A blank sentence
    has a blank translation. What is too long for the model is cut to its limit and logged.

    Args:
        model: An encoder-decoder model; it runs in evaluation mode and without gradients, on the device where it is.
        tokenizer: Its tokenizer.
        sentences: Texts of one sentence each.
        batch_size: Sentences in a batch.
        src_lang: Language code of the source as the tokenizer spells it, such as ``"eng_Latn"``. Multilingual only.
        tgt_lang: The same of the target: its code is forced as the first token.
        **generate_kwargs: For ``model.generate``, such as ``num_beams`` and ``max_new_tokens``. What is left out comes
            from the model's generation config.

    Returns:
        One translation for each sentence.

    Raises:
        ValueError: The model is no encoder-decoder, a sentence is no text, or a language is unknown or missing.
    """
    if not getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"translate: {type(model).__name__} is no encoder-decoder model; load a translation model")
    if isinstance(sentences, str):
        raise ValueError("translate: expected a list of texts, got one text; put it into a list")
    for index, sentence in enumerate(sentences):
        if not isinstance(sentence, str):
            raise ValueError(f"translate: sentence {index} is no text but {type(sentence).__name__}")
    if batch_size < 1:
        raise ValueError(f"translate: batch_size needs at least 1, got {batch_size!r}")
    generate_kwargs = _generation(model, tokenizer, tgt_lang, generate_kwargs)
    translations = [""] * len(sentences)
    todo = [index for index, sentence in enumerate(sentences) if sentence.strip()]
    with _source_language(tokenizer, src_lang):
        tokens = _encode(model, tokenizer, [sentences[index] for index in todo])
    longest_first = sorted(range(len(todo)), key=lambda position: -len(tokens[position]))
    training = model.training
    model.eval()
    try:
        for start in range(0, len(todo), batch_size):
            batch = longest_first[start : start + batch_size]
            texts = _generate(model, tokenizer, [tokens[position] for position in batch], generate_kwargs)
            for position, text in zip(batch, texts, strict=True):
                translations[todo[position]] = text
    finally:
        model.train(training)
    return translations


def _generate(model: Any, tokenizer: Any, tokens: list[Tensor], generate_kwargs: dict[str, Any]) -> list[str]:
    """Translates one batch of token sequences."""
    input_ids = pad_sequence(tokens, batch_first=True, padding_value=tokenizer.pad_token_id)  # [batch, source]
    attention_mask = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
    output = model.generate(
        input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device), **generate_kwargs
    )  # [batch, target]
    texts: list[str] = tokenizer.batch_decode(output, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return texts


def _encode(model: Any, tokenizer: Any, sentences: list[str]) -> list[Tensor]:
    """Token indices of each sentence, cut to what tokenizer and model can take."""
    if not sentences:
        return []
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or float("inf"))
    encoded = tokenizer(sentences, verbose=False)["input_ids"]
    too_long = [index for index, row in enumerate(encoded) if len(row) > limit]
    if too_long:
        logger.warning(f"translate: {len(too_long)} of {len(sentences)} sentences were cut to {limit} tokens")
    for index in too_long:
        encoded[index] = tokenizer(sentences[index], truncation=True, max_length=limit)["input_ids"]
    return [torch.tensor(row) for row in encoded]


def _generation(model: Any, tokenizer: Any, tgt_lang: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of ``generate``: ``given``, with a length limit and the target language."""
    if given.get("num_return_sequences", 1) != 1:
        raise ValueError("translate: one translation a sentence; leave num_return_sequences out")
    kwargs = dict(given)
    config = model.generation_config
    forced = kwargs.get("forced_bos_token_id", config.forced_bos_token_id)
    if tgt_lang is not None:
        forced = kwargs["forced_bos_token_id"] = _language_id(tokenizer, "tgt_lang", tgt_lang)
    starts_plainly = model.config.decoder_start_token_id in (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    if _languages(tokenizer) and forced is None and starts_plainly:
        raise ValueError("translate: this model translates into several languages; name one with tgt_lang")
    if kwargs.get("max_new_tokens") is None and kwargs.get("max_length") is None:
        if config.max_new_tokens is not None or config.max_length is not None:
            return kwargs
        positions = getattr(model.config, "max_position_embeddings", None) or DEFAULT_MAX_NEW_TOKENS + 1
        kwargs["max_new_tokens"] = min(DEFAULT_MAX_NEW_TOKENS, positions - 1)
    # Only one of the two limits goes to generate, or it warns when the model's own configuration holds the other.
    # The decoder's start token counts in max_length.
    if kwargs.get("max_new_tokens") is not None:
        kwargs["max_length"] = kwargs["max_new_tokens"] + 1
    return {**kwargs, "max_new_tokens": None}


def _languages(tokenizer: Any) -> dict[str, str]:
    """The token of each language, by its code; empty where texts carry none.

    M2M100 writes "en" as "__en__"; with mBART and NLLB the code is the token; FSMT has ``src_lang`` without any.
    """
    if not hasattr(tokenizer, "src_lang"):
        return {}
    tokens = getattr(tokenizer, "lang_code_to_token", None)
    return tokens or {code: code for code in map(str, tokenizer.extra_special_tokens)}


def _language_id(tokenizer: Any, name: str, language: str) -> int:
    """The index of a language's token.

    Raises:
        ValueError: The tokenizer has no languages, or not this one.
    """
    languages = _languages(tokenizer)
    if not languages:
        raise ValueError(f"translate: this model has one pair of languages; leave out {name}, got {language!r}")
    if language not in languages:
        examples = [code for code in languages if code[:2] == language[:2]] or list(languages)[:5]
        raise ValueError(
            f"translate: {name} {language!r} is none of the {len(languages)} languages here, such as "
            f"{', '.join(examples)}"
        )
    index: int = tokenizer.convert_tokens_to_ids(languages[language])
    return index


@contextmanager
def _source_language(tokenizer: Any, src_lang: str | None) -> Iterator[None]:
    """Sets the language of the source while texts are encoded; the tokenizer keeps it as a state of its own."""
    if src_lang is None:
        yield
        return
    _language_id(tokenizer, "src_lang", src_lang)
    previous = tokenizer.src_lang
    tokenizer.src_lang = src_lang
    try:
        yield
    finally:
        tokenizer.src_lang = previous


class NMTranslationPipeline(Pipeline):
    """The pipeline ``pipeline("nmt-translation", model=...)``: texts to ``{"translation_text": ...}``.

    One text gives a list of one dictionary and a list gives a list; a generator is consumed as its results are
    asked for. Arguments of `translate` may be given when it is built and in every call.
    """

    _load_tokenizer = True  # type: ignore[assignment]

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Translates a text, a sequence of texts, or an iterator of texts.

        Args:
            inputs: What to translate.
            *args: None are known.
            **kwargs: ``batch_size``, ``src_lang``, ``tgt_lang`` and arguments of ``generate`` such as ``num_beams``.

        Raises:
            ValueError: As `translate` raises it.
        """
        if isinstance(inputs, str):
            inputs = [inputs]
        elif isinstance(inputs, Sequence):
            inputs = list(inputs)
        elif isinstance(inputs, Iterator):
            inputs = (text for text in inputs)
        # Pipeline looks at the first element.
        return super().__call__(inputs, *args, **kwargs) if inputs != [] else []

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, kwargs, {}

    def preprocess(self, input_: Any, **preprocess_parameters: Any) -> dict[str, Any]:
        """Checks one text. Encoding waits for the batch."""
        if not isinstance(input_, str):
            raise ValueError(f"{TASK}: expected a text, got {type(input_).__name__}")
        return {"text": input_}

    def _forward(self, input_tensors: dict[str, Any], **forward_parameters: Any) -> Any:
        texts = input_tensors["text"]  # one text, or a list of them with batch_size above 1
        batch = [texts] if isinstance(texts, str) else texts
        translations = translate(self.model, self.tokenizer, batch, batch_size=len(batch), **forward_parameters)
        return {"text": translations[0] if isinstance(texts, str) else translations}

    def postprocess(self, model_outputs: Any, **postprocess_parameters: Any) -> dict[str, str]:
        """The result of one text."""
        return {"translation_text": model_outputs["text"]}


def _register() -> None:
    if TASK in PIPELINE_REGISTRY.supported_tasks:
        return
    PIPELINE_REGISTRY.register_pipeline(
        TASK, pipeline_class=NMTranslationPipeline, pt_model=AutoModelForSeq2SeqLM, type="text"
    )
    # With this attribute save_pretrained would copy this file into the model's folder, which would then load only
    # with trust_remote_code.
    del NMTranslationPipeline._registered_impl  # type: ignore[attr-defined]


_register()
