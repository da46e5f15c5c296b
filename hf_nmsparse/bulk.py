"""Many texts at once: the native engine where it runs the model, transformers elsewhere, and why a text is left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any, NamedTuple, Protocol

from hf_nmsparse.glossary import Glossary
from hf_nmsparse.masking import masked_where_lost
from hf_nmsparse.placeholders import keeps_placeholders
from hf_nmsparse.texts import Direction, check_target, check_tokens, direction_of, encode, encode_targets, start_token
from hf_nmsparse.translations import Scored
from hf_nmsparse.translator import Translator

__all__ = [
    "BLANK",
    "IMPOSSIBLE",
    "NOTHING",
    "TOO_LONG",
    "BulkTranslator",
    "Candidate",
    "EngineTranslator",
    "Search",
    "TorchTranslator",
    "load_translator",
    "score_each",
    "translate_each",
]

# Why a text has no translation, or a pair no score.
BLANK, TOO_LONG, NOTHING = "blank", "too long", "without a translation"

# And why a pair has no score: the model holds its translation to be impossible, as padding is that somebody wrote out.
IMPOSSIBLE = "impossible"


@dataclass(frozen=True)
class Search:
    """How texts are translated.

    Attributes:
        count: How many translations of each are wanted.
        batch_size: Sentences of a batch.
        scores: Whether log-probabilities are wanted.
        seed: Of sampling.
        keep_placeholders: Whether placeholders come back as they are, as `Translator.translate` says.
        glossary: Terms that have one right translation; the engine's alone.
        languages: ``src_lang`` and ``tgt_lang``, None for models of one pair.
        settings: Further ones of ``generate``, such as ``num_beams``.
    """

    count: int = 1
    batch_size: int = 64
    scores: bool = False
    seed: int = 0
    keep_placeholders: bool = False
    glossary: Glossary | None = None
    languages: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


class Candidate(NamedTuple):
    """A translation.

    Attributes:
        text: Its text.
        tokens: How many it has, EOS included.
        score: The mean of their log-probabilities; None where none are wanted.
    """

    text: str
    tokens: int
    score: float | None = None


class BulkTranslator(Protocol):
    """What translates."""

    name: str
    """What it computes with, in words."""
    longest: float
    """How many tokens of a source it takes."""
    longest_target: float
    """How many tokens of a given translation it takes."""

    def translate(self, texts: Sequence[str], search: Search) -> list[list[Candidate]]:
        """For each text, none of them blank, its translations, the best first."""

    def count(self, texts: Sequence[str], search: Search, target: bool = False) -> list[int]:
        """How many tokens each text has, none of them blank, or each translation if they are targets."""

    def score(self, pairs: Sequence[tuple[str, str]], search: Search) -> list[Scored]:
        """The log-probabilities of given translations; no side is blank, and none is too long."""


class EngineTranslator:
    """A model on the native engine.

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
        self.longest, self.longest_target = self._translator.longest_source, self._translator.longest_target

    def translate(self, texts: Sequence[str], search: Search) -> list[list[Candidate]]:
        """As `BulkTranslator`."""
        found = self._translator.translate(
            texts,
            num_return_sequences=search.count,
            return_scores=search.scores,
            seed=search.seed,
            batch_size=search.batch_size,
            keep_placeholders=search.keep_placeholders,
            glossary=search.glossary,
            **search.languages,
            **search.settings,
        )
        return [
            [
                Candidate(one.text, len(one.tokens), _mean(one.token_scores) if search.scores else None)
                for one in (best, *best.alternatives)
            ]
            for best in found
        ]

    def count(self, texts: Sequence[str], search: Search, target: bool = False) -> list[int]:
        """As `BulkTranslator`."""
        return self._translator.count_tokens(texts, target=target, **search.languages)

    def score(self, pairs: Sequence[tuple[str, str]], search: Search) -> list[Scored]:
        """As `BulkTranslator`."""
        sources, targets = [source for source, _ in pairs], [target for _, target in pairs]
        return self._translator.score(sources, targets, **search.languages)


class TorchTranslator:
    """A model in torch, on the device where it is.

    Args:
        model: An encoder-decoder model.
        tokenizer: Its tokenizer.
        name: What it computes with, in words.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        from hf_nmsparse.pipeline import longest_source, longest_target

        self._model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.longest, self.longest_target = longest_source(model, tokenizer), longest_target(model, tokenizer)

    def translate(self, texts: Sequence[str], search: Search) -> list[list[Candidate]]:
        """As `BulkTranslator`; texts of like length make a batch.

        Raises:
            ValueError: As `pipeline.translate` raises it, a batch does not fit the device, or there is a glossary.
        """
        if search.glossary is not None:
            raise ValueError(f"glossary: needs the native engine, and {self.name} translates; leave it out")
        with self._fitting(search.batch_size):
            found = self._translated(texts, search)
            if search.keep_placeholders:
                self._keep_placeholders(texts, found, search)
            return found

    def count(self, texts: Sequence[str], search: Search, target: bool = False) -> list[int]:
        """As `BulkTranslator`."""
        direction = self._direction(search)
        rows = (self._encoded_targets if target else self._encoded)(texts, direction, inf)
        return list(map(len, rows))

    def score(self, pairs: Sequence[tuple[str, str]], search: Search) -> list[Scored]:
        """As `BulkTranslator`; pairs of like length make a batch.

        Raises:
            ValueError: A language is unknown, the decoder's first token is, or a batch does not fit the device.
        """
        import torch
        from torch.nn.utils.rnn import pad_sequence

        direction = self._direction(search)
        if not direction.settings:
            check_target(self._model, self.tokenizer, {})
        start = direction.settings.get("decoder_start_token_id", start_token(self._model))
        start = self._model.generation_config.bos_token_id if start is None else start
        if start is None or "tgt_lang" in direction.settings:  # whose `generate` knows how to begin
            raise ValueError(f"score: {self._model.config.model_type} tells no decoder_start_token_id; set it")
        rows = self._encoded([source for source, _ in pairs], direction, self.longest)
        targets = self._encoded_targets([target for _, target in pairs], direction, self.longest_target)
        check_tokens(rows, len(self._model.get_input_embeddings().weight))
        check_tokens(targets, len(self._model.get_output_embeddings().weight))
        longest_first = sorted(range(len(pairs)), key=lambda place: (-len(targets[place]), -len(rows[place])))
        found: list[Any] = [None] * len(pairs)
        with self._fitting(search.batch_size):
            for first in range(0, len(pairs), search.batch_size):
                places = longest_first[first : first + search.batch_size]
                begun = [torch.tensor([start, *targets[place]]) for place in places]
                given = pad_sequence(begun, batch_first=True, padding_value=self.tokenizer.pad_token_id)
                batch = [targets[place] for place in places]
                scores = self._scores([rows[place] for place in places], given.to(self._model.device), batch)
                for place, target, each in zip(places, batch, scores, strict=True):
                    found[place] = Scored(sum(each), tuple(target), tuple(each))
        return found

    def _direction(self, search: Search) -> Direction:
        languages = search.languages.get("src_lang"), search.languages.get("tgt_lang")
        return direction_of(self._model, self.tokenizer, *languages)

    def _encoded(self, texts: Sequence[str], direction: Direction, limit: float) -> list[list[int]]:
        return encode(self.tokenizer, [direction.prompt + text for text in texts], limit, direction.frame)

    def _encoded_targets(self, targets: Sequence[str], direction: Direction, limit: float) -> list[list[int]]:
        own = self._model.generation_config.forced_bos_token_id
        forced = direction.settings.get("forced_bos_token_id", own)
        return encode_targets(self.tokenizer, list(targets), limit, direction, forced)

    @contextmanager
    def _fitting(self, batch_size: int) -> Iterator[None]:
        """Says in one line that a batch does not fit the device."""
        import torch

        try:
            yield
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"batch_size: {batch_size} does not fit {self.name}: {reason}; lower it") from error

    def _translated(self, texts: Sequence[str], search: Search) -> list[list[Candidate]]:
        import torch

        from hf_nmsparse.pipeline import generated

        if search.settings.get("do_sample"):
            torch.manual_seed(search.seed)
        languages = (search.languages.get("src_lang"), search.languages.get("tgt_lang"))
        settings = {**search.settings, "num_return_sequences": search.count}
        found: list[list[Candidate]] = [[] for _ in texts]
        batches = generated(self._model, self.tokenizer, list(texts), search.batch_size, *languages, settings)
        for places, sources, output in batches:
            targets = [self._cut(row) for row in output[:, 1:].tolist()]  # [batch * sequences]
            scores: list[float | None] = [None] * len(targets)
            if search.scores:
                given = [source for source in sources for _ in range(search.count)]
                scores[:] = map(_mean, self._scores(given, output, targets))
            decoded = self.tokenizer.batch_decode(output, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            each = list(map(Candidate, decoded, map(len, targets), scores))
            for row, place in enumerate(places):
                found[place] = each[row * search.count : (row + 1) * search.count]
        return found

    def _keep_placeholders(self, texts: Sequence[str], found: list[list[Candidate]], search: Search) -> None:
        """Translates again what has lost placeholders, with short ones in their place."""
        masked = masked_where_lost(texts, [best.text for best, *_ in found])
        for place, (best, *others) in enumerate(found):
            found[place] = [best, *(one for one in others if keeps_placeholders(texts[place], one.text))]
        again = self._translated([mask.text for mask in masked.values()], search)
        for (place, mask), candidates in zip(masked.items(), again, strict=True):
            found[place] = [Candidate(mask.restored(one.text), one.tokens, one.score) for one in candidates]

    def _cut(self, row: list[int]) -> list[int]:
        """A translation without the padding behind its EOS."""
        own = self._model.generation_config.eos_token_id
        ends = set(own if isinstance(own, list) else [own])
        return row[: next((place + 1 for place, token in enumerate(row) if token in ends), len(row))]

    def _scores(
        self, sources: Sequence[Sequence[int]], output: Any, targets: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """The log-probability of each translation's tokens; before them ``output`` has the start token."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        rows = [torch.tensor(source, device=output.device) for source in sources]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)  # [batch, source]
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        with torch.no_grad():
            logits = self._model(input_ids=ids, attention_mask=mask, decoder_input_ids=output[:, :-1]).logits
        # [batch, target]
        of_tokens = logits.float().log_softmax(-1).gather(-1, output[:, 1:, None]).squeeze(-1)
        return [scores[: len(target)] for scores, target in zip(of_tokens.tolist(), targets, strict=True)]


def load_translator(model: str, compute: str, threads: int, device: str) -> BulkTranslator:
    """The engine where it runs the model and a CPU is to translate, transformers otherwise.

    Args:
        model: Its folder, or its name on the Hub.
        compute: What the engine computes in, as `Translator` takes it.
        threads: How many a CPU translates with.
        device: ``"cpu"``, or another as torch calls it.

    Raises:
        ValueError: The model cannot be loaded, or ``compute`` is asked for and the engine cannot be taken.
    """
    why = f"a device of {device}"
    if device == "cpu":
        try:
            return EngineTranslator(model, compute, threads)
        except ValueError as error:
            why = str(error)
    if compute != "auto":
        raise ValueError(f"compute: {compute!r} is for the native engine, which is not taken for {why}; leave it out")
    import torch
    from transformers import AutoTokenizer

    from hf_nmsparse.loading import load_seq2seq

    dtype: Any = "auto"
    if device == "cpu":
        dtype = torch.float32
        torch.set_num_threads(threads)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        loaded: Any = load_seq2seq(model, dtype=dtype, trust_remote_code=False)
    except (OSError, ImportError) as error:
        [reason, *_] = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"model: {model} cannot be loaded: {reason}") from error
    return TorchTranslator(loaded.to(device), tokenizer, f"transformers on {device}")


def translate_each(
    texts: Sequence[str], translator: BulkTranslator, search: Search, longest: float = float("inf"), prefix: str = ""
) -> list[list[Candidate] | str]:
    """For each text its translations, or why it has none; texts that are equal are translated once.

    Args:
        texts: The texts.
        translator: Who translates.
        search: How.
        longest: Most tokens of a text.
        prefix: Put before every text.
    """
    unique = [text for text in dict.fromkeys(texts) if text.strip()]
    longest = min(longest, translator.longest)
    counts = translator.count([prefix + text for text in unique], search)
    fitting = [text for text, count in zip(unique, counts, strict=True) if count <= longest]
    found: dict[str, list[Candidate] | str] = dict.fromkeys(unique, TOO_LONG)
    translations = translator.translate([prefix + text for text in fitting], search)
    for text, candidates in zip(fitting, translations, strict=True):
        found[text] = [one for one in candidates if one.text.strip()] or NOTHING
    return [found.get(text, BLANK) for text in texts]


def score_each(
    pairs: Sequence[tuple[str, str]],
    translator: BulkTranslator,
    search: Search,
    longest: float = float("inf"),
    prefix: str = "",
) -> list[Scored | str]:
    """For each pair the log-probabilities of its translation, or why it has none; equal pairs are scored once.

    Args:
        pairs: Texts and their translations.
        translator: Who scores.
        search: Its languages and its size of batches.
        longest: Most tokens of a text.
        prefix: Put before every text.
    """
    unique = [pair for pair in dict.fromkeys(pairs) if all(map(str.strip, pair))]
    found: dict[tuple[str, str], Scored | str] = dict.fromkeys(unique, TOO_LONG)
    longest = min(longest, translator.longest)
    sources = translator.count([prefix + source for source, _ in unique], search)
    targets = translator.count([target for _, target in unique], search, target=True)
    fitting = [
        pair
        for pair, source, target in zip(unique, sources, targets, strict=True)
        if source <= longest and target <= translator.longest_target
    ]
    scores = translator.score([(prefix + source, target) for source, target in fitting], search)
    found |= {pair: one if isfinite(one.total) else IMPOSSIBLE for pair, one in zip(fitting, scores, strict=True)}
    return [found.get(pair, BLANK) for pair in pairs]


def _mean(scores: Sequence[float] | None) -> float:
    return sum(scores) / len(scores) if scores else 0.0
