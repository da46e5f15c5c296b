"""Text in, text out: `translate`, and the pipeline task ``nmt-translation`` over it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from hf_nmsparse.generation_settings import DEFAULT_MAX_NEW_TOKENS
from hf_nmsparse.loops import NO_REPEAT_NGRAM_SIZE, forbids_loops, loops
from hf_nmsparse.masking import masked_where_lost
from hf_nmsparse.paragraphs import Paragraphs, named_language
from hf_nmsparse.positions import positions_of
from hf_nmsparse.texts import (
    Direction,
    check_target,
    check_tokens,
    direction_of,
    encode,
    longest_text,
    read_texts,
    start_token,
)

__all__ = ["TASK", "NMTranslationPipeline", "generated", "longest_source", "longest_target", "translate"]

TASK = "nmt-translation"
"""The name that ``transformers.pipeline`` takes; importing this module registers it."""

# What `generate` takes for each row of a batch, which is made here.
_OF_EACH_ROW = (
    "inputs",
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "encoder_outputs",
    "decoder_input_ids",
    "decoder_inputs_embeds",
    "decoder_attention_mask",
    "past_key_values",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
)
# What of its settings names tokens.
_TOKENS = (
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "pad_token_id",
    "eos_token_id",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
)
# What `translate` does beside that.
_WAYS = ("split", "break_loops", "keep_placeholders")
# What `generate` gives beside tokens.
_BESIDE_TOKENS = (
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
)


def translate(
    model: Any,
    tokenizer: Any,
    sentences: Iterable[str],
    batch_size: int = 64,
    *,
    src_lang: str | None = None,
    tgt_lang: str | None = None,
    split: bool | str = False,
    break_loops: bool = False,
    keep_placeholders: bool = False,
    **generate_kwargs: Any,
) -> list[str]:
    """Translates texts in their order: of one sentence each, or cut into sentences with ``split``.

    Batches hold sentences of like length, the longest first, so that little is computed for padding. A blank sentence
    has a blank translation. What is too long for the model is cut to its limit and logged.

    Args:
        model: An encoder-decoder model; it runs in evaluation mode and without gradients, on the device where it is.
        tokenizer: Its tokenizer. It is not changed, so that threads can share it, each with languages of its own.
        sentences: Texts of one sentence each: a list, an array, a Series, a column, a generator. They are read by
            their place, whatever index they have.
        batch_size: Sentences in a batch.
        src_lang: Language code of the source as the tokenizer spells it, such as ``"eng_Latn"``. Multilingual only.
        tgt_lang: The same of the target. Both reach the model as `texts.direction_of` says.
        split: Whether texts are cut into sentences, and these, where they are longer than the model takes, at the ends
            of clauses. White space between them stays as it is. Without it a model may leave out sentences. The code of
            a language splits by its rules, where nothing else says what the source is.
        break_loops: Whether a sentence that comes out as a loop is translated again without repeats.
        keep_placeholders: Whether ``{name}``, ``%s``, ``<0/>`` and addresses come back as they are: a sentence that
            loses some is translated again with short ones in their place.
        **generate_kwargs: For ``model.generate``, such as ``num_beams``, ``max_new_tokens`` and ``generation_config``.
            A keyword goes before ``generation_config``, and that before the model's own generation config.

    Returns:
        One translation for each sentence.

    Raises:
        ValueError: The model is no encoder-decoder, a sentence is no text, a language is unknown or missing, or an
            argument of ``generate`` asks for what a list of texts cannot hold.
    """
    if _asked_for(generate_kwargs).get("num_return_sequences") not in (None, 1):
        raise ValueError("translate: one translation a sentence; leave num_return_sequences out or ask the pipeline")
    texts = list(read_texts(sentences, "translate"))
    languages: dict[str, Any] = {"src_lang": src_lang, "tgt_lang": tgt_lang}
    if split is not False:
        paragraphs = _paragraphs(model, tokenizer, texts, split, **languages)
        found = translate(
            model,
            tokenizer,
            paragraphs.sentences,
            batch_size,
            break_loops=break_loops,
            keep_placeholders=keep_placeholders,
            **languages,
            **generate_kwargs,
        )
        return paragraphs.joined(found)
    translations, looped = [""] * len(texts), []
    settings = {**generate_kwargs, "num_return_sequences": 1}
    for places, sources, output in generated(model, tokenizer, texts, batch_size, src_lang, tgt_lang, settings):
        decoded = tokenizer.batch_decode(output, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for place, source, row, text in zip(places, sources, output.tolist(), decoded, strict=True):
            translations[place] = text
            if break_loops and loops([token for token in row if token != tokenizer.pad_token_id], source):
                looped.append(place)
    own = {**_set_in(model.generation_config), **_asked_for(generate_kwargs)}
    if looped and not forbids_loops(own.get("no_repeat_ngram_size")):
        settings = {**generate_kwargs, "no_repeat_ngram_size": NO_REPEAT_NGRAM_SIZE}
        found = translate(model, tokenizer, [texts[place] for place in looped], batch_size, **languages, **settings)
        for place, text in zip(looped, found, strict=True):
            translations[place] = text
    if keep_placeholders:
        masked = masked_where_lost(texts, translations)
        shown = [mask.text for mask in masked.values()]
        found = translate(model, tokenizer, shown, batch_size, break_loops=break_loops, **languages, **generate_kwargs)
        for (place, mask), text in zip(masked.items(), found, strict=True):
            translations[place] = mask.restored(text)
    return translations


def _paragraphs(
    model: Any, tokenizer: Any, texts: list[str], split: bool | str, src_lang: str | None, tgt_lang: str | None
) -> Paragraphs:
    """The texts as sentences that the model takes whole."""
    direction = direction_of(model, tokenizer, src_lang, tgt_lang)

    def count(sentences: list[str]) -> list[int]:
        given = [direction.prompt + sentence for sentence in sentences]
        return list(map(len, encode(tokenizer, given, inf, direction.frame)))

    own = named_language(split) or src_lang or getattr(tokenizer, "source_lang", None)
    return Paragraphs(texts, own, count, longest_source(model, tokenizer))


def longest_source(model: Any, tokenizer: Any) -> float:
    """How many tokens of a text are translated, with those around it; what is longer is cut."""
    return min(longest_text(tokenizer), positions_of(model.get_encoder()) or inf)


def longest_target(model: Any, tokenizer: Any) -> float:
    """How many tokens of a given translation are scored, with those around it."""
    return min(longest_text(tokenizer), positions_of(model.get_decoder()) or inf)


def generated(
    model: Any,
    tokenizer: Any,
    texts: list[str],
    batch_size: int,
    src_lang: str | None,
    tgt_lang: str | None,
    given: Mapping[str, Any],
) -> Iterator[tuple[list[int], list[list[int]], Tensor]]:
    """What ``generate`` gives for texts, batch by batch, the longest first.

    Args:
        model: As `translate` takes it.
        tokenizer: As `translate` takes it.
        texts: As `translate` takes them; blank ones are in no batch.
        batch_size: Sentences in a batch.
        src_lang: As `translate` takes it.
        tgt_lang: As `translate` takes it.
        given: Arguments of ``generate``.

    Returns:
        Of each batch the places of its texts, their tokens, and the output: [batch * sequences, target].

    Raises:
        ValueError: As `translate` raises it.
    """
    if not getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"translate: {type(model).__name__} is no encoder-decoder model; load a translation model")
    _check_count("batch_size", batch_size)
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "translate: the tokenizer has no padding token; set tokenizer.pad_token to the one of training"
        )
    direction = direction_of(model, tokenizer, src_lang, tgt_lang)
    settings = _settings(model, tokenizer, given, direction)
    todo = [place for place, text in enumerate(texts) if text.strip()]
    if settings.get("streamer") is not None and len(todo) > 1:
        raise ValueError(f"translate: a streamer follows one sentence, got {len(todo)}; leave it out")
    limit = longest_source(model, tokenizer)
    rows = encode(tokenizer, [direction.prompt + texts[place] for place in todo], limit, direction.frame)
    _check_vocabulary(model, rows, settings)
    tokens = dict(zip(todo, rows, strict=True))
    longest_first = sorted(todo, key=lambda place: -len(tokens[place]))
    allowed = settings.pop("prefix_allowed_tokens_fn", None)
    with _evaluating(model):
        for start in range(0, len(todo), batch_size):
            batch = longest_first[start : start + batch_size]
            if allowed is not None:
                settings["prefix_allowed_tokens_fn"] = _by_place(allowed, batch)
            sources = [tokens[place] for place in batch]
            yield batch, sources, _generate(model, tokenizer, list(map(torch.tensor, sources)), settings)


def _generate(model: Any, tokenizer: Any, tokens: list[Tensor], settings: dict[str, Any]) -> Tensor:
    """What ``generate`` gives for one batch of token sequences: [batch * sequences, target]."""
    input_ids = pad_sequence(tokens, batch_first=True, padding_value=tokenizer.pad_token_id)  # [batch, source]
    attention_mask = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
    output = model.generate(
        input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device), **settings
    )
    sequences: Tensor = getattr(output, "sequences", output)  # the model's own settings may ask for more than tokens
    return sequences


def _by_place(allowed: Callable[[int, Tensor], list[int]], places: list[int]) -> Callable[[int, Tensor], list[int]]:
    """A ``prefix_allowed_tokens_fn`` that is asked about the place of a sentence, not about its row in the batch."""
    return lambda row, tokens: allowed(places[row], tokens)


def _check_vocabulary(model: Any, rows: list[list[int]], settings: Mapping[str, Any]) -> None:
    """Refuses tokens that the model has no embedding for."""
    own = {"decoder_start_token_id": start_token(model), **_set_in(model.generation_config), **settings}
    _check_count("num_beams", own.get("num_beams") or 1)
    named = {key: _tokens(own[key]) for key in _TOKENS if own.get(key) is not None}
    size = len(model.get_output_embeddings().weight)
    for key, tokens in named.items():
        for token in tokens:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < size:
                raise ValueError(f"translate: {key}: {token!r} is none of the {size} tokens of the model; set another")
    check_tokens(rows, len(model.get_input_embeddings().weight))


def _tokens(value: Any) -> Iterator[Any]:
    """The tokens that a setting of ``generate`` names: one, a list, or lists of them."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list | tuple):
        yield from chain.from_iterable(map(_tokens, value))
    else:
        yield value


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode for a while; what was training then trains again, and nothing else."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _asked_for(given: Mapping[str, Any]) -> dict[str, Any]:
    """The caller's settings: those of ``generation_config``, and over them the keywords."""
    config = given.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise ValueError(f"translate: generation_config needs a GenerationConfig, got {type(config).__name__}")
    keywords = {key: value for key, value in given.items() if key != "generation_config"}
    return {**_set_in(config or GenerationConfig()), **keywords}


def _set_in(config: GenerationConfig) -> dict[str, Any]:
    """What is set in a generation config."""
    known = {key for key in vars(GenerationConfig()) if not key.startswith("_")} - {"transformers_version"}
    return {key: value for key, value in vars(config).items() if key in known and value is not None}


def _settings(model: Any, tokenizer: Any, given: Mapping[str, Any], direction: Direction) -> dict[str, Any]:
    """The keywords of ``generate``: the caller's, with a limit of length and what the languages ask for."""
    asked = _asked_for(given)
    for key in _OF_EACH_ROW:
        if asked.get(key) is not None:
            raise ValueError(f"translate: {key} is made from the sentences, batch by batch; leave it out")
    for key in _BESIDE_TOKENS:
        if asked.get(key):
            raise ValueError(f"translate: {key} has no place beside translations; call model.generate for it")
    for key, value in direction.settings.items():
        if asked.get(key) not in (None, value, _set_in(model.generation_config).get(key)):
            raise ValueError(
                f"translate: {key} {asked[key]} is another language than tgt_lang's; leave one of them out"
            )
    if not direction.settings:
        check_target(model, tokenizer, asked)
    if isinstance(asked.get("decoder_start_token_id"), list):
        raise ValueError("translate: decoder_start_token_id needs one token for all sentences, got a list")
    if asked.get("num_return_sequences") is not None:
        _check_count("num_return_sequences", asked["num_return_sequences"])
    if asked.get("stop_strings") or model.generation_config.stop_strings or asked.get("assistant_tokenizer"):
        asked["tokenizer"] = tokenizer
    return {**asked, **direction.settings, **_limit(model, given)}


def _limit(model: Any, given: Mapping[str, Any]) -> dict[str, int | None]:
    """The limit of an output, as ``max_new_tokens`` or as ``max_length``, which counts the start token too.

    The first of the keywords, the caller's configuration and the model's own that sets a limit decides, and there new
    tokens go before the length, as in ``generate``. Where the decoder has so many positions and no more, the caller
    cannot ask for more, and the model's own settings reach no further either.
    """
    positions = positions_of(model.get_decoder())
    own = _set_in(model.generation_config)
    for settings in (given, _set_in(given.get("generation_config") or GenerationConfig()), own):
        # The last token is not read again, so that an output is one longer than the positions.
        for key, other, start in (("max_new_tokens", "max_length", 0), ("max_length", "max_new_tokens", 1)):
            value = settings.get(key)
            if value is None:
                continue
            _check_count(key, value)
            if positions is not None and value > positions + start:
                if settings is not own:
                    raise ValueError(
                        f"translate: {key} {value} is beyond the {positions} positions of the decoder; give at most "
                        f"{positions + start}"
                    )
                value = positions + start
            return {key: value, other: None}  # or generate would warn where the model's own settings hold the other
    return {"max_new_tokens": min(DEFAULT_MAX_NEW_TOKENS, positions or DEFAULT_MAX_NEW_TOKENS), "max_length": None}


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"translate: {name} needs at least 1, got {value!r}")


class NMTranslationPipeline(Pipeline):
    """The pipeline ``pipeline("nmt-translation", model=...)``: texts to ``{"translation_text": ...}``.

    One text gives a list of one dictionary and a list gives a list; a generator is consumed as its results are
    asked for. With ``num_return_sequences`` above 1 each text has a list of dictionaries, the best first. Arguments of
    `translate` may be given when it is built and in every call.
    """

    _load_tokenizer = True  # type: ignore[assignment]
    _pipeline_calls_generate = True

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Translates a text, texts in anything that holds them in an order, or an iterator of texts.

        Args:
            inputs: What to translate.
            *args: None are known.
            **kwargs: ``batch_size``, ``src_lang``, ``tgt_lang``, ``split``, ``break_loops``, ``keep_placeholders`` and
                arguments of ``generate`` such as ``num_beams``.
                ``return_tensors=True`` gives ``translation_token_ids`` in place of texts, and beside them with
                ``return_text=True``; ``clean_up_tokenization_spaces`` is for decoding.

        Raises:
            ValueError: As `translate` raises it.
        """
        if isinstance(inputs, str):
            [result] = super().__call__(list(read_texts([inputs], TASK)), *args, **kwargs)
            return result if isinstance(result, list) else [result]
        if not isinstance(inputs, Dataset):  # which the pipeline reads as its results are asked for
            lazy = isinstance(inputs, Iterator)
            inputs = read_texts(inputs, TASK)
            inputs = inputs if lazy else list(inputs)
        # Pipeline looks at the first element.
        return super().__call__(inputs, *args, **kwargs) if inputs != [] else []

    def _sanitize_parameters(
        self,
        return_tensors: bool | None = None,
        return_text: bool | None = None,
        clean_up_tokenization_spaces: bool | None = None,
        truncation: bool | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if truncation not in (None, True):
            raise ValueError(f"{TASK}: what is too long for the model is always cut; leave truncation out")
        for limit, other in (("max_length", "max_new_tokens"), ("max_new_tokens", "max_length")):
            if kwargs.get(limit) is not None:  # takes the place of either of an earlier call
                kwargs.setdefault(other, None)
        results = {
            "return_tensors": return_tensors,
            "return_text": return_text,
            "clean_up_tokenization_spaces": clean_up_tokenization_spaces,
        }
        return {}, kwargs, {key: value for key, value in results.items() if value is not None}

    def preprocess(self, input_: Any, **preprocess_parameters: Any) -> dict[str, Any]:
        """Checks one text. Encoding waits for the batch."""
        if not isinstance(input_, str):
            raise ValueError(f"{TASK}: expected a text, got {type(input_).__name__}")
        return {"text": input_}

    def _forward(self, input_tensors: dict[str, Any], **forward_parameters: Any) -> Any:
        texts = input_tensors["text"]  # one text, or a list of them with batch_size above 1
        batch = [texts] if isinstance(texts, str) else texts
        settings = self._prepare_generate_kwargs(forward_parameters)
        if self.assistant_model is not None:
            assistants = {"assistant_model": self.assistant_model, "assistant_tokenizer": self.assistant_tokenizer}
            settings = {**assistants, **settings}
        src_lang, tgt_lang = settings.pop("src_lang", None), settings.pop("tgt_lang", None)
        ways = {name: settings.pop(name) for name in _WAYS if name in settings}
        if any(ways.values()):
            languages = {"src_lang": src_lang, "tgt_lang": tgt_lang}
            found = translate(self.model, self.tokenizer, batch, len(batch), **ways, **languages, **settings)
            return {"text": found[0] if isinstance(texts, str) else found}
        own = self.model.generation_config.num_return_sequences
        count = _asked_for(settings).get("num_return_sequences") or own or 1
        _check_count("num_return_sequences", count)
        tokens = [[torch.empty(0, dtype=torch.long)] * count for _ in batch]  # of a blank text
        for places, _, output in generated(self.model, self.tokenizer, batch, len(batch), src_lang, tgt_lang, settings):
            for place, rows in zip(places, output.split(len(output) // len(places)), strict=True):
                tokens[place] = list(rows)
        return {"tokens": tokens[0] if isinstance(texts, str) else tokens}

    def postprocess(self, model_outputs: Any, **postprocess_parameters: Any) -> dict[str, Any] | list[dict[str, Any]]:
        """The result of one text: a dictionary, or several where several sequences were asked for."""
        return_tensors = postprocess_parameters.get("return_tensors", False)
        return_text = postprocess_parameters.get("return_text", not return_tensors)
        clean_up = postprocess_parameters.get("clean_up_tokenization_spaces", False)
        if not return_tensors and not return_text:
            raise ValueError(f"{TASK}: return_text=False needs return_tensors=True, or nothing is left to return")
        if "text" in model_outputs:  # of several sentences or of another text: it has no tokens of its own
            if return_tensors:
                raise ValueError(f"{TASK}: with {', '.join(_WAYS)} there are texts alone; leave return_tensors out")
            return {"translation_text": model_outputs["text"]}
        tokenizer: Any = self.tokenizer
        results = []
        for tokens in model_outputs["tokens"]:
            result: dict[str, Any] = {"translation_token_ids": tokens} if return_tensors else {}
            if return_text:
                result["translation_text"] = tokenizer.decode(
                    tokens, skip_special_tokens=True, clean_up_tokenization_spaces=clean_up
                )
            results.append(result)
        return results if len(results) > 1 else results[0]


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
