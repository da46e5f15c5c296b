"""Text in, text out on the native engine: a process that translates needs neither torch nor transformers."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from math import inf
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import numpy as np

from hf_nmsparse.alignment import attended, token_shares, word_spans
from hf_nmsparse.engine_files import COMPUTES, load_engine
from hf_nmsparse.forced_terms import looks_at, next_term
from hf_nmsparse.generation_settings import Search, plain, read_settings, search_of
from hf_nmsparse.glossary import Glossary, missing
from hf_nmsparse.html_text import translate_html
from hf_nmsparse.kernels.engine import Array, Hypothesis
from hf_nmsparse.loops import NO_REPEAT_NGRAM_SIZE, forbids_loops, loops
from hf_nmsparse.marked_texts import MarkedTexts
from hf_nmsparse.markup import Marked
from hf_nmsparse.masking import masked_where_lost
from hf_nmsparse.paragraphs import Paragraphs, named_language
from hf_nmsparse.placeholders import keeps_placeholders
from hf_nmsparse.shortlist import read as read_shortlist
from hf_nmsparse.sparsity_record import one_of
from hf_nmsparse.streaming import pieces
from hf_nmsparse.text_tokenizer import load_tokenizer
from hf_nmsparse.texts import (
    Direction,
    check_target,
    check_tokens,
    direction_of,
    encode,
    encode_targets,
    longest_text,
    read_texts,
)
from hf_nmsparse.translations import Scored, Translation, of_paragraphs

__all__ = ["Translator", "cpus"]

_CHUNK = 4096  # sentences of an iterable that are sorted and translated together
_WATCHED = 256  # sentences whose attention is held at a time
_STEP = 0x9E3779B97F4A7C15  # between the seeds of two sentences, as in csrc/engine/engine.cpp

_Languages = tuple[str | None, str | None]  # of a call: the source, and the target

_Watch = Callable[[int, list[int]], None]  # as the engine calls it

# What is on the Hub beside these is not the model's weights or its tokenizer.
_FILES = ["*.json", "*.safetensors", "*.spm", "*.model", "*.txt"]


class Translator:
    """A model that translates on this machine's CPU. Threads may share one.

    A sentence's translation does not depend on the others of its call, on the order or on the number of threads.

    Args:
        model: Its folder, or its name on the Hub: packed files, or safetensors of a dense model.
        compute: ``"auto"`` computes packed files in the numbers that they hold and dense ones in fp32. ``"int8"``,
            ``"bf16"`` and ``"fp32"`` say in what all products are computed, of dense models too.
        threads: How many translate at once; all CPUs of this process if None.
        src_lang: The source language where a call names none; multilingual models only.
        tgt_lang: The target language where a call names none.
        shortlist: Whether the shortlist in the folder is used, where `nmsparse shortlist` has left one: the head is
            computed for a sentence's candidates alone.
        half_cache: Whether the decoder keeps keys and values in fp16. That is half the memory, and a few percent faster
            in large batches; with int8 about 4 sentences of 100 come out otherwise than in transformers' loop, where it
            is 1 with fp32.
        revision: Branch, tag or commit on the Hub.
        token: For the Hub, as ``from_pretrained`` takes it.

    Raises:
        PackedFormatError: A file is damaged.
        ValueError: The engine does not run the model or is not installed, or there is no such model.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        compute: str = "auto",
        threads: int | None = None,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        shortlist: bool = True,
        half_cache: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> None:
        one_of("compute", compute, COMPUTES, "translator")
        threads = plain(threads)
        if threads is not None and (type(threads) is not int or not 1 <= threads <= 1024):
            raise ValueError(f"translator: threads are 1 to 1024, got {threads!r}")
        self._folder = _folder(model, revision, token)
        self._threads = cpus() if threads is None else threads
        self._languages = src_lang, tgt_lang
        loaded = load_engine(self._folder, compute, self._threads, half_cache)
        self._engine, self._spec, self.formats = loaded.engine, loaded.spec, loaded.formats
        candidates = read_shortlist(self._folder) if shortlist else None
        self._has_shortlist = candidates is not None
        if candidates is not None:
            self._engine.use_shortlist(candidates.offsets, candidates.ids, candidates.always)
        self._settings = read_settings(self._folder, loaded.config)
        # What `texts` asks of a model.
        self._model = SimpleNamespace(
            config=SimpleNamespace(**loaded.config),
            generation_config=SimpleNamespace(
                **{
                    name: self._settings.get(name)
                    for name in ("decoder_start_token_id", "forced_bos_token_id", "bos_token_id")
                }
            ),
            generate=lambda: None,
        )
        self._loading, self._one_at_a_time = Lock(), Lock()
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded when it is first needed.

        Raises:
            ValueError: There is none that loads.
        """
        if self._tokenizer is None:
            with self._loading:
                if self._tokenizer is None:
                    self._tokenizer = load_tokenizer(self._folder, self._model.config.model_type)
        return self._tokenizer

    @property
    def _tokenizer_alone(self) -> AbstractContextManager[Any]:
        """Where one thread after the other uses the tokenizer, if it does not bear several at once."""
        return nullcontext() if getattr(self.tokenizer, "is_thread_safe", False) else self._one_at_a_time

    @property
    def longest_source(self) -> float:
        """How many tokens of a text are translated, with those around it; what is longer is cut.

        Raises:
            ValueError: The tokenizer says nothing of use.
        """
        return min(longest_text(self.tokenizer), self._spec.config.encoder.positions or float("inf"))

    @property
    def longest_target(self) -> float:
        """How many tokens of a given translation are scored, with those around it.

        Raises:
            ValueError: The tokenizer says nothing of use.
        """
        return min(longest_text(self.tokenizer), self._spec.config.decoder.positions or float("inf"))

    def translate(
        self,
        texts: Iterable[str],
        *,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        return_scores: bool = False,
        split: bool | str = False,
        break_loops: bool = False,
        keep_placeholders: bool = False,
        glossary: Glossary | None = None,
        return_attention: bool = False,
        seed: int = 0,
        batch_size: int = 64,
        batch_tokens: int = 4096,
        **settings: Any,
    ) -> list[Translation]:
        """Translates texts, in any order of lengths: of one sentence each, or cut into sentences with ``split``.

        Args:
            texts: The texts: a list, an array, a Series, a column, a generator. A blank one has a blank translation.
            src_lang: Code of the source, such as ``"eng_Latn"``; multilingual models only.
            tgt_lang: Code of the target.
            return_scores: Whether log-probabilities are wanted.
            split: Whether texts are cut into sentences, and these, where they are longer than the model takes, at the
                ends of clauses. White space between them stays as it is. Without it a model may leave out sentences.
                The code of a language splits by its rules, where nothing else says what the source is.
            break_loops: Whether a sentence that comes out as a loop is translated again without repeats.
            keep_placeholders: Whether ``{name}``, ``%s``, ``<0/>`` and addresses come back as they are, as
                `placeholders` knows them: a sentence that loses some is translated again with short ones in their
                place. Of alternatives those are left out that lose some.
            glossary: Terms that have one right translation. A sentence that lacks one is translated again from where it
                looked at the term, which is begun with the term's translation; there are no alternatives of it.
            return_attention: Whether the weights over the source are wanted.
            seed: Of ``do_sample``.
            batch_size: Sentences that a thread works on together; translations do not depend on it.
            batch_tokens: The same in tokens of the source.
            **settings: Those of ``generate`` by their names, such as ``num_beams``, ``max_new_tokens``,
                ``length_penalty``, ``num_return_sequences`` and ``do_sample``.

        Returns:
            One translation for each text.

        Raises:
            ValueError: A text is none, a language or a setting is unknown, or a setting is not possible.
        """
        given = list(read_texts(texts, "translate"))
        asked = _Asked(settings, return_scores, return_attention, seed, batch_size, batch_tokens)
        ways = _Ways(split, break_loops, keep_placeholders, glossary)
        paragraphs, found = self._translated(given, (src_lang, tgt_lang), asked, ways, 0)
        return found if paragraphs is None else of_paragraphs(paragraphs, found)

    def translate_iterable(
        self, texts: Iterable[str], *, chunk_size: int = _CHUNK, **arguments: Any
    ) -> Iterator[Translation]:
        """Translates texts as they come, in their order and in constant memory.

        Args:
            texts: The texts, which are read so many at a time.
            chunk_size: How many are sorted by length and translated together.
            **arguments: As `translate` takes them; the translations are the same.

        Raises:
            ValueError: As `translate` does, once the text is reached.
        """
        if type(chunk_size) is not int or chunk_size < 1:
            raise ValueError(f"translate: chunk_size needs at least 1, got {chunk_size!r}")
        waiting, first = read_texts(texts, "translate"), 0
        languages = arguments.pop("src_lang", None), arguments.pop("tgt_lang", None)
        ways = _Ways(**{name: arguments.pop(name) for name in _Ways.__dataclass_fields__ if name in arguments})
        asked = _Asked.of(arguments)
        while chunk := list(islice(waiting, chunk_size)):
            paragraphs, found = self._translated(chunk, languages, asked, ways, first)
            yield from found if paragraphs is None else of_paragraphs(paragraphs, found)
            first += len(found)

    def translate_marked(
        self,
        texts: Iterable[Marked],
        *,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        split: str | None = None,
        glossary: Glossary | None = None,
        **settings: Any,
    ) -> list[Marked]:
        """Translates texts with marks in them, which go with the words that they belong to.

        They are cut into sentences, loops are broken and placeholders kept, as `translate` does if it is told to.

        Args:
            texts: The texts, as their parts.
            src_lang: As in `translate`.
            tgt_lang: As in `translate`.
            split: Code of the language by whose rules they are cut; that of the source if None.
            glossary: As in `translate`.
            **settings: As in `translate`, but for ``num_return_sequences`` and the like.

        Raises:
            ValueError: As `translate` does, or in a text a tag closes nothing or is not closed.
        """
        marked, languages = MarkedTexts(texts), (src_lang, tgt_lang)
        paragraphs = self.paragraphs(marked.plain, src_lang=src_lang, tgt_lang=tgt_lang, split=split)
        asked = _Asked.of({**settings, "return_attention": True})
        ways = _Ways(break_loops=True, keep_placeholders=True, glossary=glossary)
        return self.marked(marked, paragraphs, self._translated(paragraphs.sentences, languages, asked, ways, 0)[1])

    def marked(self, texts: MarkedTexts, paragraphs: Paragraphs, found: Sequence[Translation]) -> list[Marked]:
        """Translations with the marks of their texts.

        Args:
            texts: The texts.
            paragraphs: Their plain texts as sentences.
            found: The translation of each sentence, with ``attention``.
        """
        looked = [partial(self.attended, *each) for each in zip(paragraphs.sentences, found, strict=True)]
        return texts.marked(paragraphs, [one.text for one in found], lambda number: looked[number]())

    def translate_html(self, pages: Iterable[str], **settings: Any) -> list[str]:
        """Translates the text of HTML and leaves all else as it is.

        Tags within a sentence go with its words, and each comes back once. What is code, or says ``translate="no"`` or
        ``class="notranslate"``, stays; so do attributes.

        Args:
            pages: The pages, or parts of some.
            **settings: As `translate_marked` takes them.

        Raises:
            ValueError: As `translate` does.
        """
        return translate_html(read_texts(pages, "translate"), lambda texts: self.translate_marked(texts, **settings))

    def stream(
        self, text: str, *, src_lang: str | None = None, tgt_lang: str | None = None, seed: int = 0, **settings: Any
    ) -> Generator[str, None, bool]:
        """Translates one sentence and gives its text piece by piece, each as soon as it is sure.

        With beams that is what all of them begin with. The pieces put together are the text that `translate` gives.
        Where transformers' tokenizer is a slow one, whose text may change with what follows, there is one piece.

        Args:
            text: The text.
            src_lang: As in `translate`.
            tgt_lang: As in `translate`.
            seed: As in `translate`.
            **settings: As in `translate`, but for ``num_return_sequences``.

        Returns:
            The pieces. The translation begins with the first that is asked for, and ends where the generator is closed.
            What ``yield from`` gives is whether it came out as a loop, which ``break_loops`` of `translate` breaks.

        Raises:
            ValueError: As `translate` does, at once.
        """
        asked = _Asked(settings, seed=seed)
        if not isinstance(text, str):
            raise ValueError(f"stream: takes one text, got {type(text).__name__}; translate takes several")
        task = self._task(list(read_texts([text], "stream")), src_lang, tgt_lang, asked)
        if task.search.config.returned > 1:
            raise ValueError("stream: gives one translation; leave num_return_sequences out")
        tokenizer = self.tokenizer
        grows = getattr(tokenizer, "is_fast", True)

        done: list[Translation] = []

        def translate(tell: Callable[[Sequence[int]], None]) -> Sequence[int]:
            watch = (lambda _, tokens: tell(tokens[1:])) if grows else None
            done.extend(self._done(task, 0, watch))
            return done[0].tokens

        def streamed() -> Generator[str, None, bool]:
            yield from pieces(translate, self._text_of)
            return loops(done[0].tokens, done[0].source)

        return streamed()

    def translate_ids(
        self,
        rows: Sequence[Sequence[int]],
        *,
        prefixes: Sequence[Sequence[int]] | None = None,
        return_scores: bool = False,
        return_attention: bool = False,
        seed: int = 0,
        batch_size: int = 64,
        batch_tokens: int = 4096,
        **settings: Any,
    ) -> list[Translation]:
        """Translates token ids, for those who have a tokenizer of their own.

        Args:
            rows: The ids of each sentence as the model takes them, with EOS and without padding.
            prefixes: For each sentence ids that its translation begins with, behind the start token.
            return_scores: As in `translate`.
            return_attention: As in `translate`.
            seed: As in `translate`.
            batch_size: As in `translate`.
            batch_tokens: As in `translate`.
            **settings: As in `translate`.

        Returns:
            One translation for each row, without a text.

        Raises:
            ValueError: An id or a setting is not possible.
        """
        asked = _Asked(settings, return_scores, return_attention, seed, batch_size, batch_tokens)
        rows = _rows("rows", rows)
        prefixes = [()] * len(rows) if prefixes is None else _rows("prefixes", prefixes)
        if len(prefixes) != len(rows):
            raise ValueError(f"translate: {len(rows)} sentences need as many prefixes, got {len(prefixes)}")
        found: list[Any] = [None] * len(rows)
        # A limit in new tokens is another length for each length of a prompt.
        for length in sorted(set(map(len, prefixes))):
            places = [place for place, prefix in enumerate(prefixes) if len(prefix) == length]
            search = self._search(asked, length + 1)
            self._run(search, rows, prefixes, places, places, asked, found)
        if not len(rows):
            self._search(asked)
        return found

    def score(
        self,
        sources: Iterable[str],
        targets: Iterable[str],
        *,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
    ) -> list[Scored]:
        """The log-probabilities of given translations: to filter a corpus, to rank, to say how sure the model is.

        Args:
            sources: The texts.
            targets: A translation of each.
            src_lang: Code of the source; multilingual models only.
            tgt_lang: Code of the target.

        Raises:
            ValueError: There are more of one than of the other, one is no text or is blank, or a language is unknown.
        """
        texts, others = list(read_texts(sources, "score")), list(read_texts(targets, "score"))
        if len(texts) != len(others):
            raise ValueError(f"score: {len(texts)} texts need as many translations, got {len(others)}")
        blank = next(
            (place for place, pair in enumerate(zip(texts, others, strict=True)) if not all(map(str.strip, pair))), None
        )
        if blank is not None:
            raise ValueError(f"score: pair {blank} has a blank side; leave it out")
        direction = self._direction(src_lang, tgt_lang)
        if not direction.settings:
            check_target(self._model, self.tokenizer, {})
        search = self._search(_Asked(direction.settings))
        rows = self._encoded(texts, direction)
        given = self._encoded_targets(others, direction, search, longest_text(self.tokenizer))
        check_tokens(given, self._spec.config.target_vocabulary)
        scores = self._engine.score(rows, [[search.start, *row] for row in given], self._threads)
        return [
            Scored(float(each[1:].sum(dtype="float64")), tuple(row), tuple(each[1:].tolist()))
            for row, each in zip(given, scores, strict=True)
        ]

    def count_tokens(
        self, texts: Iterable[str], *, src_lang: str | None = None, tgt_lang: str | None = None, target: bool = False
    ) -> list[int]:
        """How many tokens each text has, with those around it; `longest_source` of them are translated.

        Args:
            texts: The texts; a blank one has none.
            src_lang: Code of the source; multilingual models only.
            tgt_lang: Code of the target.
            target: Whether they are translations, of which `score` takes `longest_target` tokens.

        Raises:
            ValueError: A text is none, or a language is unknown.
        """
        given = list(read_texts(texts, "count_tokens"))
        direction, tokenizer = self._direction(src_lang, tgt_lang), self.tokenizer
        whole = [text for text in given if text.strip()]
        if target:
            rows = iter(self._encoded_targets(whole, direction, self._search(_Asked(direction.settings)), inf))
        else:
            with self._tokenizer_alone:
                rows = iter(encode(tokenizer, [direction.prompt + text for text in whole], inf, direction.frame))
        return [len(next(rows)) if text.strip() else 0 for text in given]

    def paragraphs(
        self,
        texts: Iterable[str],
        *,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        split: bool | str | None = None,
    ) -> Paragraphs:
        """Texts as sentences that this model takes whole, as ``split`` cuts them.

        Args:
            texts: The texts.
            src_lang: Code of the source; where nothing names it, it is taken for English.
            tgt_lang: Code of the target.
            split: Code of the language by whose rules they are cut; that of the source if None or True.

        Raises:
            ValueError: A text is none, or a language is unknown.
        """
        given, most = list(read_texts(texts, "translate")), self.longest_source
        own = named_language(split) or src_lang or self._languages[0] or getattr(self.tokenizer, "source_lang", None)
        count = partial(self.count_tokens, src_lang=src_lang, tgt_lang=tgt_lang)
        return Paragraphs(given, own, count, most)

    def check(self, **settings: Any) -> None:
        """Refuses settings as `translate` would, the model's own included.

        Raises:
            ValueError: As said.
        """
        self._search(_Asked(settings))

    def _translated(
        self, texts: list[str], languages: _Languages, asked: _Asked, ways: _Ways, first: int
    ) -> tuple[Paragraphs | None, list[Translation]]:
        """The translations of texts, or of their sentences where there are some, before which ``first`` came."""
        paragraphs = None
        if ways.split is not False:
            paragraphs = self.paragraphs(texts, src_lang=languages[0], tgt_lang=languages[1], split=ways.split)
        sentences = texts if paragraphs is None else paragraphs.sentences
        found = self._sentences(sentences, languages, asked, ways, first)
        if ways.keep_placeholders:
            self._keep_placeholders(sentences, found, languages, asked, ways, first)
        return paragraphs, found

    def _sentences(
        self, sentences: list[str], languages: _Languages, asked: _Asked, ways: _Ways, first: int
    ) -> list[Translation]:
        task = self._task(sentences, *languages, asked)
        found = self._done(task, first)
        if ways.break_loops:
            self._break_loops(task, found, first)
        found = self._with_texts(found)
        if ways.glossary is not None:
            target = self._direction(*languages).frame is None
            self._force_terms(sentences, found, task, ways.glossary, target)
        return found

    def _force_terms(
        self, sentences: list[str], found: list[Translation], task: _Task, glossary: Glossary, target: bool
    ) -> None:
        """Translates again what lacks terms of a glossary, one term of each sentence at a time, from left to right."""
        left = {place: glossary.terms(text) for place, text in enumerate(sentences)}
        scored = task.search.config.beams > 1 or bool(task.search.config.token_scores)
        settings = task.asked.with_settings({"num_return_sequences": 1})
        task = replace(task, asked=replace(settings, return_attention=True))
        todo = [place for place, terms in left.items() if missing(terms, found[place].text)]
        forced = dict(zip(todo, self._begun(task, todo, [()] * len(todo)), strict=True))
        begun = dict.fromkeys(todo, 0)  # the tokens of each that stay
        of_source = {place: token_shares(sentences[place], forced[place].source, self._text_of) for place in todo}
        while todo:
            starts: dict[int, tuple[tuple[int, ...], Array]] = {}
            for place in todo:
                one, text = forced[place], sentences[place]
                shares = token_shares(one.text, one.tokens, self._text_of)
                looked = attended(text, of_source[place], one.text, shares, _attention(one))
                end = len(one.tokens) - (one.tokens[-1:] in [(token,) for token in task.search.eos])
                lacking = missing(left[place], one.text)
                term, at = next_term(text, looked, shares, lacking, begun[place], end)
                left[place].remove(term)
                tokens = self._term_tokens(one.tokens[:at], term.forms[0], target)
                at = min(at, task.search.config.max_length - len(tokens) - 2)  # the start and a token behind
                if at >= begun[place]:
                    start = (*one.tokens[:at], *tokens)
                    looks = looks_at(text, of_source[place], term)
                    starts[place] = start, np.concatenate([_attention(one)[:at], [looks] * (len(start) - at)])
                    begun[place] = len(start)
            again = self._begun(task, list(starts), [start for start, _ in starts.values()])
            for (place, (start, rows)), one in zip(starts.items(), again, strict=True):
                forced[place] = replace(one, attention=np.concatenate([rows, _attention(one)[len(start) :]]))
            todo = [place for place in todo if missing(left[place], forced[place].text)]
        for place, one in forced.items():
            if one.tokens != found[place].tokens:
                whole = self._with_scores(one, task.search) if scored else one
                kept = whole.token_scores if settings.return_scores else None
                found[place] = replace(whole, token_scores=kept, looped=found[place].looped)
                if not settings.return_attention:
                    found[place] = replace(found[place], attention=None)

    def _begun(self, task: _Task, places: Sequence[int], starts: Sequence[tuple[int, ...]]) -> list[Translation]:
        """The translations of some texts of a task that begin with some tokens; attention to these is none."""
        rows, found = dict(zip(task.places, task.rows, strict=True)), dict[int, Translation]()
        for length in sorted(set(map(len, starts))):
            chosen = [(place, start) for place, start in zip(places, starts, strict=True) if len(start) == length]
            search = self._search(task.asked, length + 1)
            if length:  # behind a term a new word begins
                search = replace(search, begin_banned=[*search.begin_banned, *self._inside_words])
            hypotheses: list[Any] = [None] * len(chosen)
            self._run(
                search,
                [rows[place] for place, _ in chosen],
                [start for _, start in chosen],
                range(len(chosen)),
                [place for place, _ in chosen],
                task.asked,
                hypotheses,
                whole=True,
            )
            found |= zip((place for place, _ in chosen), hypotheses, strict=True)
        return self._with_texts(found[place] for place in places)

    @cached_property
    def _inside_words(self) -> list[int]:
        """The tokens that go on with a word."""
        tokenizer, size = self.tokenizer, self._spec.config.target_vocabulary
        with self._tokenizer_alone:
            (word,) = encode(tokenizer, ["a"], inf, ([], []))
        texts = (self._text_of([*word, token]) for token in range(size))
        return [token for token, text in enumerate(texts) if text[:1] == "a" and text[1:2].isalnum()]

    def _term_tokens(self, start: Sequence[int], form: str, target: bool) -> list[int]:
        """The tokens of a term in a translation behind some others."""
        tokenizer = self.tokenizer
        with self._tokenizer_alone:
            plain, spaced = encode(tokenizer, [form, f" {form}"], inf, ([], []), target)
        check_tokens([plain, spaced], self._spec.config.target_vocabulary)
        # Tokenizers of bytes want the space, and others add one of their own.
        before = self._text_of(start)
        return plain if self._text_of([*start, *plain]) == f"{before} {form}".strip() else spaced

    def _with_scores(self, one: Translation, search: Search) -> Translation:
        """A translation with the scores of all its tokens."""
        scores = self._engine.score([one.source], [[search.start, *one.tokens]], self._threads)[0][1:]
        score = float(scores.sum(dtype="float64")) / len(one.tokens) ** search.config.length_penalty
        return replace(one, score=score, token_scores=tuple(scores.tolist()))

    def _keep_placeholders(
        self,
        sentences: list[str],
        found: list[Translation],
        languages: _Languages,
        asked: _Asked,
        ways: _Ways,
        first: int,
    ) -> None:
        """Translates again what has lost placeholders, with short ones in their place."""
        for place, one in enumerate(found):
            if one.alternatives:
                kept = (other for other in one.alternatives if keeps_placeholders(sentences[place], other.text))
                found[place] = replace(one, alternatives=tuple(kept))
        masked = masked_where_lost(sentences, [one.text for one in found])
        if not masked:
            return
        looking = replace(asked, return_attention=True)
        again = self._sentences([mask.text for mask in masked.values()], languages, looking, ways, first)
        for (place, mask), one in zip(masked.items(), again, strict=True):
            best, *others = (
                replace(each, text=mask.restored(each.text, self.attended(mask.text, each)))
                for each in (one, *one.alternatives)
            )
            if not asked.return_attention:
                best, *others = (replace(each, attention=None) for each in (best, *others))
            found[place] = replace(best, masked=True, alternatives=tuple(others))

    def attended(self, sentence: str, translation: Translation) -> Array:
        """How much the words of a sentence's translation looked at those of the sentence.

        Args:
            sentence: The sentence.
            translation: Its translation, with ``attention``.

        Returns:
            fp32 ``[target words, source words]``, whose words `alignment.word_spans` tells.
        """
        attention, target = translation.attention, translation.text
        if attention is None:
            return np.zeros((len(word_spans(target)), len(word_spans(sentence))), np.float32)
        of_source = token_shares(sentence, translation.source, self._text_of)
        return attended(sentence, of_source, target, token_shares(target, translation.tokens, self._text_of), attention)

    def _break_loops(self, task: _Task, found: list[Translation], first: int) -> None:
        """Translates again what came out as a loop, where the call does not forbid repeats itself."""
        again = [index for index, place in enumerate(task.places) if loops(found[place].tokens, found[place].source)]
        if not again or forbids_loops(task.search.config.no_repeat_ngram):
            return
        asked = task.asked.with_settings({"no_repeat_ngram_size": NO_REPEAT_NGRAM_SIZE})
        places, rows = [task.places[index] for index in again], [task.rows[index] for index in again]
        done = self._done(_Task(task.count, places, rows, asked, self._search(asked)), first)
        for place in places:
            found[place] = replace(done[place], looped=True)

    def _task(self, texts: list[str], src_lang: str | None, tgt_lang: str | None, asked: _Asked) -> _Task:
        """What there is to do for some texts: all that can be refused is refused here."""
        direction = self._direction(src_lang, tgt_lang)
        for name, value in direction.settings.items():
            given = asked.settings.get(name)
            if given not in (None, value, self._settings.get(name)):
                raise ValueError(
                    f"translate: {name} {given} is another language than tgt_lang's; leave one of them out"
                )
        if not direction.settings:
            own = {name: value for name, value in asked.settings.items() if value is not None}
            check_target(self._model, self.tokenizer, own)
        asked = asked.with_settings(direction.settings)
        search = self._search(asked)
        places = [place for place, text in enumerate(texts) if text.strip()]
        return _Task(len(texts), places, self._encoded([texts[place] for place in places], direction), asked, search)

    def _done(self, task: _Task, first: int, watch: _Watch | None = None) -> list[Translation]:
        """The translations of a task before which ``first`` texts came, without their texts."""
        rows, seeds = task.rows, [first + place for place in task.places]
        found: list[Any] = [None] * len(rows)
        self._run(task.search, rows, [()] * len(rows), range(len(rows)), seeds, task.asked, found, watch)
        translations = [Translation("", ())] * task.count
        for place, translation in zip(task.places, found, strict=True):
            translations[place] = translation
        return translations

    def _direction(self, src_lang: str | None, tgt_lang: str | None) -> Direction:
        own = self._languages
        with_own = src_lang if src_lang is not None else own[0], tgt_lang if tgt_lang is not None else own[1]
        return direction_of(self._model, self.tokenizer, *with_own)

    def _encoded(self, texts: list[str], direction: Direction) -> list[list[int]]:
        tokenizer, limit = self.tokenizer, self.longest_source
        with self._tokenizer_alone:
            rows = encode(tokenizer, [direction.prompt + text for text in texts], limit, direction.frame)
        check_tokens(rows, self._spec.config.encoder.vocabulary)
        return rows

    def _encoded_targets(self, texts: list[str], direction: Direction, search: Search, limit: float) -> list[list[int]]:
        tokenizer, forced = self.tokenizer, search.config.forced_bos
        with self._tokenizer_alone:
            return encode_targets(tokenizer, texts, limit, direction, forced if forced >= 0 else None)

    def _search(self, asked: _Asked, prompt_length: int = 1) -> Search:
        return search_of(
            self._spec,
            self._settings,
            asked.settings,
            prompt_length,
            threads=self._threads,
            shortlist=self._has_shortlist,
            **asked.engine_fields(),
        )

    def _run(
        self,
        search: Search,
        rows: Sequence[Sequence[int]],
        prefixes: Sequence[Sequence[int]],
        places: Sequence[int],
        seeds: Sequence[int],
        asked: _Asked,
        found: list[Any],
        watch: _Watch | None = None,
        whole: bool = False,
    ) -> None:
        """Translates the rows at some places, each with a seed of its own place, into ``found``.

        What is found has its prefix with ``whole`` alone.
        """
        config = search.config
        size = _WATCHED if config.attention else _CHUNK
        runs = config.returned if config.sample else 1
        start = 0
        while start < len(places):
            # The engine counts seeds from the first sentence on, so that what it gets at once follows on each other.
            end = start + 1
            while end < len(places) and end - start < size and (not config.sample or seeds[end] == seeds[end - 1] + 1):
                end += 1
            chosen = places[start:end]
            seed = (asked.seed + seeds[start] * runs * _STEP) % 2**64
            config.seed_low, config.seed_high = seed & 0xFFFFFFFF, seed >> 32
            hypotheses = self._engine.translate(
                [rows[place] for place in chosen],
                config,
                [[search.start, *prefixes[place]] for place in chosen],
                search.eos,
                search.banned,
                search.begin_banned,
                watch,
            )
            for place, best in zip(chosen, hypotheses, strict=True):
                before = 1 if whole else len(prefixes[place]) + 1
                found[place] = _translation(best, before, tuple(rows[place]), search)
            start = end

    def _text_of(self, tokens: Sequence[int]) -> str:
        tokenizer = self.tokenizer
        with self._tokenizer_alone:
            text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _with_texts(self, translations: Iterable[Translation]) -> list[Translation]:
        return [
            replace(one, text=self._text_of(one.tokens), alternatives=tuple(self._with_texts(one.alternatives)))
            if one.tokens
            else one
            for one in translations
        ]


@dataclass(frozen=True)
class _Ways:
    """What is done about texts beside translating them, as `Translator.translate` says."""

    split: bool | str = False
    break_loops: bool = False
    keep_placeholders: bool = False
    glossary: Glossary | None = None

    def __post_init__(self) -> None:
        if self.glossary is not None and not isinstance(self.glossary, Glossary):
            raise ValueError(
                f"translate: glossary is no Glossary but {type(self.glossary).__name__}; "
                "give Glossary(terms) or Glossary.read(file)"
            )


@dataclass(frozen=True)
class _Task:
    """Some texts as the engine takes them.

    Attributes:
        count: How many texts there are.
        places: Of those that are not blank.
        rows: Their ids.
        asked: What the call asks for.
        search: How the engine goes about it.
    """

    count: int
    places: list[int]
    rows: list[list[int]]
    asked: _Asked
    search: Search


@dataclass(frozen=True)
class _Asked:
    """What a call asks for."""

    settings: dict[str, Any]
    return_scores: bool = False
    return_attention: bool = False
    seed: int = 0
    batch_size: int = 64
    batch_tokens: int = 4096

    def __post_init__(self) -> None:
        for name in ("batch_size", "batch_tokens", "seed"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        for name in ("batch_size", "batch_tokens"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < 2**31:
                raise ValueError(f"translate: {name} needs at least 1, got {value!r}")
        if type(self.seed) is not int:
            raise ValueError(f"translate: seed is a whole number, got {self.seed!r}")

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> _Asked:
        """What the keywords of `Translator.translate` ask for."""
        own = {name: arguments.pop(name) for name in cls.__dataclass_fields__ if name in arguments}
        return cls(arguments, **own)

    def with_settings(self, settings: dict[str, Any]) -> _Asked:
        return _Asked(
            {**self.settings, **settings}, **{name: getattr(self, name) for name in list(self.__dataclass_fields__)[1:]}
        )

    def engine_fields(self) -> dict[str, Any]:
        """The fields of the engine's settings beside those of ``generate``."""
        return {
            "token_scores": bool(self.return_scores),
            "attention": bool(self.return_attention),
            "batch_sentences": self.batch_size,
            "batch_tokens": self.batch_tokens,
        }


def _attention(one: Translation) -> Array:
    """What a translation looked at that was to tell it."""
    return np.zeros((len(one.tokens), len(one.source)), np.float32) if one.attention is None else one.attention


def _translation(
    hypotheses: Sequence[Hypothesis], prompt_length: int, source: tuple[int, ...], search: Search
) -> Translation:
    """The best of some hypotheses, with the others as its alternatives."""
    scored = search.config.beams > 1 or bool(search.config.token_scores)

    def one(hypothesis: Hypothesis, others: tuple[Translation, ...] = ()) -> Translation:
        scores, attention = hypothesis.token_scores, hypothesis.attention
        return Translation(
            "",
            tuple(hypothesis.tokens[prompt_length:].tolist()),
            hypothesis.score if scored else None,
            None if scores is None else tuple(scores[prompt_length:].tolist()),
            others,
            None if attention is None else attention[prompt_length:].copy(),
            source,
        )

    if not hypotheses:
        return Translation("", (), source=source)
    best, *others = hypotheses
    return one(best, tuple(map(one, others)))


def _rows(name: str, given: Any) -> list[Sequence[int]]:
    """Rows of ids, which are lists, tuples or arrays."""
    if isinstance(given, str | bytes | Mapping | set | frozenset) or not isinstance(given, Iterable):
        raise ValueError(f"translate: {name} are lists of ids in a list, got {type(given).__name__}")
    rows = list(given)
    for place, row in enumerate(rows):
        if isinstance(row, str | bytes | Mapping) or not hasattr(row, "__len__") or not hasattr(row, "__getitem__"):
            raise ValueError(f"translate: {name}: a list of ids is due at {place}, got {type(row).__name__}")
    return rows


def cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _folder(model: str | os.PathLike[str], revision: str | None, token: str | bool | None) -> Path:
    """The folder of a model, which the Hub's files are fetched to where it is the name of one there."""
    if not isinstance(model, str | os.PathLike):
        raise ValueError(f"translator: a model is a folder or a name on the Hub, got {type(model).__name__}")
    model = os.fspath(model)
    if os.path.isdir(model):  # noqa: PTH112  # pathlib raises where a name is too long
        return Path(model)
    if os.path.exists(model) or model.count("/") != 1:  # noqa: PTH110
        raise ValueError(f"no folder {model}, and no 'user/name' on the Hub either")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(model, revision=revision, token=token, allow_patterns=_FILES, ignore_patterns=["*/*"])
        )
    except Exception as error:  # up to the Hub's client: of the network, of names, of rights
        reason = " ".join(str(error).split())
        raise ValueError(f"translator: {model} cannot be had from the Hub: {reason}") from error
