"""Texts into tokens: read by their place, in the language of the call, and without a trace on the tokenizer.

This needs neither torch nor transformers: models and tokenizers are whatever answers as theirs do.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from types import SimpleNamespace
from typing import Any

__all__ = [
    "Direction",
    "check_target",
    "check_tokens",
    "direction_of",
    "encode",
    "encode_targets",
    "languages_of",
    "longest_text",
    "read_texts",
    "start_token",
]

logger = logging.getLogger(__name__)

Frame = tuple[list[int], list[int]]
"""The tokens before and after those of a text."""


def read_texts(texts: Any, where: str) -> Iterator[str]:
    """The texts of anything that holds them one after the other: a list, an array, a Series, a column, a generator.

    Args:
        texts: Where they come from. They are read in their order, whatever index or keys they have.
        where: Begins the message of an error.

    Raises:
        ValueError: It is one text, has no order or no single column, or an element is no text. Elements are looked at
            as they are asked for.
    """
    if isinstance(texts, str):
        raise ValueError(f"{where}: expected a list of texts, got one text; put it into a list")
    if isinstance(texts, bytes | bytearray | Mapping | set | frozenset) or not isinstance(texts, Iterable):
        raise ValueError(f"{where}: expected a list of texts, got {type(texts).__name__}")
    dimensions = getattr(texts, "ndim", 1)
    if dimensions != 1:
        raise ValueError(f"{where}: expected a list of texts, got {dimensions} dimensions; give one column")
    return (_text(text, index, where) for index, text in enumerate(texts))


def _text(text: Any, index: int, where: str) -> str:
    text = text.as_py() if hasattr(text, "as_py") else text  # an element of a pyarrow column
    if not isinstance(text, str):
        raise ValueError(f"{where}: sentence {index} is no text but {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: sentence {index} holds half a character, {text[error.start]!r}; decode it as what it is"
        ) from None
    if "\0" in text:  # an unknown word to most tokenizers
        raise ValueError(f"{where}: sentence {index} holds a NUL, which no text does; take it out")
    return str(text)


@dataclass(frozen=True)
class Direction:
    """What the languages of a call add to it.

    Attributes:
        prompt: Text before each sentence.
        frame: Tokens around each sentence; None where the tokenizer adds its own.
        settings: Arguments of ``generate``.
    """

    prompt: str = ""
    frame: Frame | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def direction_of(model: Any, tokenizer: Any, src_lang: str | None, tgt_lang: str | None) -> Direction:
    """The languages in the way that the documentation of the model's family asks for.

    - NLLB, M2M100 and mBART-50: the source's code is part of the source, the target's is forced as the first token.
    - mBART and PLBart: the target's code is what the decoder starts with.
    - SeamlessM4T: ``generate`` takes the target's code itself.
    - OPUS-MT and MADLAD: the target's code is the first word of the source.
    - T5: the sentence that config.json has for the task, such as "translate English to German: ".

    Args:
        model: The model.
        tokenizer: Its tokenizer, which is read and never changed.
        src_lang: Code of the source; None takes the tokenizer's own.
        tgt_lang: Code of the target; None leaves it to the model's settings.

    Raises:
        ValueError: The model has no such languages.
    """
    if _is_multilingual(tokenizer):
        source = tokenizer.src_lang if src_lang is None else _token(tokenizer, "src_lang", src_lang)
        settings = {} if tgt_lang is None else _target_settings(model, tokenizer, tgt_lang)
        return Direction("", _source_frame(tokenizer, source), settings)
    if src_lang is None and tgt_lang is None:
        return Direction()
    if prompts := _task_prompts(model):
        return Direction(_one_prompt(prompts, src_lang, tgt_lang))
    if src_lang is not None:
        known = languages_of(tokenizer) and "reads its source language from the text"
        raise ValueError(
            f"translate: this model {known or 'has one pair of languages'}; leave out src_lang, got {src_lang!r}"
        )
    if _is_madlad(model, tokenizer, tgt_lang):
        return Direction(f"<2{tgt_lang}> ")
    return Direction(f"{_token(tokenizer, 'tgt_lang', str(tgt_lang))} ")


def languages_of(tokenizer: Any) -> dict[str, str]:
    """The token of each language, by its code; empty where texts carry none.

    M2M100 writes "en" as "__en__" and OPUS-MT as ">>en<<"; with mBART and NLLB the code is the token.
    """
    if not _is_multilingual(tokenizer):
        return {token[2:-2]: token for token in getattr(tokenizer, "supported_language_codes", ())}
    tokens = getattr(tokenizer, "lang_code_to_token", None)  # M2M100
    if tokens is None:
        named = [*getattr(tokenizer, "lang_code_to_id", ()), *map(str, tokenizer.extra_special_tokens)]
        tokens = {token.removeprefix("__").removesuffix("__"): token for token in named}
    return {code: token for code, token in tokens.items() if _index(tokenizer, token) is not None}


def _is_multilingual(tokenizer: Any) -> bool:
    """Whether the tokenizer marks the language of a source; FSMT's has ``src_lang`` and no marks."""
    return hasattr(tokenizer, "set_src_lang_special_tokens")


def _index(tokenizer: Any, token: str) -> int | None:
    index: int | None = tokenizer.convert_tokens_to_ids(token)
    return None if index == tokenizer.unk_token_id else index


def _token(tokenizer: Any, name: str, language: str) -> str:
    """The token of a language, which may be named by its code or by the token itself.

    Raises:
        ValueError: The tokenizer has no languages, or not this one.
    """
    languages = languages_of(tokenizer)
    if not languages:
        raise ValueError(f"translate: this model has one pair of languages; leave out {name}, got {language!r}")
    if language in languages:
        return languages[language]
    if language in languages.values():
        return language
    examples = [code for code in languages if code[:2] == str(language)[:2]] or list(languages)[:5]
    raise ValueError(
        f"translate: {name} {language!r} is none of the {len(languages)} languages here, such as {', '.join(examples)}"
    )


class _StandIn:
    """Reads like a tokenizer, and keeps for itself what is set on it."""

    def __init__(self, tokenizer: Any) -> None:
        self._read = tokenizer
        self._tokenizer = SimpleNamespace()  # in place of the backend, whose template a tokenizer sets

    def __getattr__(self, name: str) -> Any:
        return getattr(self._read, name)


def _source_frame(tokenizer: Any, source: str | None) -> Frame:
    """What the tokenizer's own rule puts around a text of this language, asked of a stand-in."""
    codes = {token: code for code, token in getattr(tokenizer, "lang_code_to_token", {}).items()}
    stand_in: Any = _StandIn(tokenizer)
    type(tokenizer).set_src_lang_special_tokens(stand_in, codes.get(str(source), source))
    return list(stand_in.prefix_tokens), list(stand_in.suffix_tokens)


def _target_settings(model: Any, tokenizer: Any, tgt_lang: str) -> dict[str, Any]:
    token = _token(tokenizer, "tgt_lang", tgt_lang)
    if "tgt_lang" in inspect.signature(model.generate).parameters:
        return {"tgt_lang": token}
    index = _index(tokenizer, token)
    if model.config.model_type in ("mbart", "plbart") and _source_frame(tokenizer, token)[1][-1] == index:
        # Their labels end with the code, and shifted to the right they begin with it. mBART-50 has it in front.
        return {"decoder_start_token_id": index, "forced_bos_token_id": None}
    settings: dict[str, Any] = {"forced_bos_token_id": index}
    if _names_a_language(tokenizer, start_token(model)):
        settings["decoder_start_token_id"] = tokenizer.eos_token_id
    return settings


def start_token(model: Any) -> int | None:
    """What the decoder starts with where the call says nothing of it."""
    start: int | None = model.generation_config.decoder_start_token_id
    return getattr(model.config, "decoder_start_token_id", None) if start is None else start


def _names_a_language(tokenizer: Any, index: int | None) -> bool:
    """Whether a token is the code of a language."""
    return index is not None and index in [_index(tokenizer, token) for token in languages_of(tokenizer).values()]


def _task_prompts(model: Any) -> dict[tuple[str, str], str]:
    """For each pair of languages the sentence with which T5 asks for it, from its configuration."""
    tasks = getattr(model.config, "task_specific_params", None) or {}
    named = {name.removeprefix("translation_").partition("_to_"): task for name, task in tasks.items()}
    return {(source, target): task["prefix"] for (source, to, target), task in named.items() if to and "prefix" in task}


def _one_prompt(prompts: dict[tuple[str, str], str], src_lang: str | None, tgt_lang: str | None) -> str:
    found = [
        prompt
        for (source, target), prompt in prompts.items()
        if src_lang in (None, source) and tgt_lang in (None, target)
    ]
    if len(found) != 1:
        pairs = ", ".join(f"{source} to {target}" for source, target in prompts)
        raise ValueError(
            f"translate: src_lang {src_lang!r} and tgt_lang {tgt_lang!r} name no single pair here; it has {pairs}"
        )
    return found[0]


def _is_madlad(model: Any, tokenizer: Any, tgt_lang: str | None) -> bool:
    return model.config.model_type == "t5" and _index(tokenizer, f"<2{tgt_lang}>") is not None


def check_target(model: Any, tokenizer: Any, asked: Mapping[str, Any]) -> None:
    """Refuses to translate into a language that nobody has named.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        asked: The settings of the call, which may name the first tokens of a translation.

    Raises:
        ValueError: As said.
    """
    own = {
        "decoder_start_token_id": start_token(model),
        "forced_bos_token_id": model.generation_config.forced_bos_token_id,
    }
    first = {**own, **asked}
    plain = (None, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if (
        _is_multilingual(tokenizer)
        and languages_of(tokenizer)
        and first["forced_bos_token_id"] is None
        and first["decoder_start_token_id"] in plain
    ):
        raise ValueError("translate: this model translates into several languages; name one with tgt_lang")


def longest_text(tokenizer: Any) -> float:
    """How many tokens of a text the tokenizer says that the model takes.

    Raises:
        ValueError: It says nothing of use.
    """
    most = tokenizer.model_max_length
    if not isinstance(most, int | float) or isinstance(most, bool) or not most >= 2:
        raise ValueError(
            f"translate: the tokenizer's model_max_length needs at least 2, a token and the end, got {most!r}; set "
            "tokenizer.model_max_length"
        )
    return most


def encode(
    tokenizer: Any, texts: list[str], limit: float, frame: Frame | None = None, target: bool = False
) -> list[list[int]]:
    """Tokens of each text, cut to ``limit`` of them; how many were cut is logged.

    The tokenizer is not told to cut: it would do so for other threads as well.

    Args:
        tokenizer: The tokenizer, which stays as it is.
        texts: The texts.
        limit: The most tokens of a text, with those around it.
        frame: Tokens around each text; None takes those of the tokenizer.
        target: Whether they are translations, for which some tokenizers have another vocabulary.

    Raises:
        ValueError: The tokenizer fails, gives no tokens for a text, or cannot be told where to cut one.
    """
    if not texts:
        return []

    def tokens(of: Any, whole: bool) -> Any:
        given = {"text_target": of} if target else {"text": of}
        return tokenizer(**given, add_special_tokens=whole, verbose=False)["input_ids"]

    try:
        encoded: list[list[int]] = tokens(texts, frame is None)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # up to each tokenizer; where Rust panics it is no Exception
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"translate: the tokenizer has failed: {reason}; load the one that the model was trained with"
        ) from error
    if frame is not None:
        encoded = [[*frame[0], *row, *frame[1]] for row in encoded]
    empty = next((index for index, row in enumerate(encoded) if not row), None)
    if empty is not None:
        raise ValueError(
            f"translate: the tokenizer gives no tokens for {texts[empty][:50]!r}; load the one that the model was "
            "trained with"
        )
    too_long = [index for index, row in enumerate(encoded) if len(row) > limit]
    if too_long:
        logger.warning(f"translate: {len(too_long)} of {len(texts)} sentences were cut to {limit} tokens")
    for index in too_long:
        row = tokens(texts[index], False)
        before, after = frame or _around(encoded[index], row)
        room = max(int(limit) - len(before) - len(after), 0)
        kept = row[len(row) - room :] if tokenizer.truncation_side == "left" else row[:room]
        encoded[index] = [*before, *kept, *after]
    return encoded


def encode_targets(
    tokenizer: Any, texts: list[str], limit: float, direction: Direction, forced: int | None
) -> list[list[int]]:
    """Tokens of each translation as they follow the start token in training, cut as `encode` does.

    Args:
        tokenizer: As `encode` takes it.
        texts: The translations.
        limit: The most tokens of one.
        direction: Of their sources.
        forced: The first token of all translations into this language; None where there is none.

    Raises:
        ValueError: As `encode` raises it.
    """
    if direction.frame is None:  # the tokenizer's own
        return encode(tokenizer, texts, limit, target=True)
    # Tokenizers that frame have one vocabulary, and as those of targets they ask for a language of their own. The
    # language stands in front, or is what the decoder starts with.
    return encode(tokenizer, texts, limit, ([] if forced is None else [forced], [tokenizer.eos_token_id]))


def check_tokens(rows: Iterable[Iterable[int]], size: int) -> None:
    """Refuses tokens that a model has no embedding for.

    Args:
        rows: The tokens of each text.
        size: How many the model has.

    Raises:
        ValueError: There is one.
    """
    most = max(chain.from_iterable(rows), default=0)
    if most >= size:
        raise ValueError(
            f"translate: token {most} is beyond the {size} of the model; give it the tokenizer that it was trained with"
        )


def _around(whole: list[int], inner: list[int]) -> Frame:
    """What of ``whole`` comes before and after ``inner``."""
    start = next((start for start in range(len(whole)) if whole[start : start + len(inner)] == inner), None)
    if start is None:
        raise ValueError("translate: a sentence is too long, and this tokenizer cannot be told where to cut; split it")
    return whole[:start], whole[start + len(inner) :]
