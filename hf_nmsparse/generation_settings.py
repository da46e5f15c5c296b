"""Settings of ``generate`` as the native engine follows them: read from files and calls, checked, by their own names.

The one source of settings is what transformers reads: generation_config.json, or the old settings in config.json where
a model has no such file. What would change a translation and the engine does not know is refused. This needs neither
torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from hf_nmsparse.engine_spec import Spec
from hf_nmsparse.kernels.engine import MOST_BEAMS, MOST_ENDS, EarlyStopping, SearchConfig
from hf_nmsparse.packed_files import read_object

__all__ = ["DEFAULT_MAX_NEW_TOKENS", "NAMES", "Search", "plain", "read_settings", "search_of"]

DEFAULT_MAX_NEW_TOKENS = 256
"""Where neither the caller nor the model sets a limit: transformers would stop after 20 tokens."""

_FOLLOWED = frozenset(
    {
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "decoder_start_token_id",
        "do_sample",
        "early_stopping",
        "eos_token_id",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "no_repeat_ngram_size",
        "num_beams",
        "num_return_sequences",
        "repetition_penalty",
        "suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
    }
)
# How a step is computed, or what is given beside the tokens; and what speaks of assistants that nobody has given.
_WITHOUT_EFFECT = frozenset(
    {
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "continuous_batching_config",
        "disable_compile",
        "is_assistant",
        "low_memory",
        "max_cache_len",
        "max_matching_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "pad_token_id",
        "prefill_chunk_size",
        "return_dict_in_generate",
        "speculation_type",
        "target_lookbehind",
        "transformers_version",
        "use_cache",
    }
)
_OF_SAMPLING = frozenset({"epsilon_cutoff", "eta_cutoff", "min_p", "top_h", "typical_p"})
# What the engine does not know, and the value that leaves a translation as it is.
_UNKNOWN = {
    "constraints": None,
    "diversity_penalty": 0.0,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "guidance_scale": 1.0,
    "max_time": None,
    "min_p": None,
    "num_beam_groups": 1,
    "penalty_alpha": 0.0,
    "prompt_lookup_num_tokens": None,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "sequence_bias": None,
    "stop_strings": None,
    "token_healing": False,
    "top_h": None,
    "typical_p": 1.0,
    "use_mtp": False,
    "watermarking_config": None,
}

NAMES = _FOLLOWED | _WITHOUT_EFFECT | _UNKNOWN.keys()
"""All settings of a ``GenerationConfig``."""

_EARLY_STOPPING = {False: EarlyStopping.IF_NO_BETTER, True: EarlyStopping.WHEN_FULL, "never": EarlyStopping.NEVER_EARLY}


@dataclass(frozen=True)
class Search:
    """How the engine is to search.

    Attributes:
        config: The engine's settings.
        start: The token that a translation begins with.
        eos: The tokens that end one.
        banned: Lists of tokens that are not generated one after the other.
        begin_banned: Tokens that are not generated first.
    """

    config: SearchConfig
    start: int
    eos: Sequence[int]
    banned: Sequence[Sequence[int]]
    begin_banned: Sequence[int]


def read_settings(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the model in a folder whose config.json is ``config``."""
    file = folder / "generation_config.json"
    own = read_object(file) if file.is_file() else config
    return {name: own[name] for name in sorted(NAMES) if own.get(name) is not None}


def plain(value: Any) -> Any:
    """Numbers and arrays of NumPy and torch as Python's own; all else as it is."""
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value.tolist() if hasattr(value, "tolist") else value


def search_of(
    spec: Spec, own: Mapping[str, Any], given: Mapping[str, Any], prompt_length: int = 1, **engine: Any
) -> Search:
    """What the settings of a call, and below them those of the model, come to.

    Args:
        spec: The model.
        own: Its settings.
        given: Those of the call; None takes the model's own away, but for limits of length, where it is nothing.
        prompt_length: Tokens that each translation begins with, the start token included.
        **engine: Fields of `SearchConfig` beside the settings, such as ``threads``.

    Raises:
        ValueError: A setting is unknown, out of range, or changes translations in a way that the engine does not know.
    """
    for name in given:
        if name not in NAMES:
            raise ValueError(f"translate: there is no setting {name!r}; settings are those of GenerationConfig")
    given = {name: plain(value) for name, value in given.items()}
    merged = {name: value for name, value in {**own, **given}.items() if value is not None}
    settings = _Settings(merged, spec.config.target_vocabulary)
    sample = settings.flag("do_sample")
    for name, neutral in _UNKNOWN.items():
        value = settings.values.get(name)
        if value not in (None, False, neutral) and (sample or name not in _OF_SAMPLING):
            raise ValueError(f"translate: the engine does not know {name}={value!r}; translate with transformers")
    beams = settings.whole("num_beams", 1)
    early = settings.values.get("early_stopping", False)
    if not isinstance(early, bool | str) or early not in _EARLY_STOPPING:
        raise ValueError(f"translate: early_stopping is True, False or 'never', got {early!r}")
    eos = settings.tokens("eos_token_id")
    for name, count, largest in (("num_beams", beams, MOST_BEAMS), ("eos_token_id", len(eos), MOST_ENDS)):
        if count > largest:
            raise ValueError(
                f"translate: the engine takes {largest} of {name}, got {count}; translate with transformers"
            )
    most = _longest(spec, own, given, prompt_length)
    fields: dict[str, Any] = {
        "beams": beams,
        "returned": settings.whole("num_return_sequences", 1),
        "max_length": most,
        "min_length": settings.whole("min_length", 0, 0),
        "min_new_tokens": settings.whole("min_new_tokens", 0, 0),
        "early_stopping": _EARLY_STOPPING[early],
        "no_repeat_ngram": settings.whole("no_repeat_ngram_size", 0, 0),
        "forced_bos": settings.token("forced_bos_token_id", -1),
        "forced_eos": settings.token("forced_eos_token_id", -1),
        "length_penalty": settings.number("length_penalty", -1e3),
        "repetition_penalty": settings.number("repetition_penalty", 1e-3),
        # A token of padding would not count for positions, which the engine does not know.
        "unknown_token": spec.padding if spec.family.positions == "counted" else -1,
    }
    if sample:
        fields |= {
            "sample": True,
            "temperature": settings.number("temperature", 1e-6),
            "top_k": settings.whole("top_k", 50, 0),
            "top_p": settings.number("top_p", 0.0, 1.0),
        }
    start = settings.token("decoder_start_token_id", settings.token("bos_token_id", -1))
    if start < 0:
        raise ValueError("translate: decoder_start_token_id or bos_token_id needs to be set, got neither")
    banned = [ids for ids in settings.lists("bad_words_ids") if ids not in [[end] for end in eos]]  # as transformers
    return Search(
        SearchConfig(**fields, **engine),
        start,
        eos,
        [*banned, *([token] for token in settings.tokens("suppress_tokens"))],
        settings.tokens("begin_suppress_tokens"),
    )


def _longest(spec: Spec, own: Mapping[str, Any], given: Mapping[str, Any], prompt_length: int) -> int:
    """The most tokens of a translation with its prompt.

    The first of the call and the model that sets a limit decides, and there new tokens go before the length. The call
    cannot ask for more than the decoder has positions for, and the model's own settings reach no further either.
    """
    positions = spec.config.decoder.positions or None
    for settings in (given, own):
        for key, others in (("max_new_tokens", prompt_length), ("max_length", 0)):
            if settings.get(key) is None:
                continue
            most = _Settings(settings, 0).whole(key, 1) + others
            # The last token is not read again, so that an output is one longer than the positions.
            if positions is not None and most > positions + 1:
                if settings is given:
                    raise ValueError(
                        f"translate: {key} {settings[key]} is beyond the {positions} positions of the decoder; give at "
                        f"most {positions + 1 - others}"
                    )
                most = positions + 1
            if most <= prompt_length:
                raise ValueError(
                    f"translate: {key} {settings[key]} leaves no room behind a prompt of {prompt_length} tokens; "
                    "give more"
                )
            return most
    most = prompt_length + DEFAULT_MAX_NEW_TOKENS
    return most if positions is None else min(most, positions + 1)


@dataclass(frozen=True)
class _Settings:
    """Settings, checked as they are asked for."""

    values: Mapping[str, Any]
    vocabulary: int

    def flag(self, name: str) -> bool:
        value = self.values.get(name, False)
        if type(value) is not bool:
            raise ValueError(f"translate: {name} is True or False, got {value!r}")
        return value

    def whole(self, name: str, default: int, least: int = 1) -> int:
        value = self.values.get(name, default)
        if type(value) is not int or value < least:
            raise ValueError(f"translate: {name} needs at least {least}, got {value!r}")
        if value > (most := 2**31 - 2**10 - 1):
            raise ValueError(f"translate: {name} is at most {most}, got {str(value)[:50]}")
        return value

    def number(self, name: str, least: float, most: float = 1e3) -> float:
        value = self.values.get(name, 1.0)
        if type(value) not in (int, float) or not least <= value <= most:
            raise ValueError(f"translate: {name} is a number from {least:g} to {most:g}, got {value!r}")
        return float(value)

    def token(self, name: str, default: int) -> int:
        found = self.tokens(name)
        if len(found) > 1 or isinstance(self.values.get(name), list | tuple):
            raise ValueError(f"translate: {name} needs one token for all sentences, got {self.values[name]!r}")
        return found[0] if found else default

    def tokens(self, name: str) -> list[int]:
        value = self.values.get(name)
        found = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
        return self._checked(name, found)

    def lists(self, name: str) -> list[list[int]]:
        value = self.values.get(name) or []
        if not isinstance(value, list | tuple) or not all(isinstance(ids, list | tuple) and ids for ids in value):
            raise ValueError(f"translate: {name} is a list of lists of tokens, got {value!r}")
        self._checked(name, list(chain.from_iterable(value)))
        return [list(ids) for ids in value]

    def _checked(self, name: str, tokens: list[Any]) -> list[int]:
        for token in tokens:
            if type(token) is not int or not 0 <= token < self.vocabulary:
                raise ValueError(
                    f"translate: {name}: {token!r} is none of the {self.vocabulary} tokens of the model; set another"
                )
        return tokens
