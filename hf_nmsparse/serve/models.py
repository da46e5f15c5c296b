"""The models of a server: which translates from which language into which, and how a request comes through it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from threading import Event
from typing import Any, Protocol, TypeVar

from starlette.requests import Request

from hf_nmsparse.html_text import Pages
from hf_nmsparse.marked_texts import MarkedTexts
from hf_nmsparse.markup import Marked
from hf_nmsparse.paragraphs import Paragraphs, language_code
from hf_nmsparse.placeholders import placeholders
from hf_nmsparse.serve.batcher import Batcher, Observer, Settings, Translates, as_exception
from hf_nmsparse.serve.errors import RequestError
from hf_nmsparse.serve.limits import Limits, finished
from hf_nmsparse.serve.metrics import Metrics
from hf_nmsparse.texts import languages_of
from hf_nmsparse.translations import Translation, of_paragraphs
from hf_nmsparse.translator import Translator

__all__ = ["Mended", "Model", "Models", "Route", "load_models"]

T = TypeVar("T")

_BRIEF = 1000  # characters that are cut and counted in less time than it takes to have a thread do it

_NAME = re.compile(r"(?:([\w-]+):([\w-]+)=)?(.+)", re.DOTALL)


class ServedTranslator(Translates, Protocol):
    """What a server needs of a `Translator`."""

    def paragraphs(self, texts: list[str], *, src_lang: str | None, tgt_lang: str | None, split: str) -> Paragraphs:
        """Texts as sentences that the model takes whole, counted."""
        ...

    def marked(self, texts: MarkedTexts, paragraphs: Paragraphs, found: Sequence[Translation]) -> list[Marked]:
        """Translations with the marks of their texts."""
        ...

    def stream(self, text: str, **settings: Any) -> Generator[str, None, bool]:
        """The pieces of a translation, and whether it runs in a loop."""
        ...


@dataclass(frozen=True)
class Model:
    """A model that is served.

    Attributes:
        translator: It, translating on one thread for each call.
        sources: Codes of the languages that it translates from.
        targets: Codes of those that it translates into.
        names_source: Whether it is told the source language of a text.
        names_target: Whether it is told the target language.
    """

    translator: ServedTranslator
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    names_source: bool = False
    names_target: bool = False


@dataclass(frozen=True)
class Mended:
    """A whole translation, in the place of the pieces that came before it."""

    text: str


class Route:
    """A model at work, in one direction.

    Args:
        model: The model.
        at_work: Its queue and its threads.
        source: The source language of a request.
        target: The target language.
    """

    def __init__(self, model: Model, at_work: _AtWork, source: str, target: str) -> None:
        self._translator, self._at_work, self._source = model.translator, at_work, source
        self._languages = {
            "src_lang": source if model.names_source else None,
            "tgt_lang": target if model.names_target else None,
        }

    async def translate(
        self, request: Request, texts: Sequence[str], limits: Limits, **settings: Any
    ) -> list[Translation]:
        """Translates the texts of a request sentence by sentence, with those of others.

        Args:
            request: The request, whose body has been read.
            texts: Its texts.
            limits: Of a request.
            **settings: As `Translator.translate` takes them.

        Raises:
            RequestError: A text or a setting is refused, or the server has too much to do.
            ClientDisconnect: The client went away.
        """
        limits.check(texts)
        paragraphs = await self._checked(texts, partial(self._counted, list(texts)), settings)
        return of_paragraphs(paragraphs, await self._sentences(request, paragraphs, limits, settings))

    async def translate_html(
        self, request: Request, pages: Sequence[str], limits: Limits, **settings: Any
    ) -> list[str]:
        """Translates the text of pages, as `Translator.translate_html` does.

        Args:
            request: The request, whose body has been read.
            pages: Its pages, or parts of some.
            limits: Of a request.
            **settings: As `Translator.translate_marked` takes them.

        Raises:
            RequestError: As `translate` does.
            ClientDisconnect: The client went away.
        """
        limits.check(pages)
        settings = {**settings, "return_attention": True}

        def read(settings: dict[str, Any]) -> tuple[Pages, MarkedTexts, Paragraphs]:
            found = Pages(pages)
            texts = MarkedTexts(found.texts)
            return found, texts, self._counted(texts.plain, settings)

        found, texts, paragraphs = await self._checked(pages, read, settings)
        sentences = await self._sentences(request, paragraphs, limits, settings)

        def filled() -> list[str]:
            return found.filled(self._translator.marked(texts, paragraphs, sentences))

        return await asyncio.get_running_loop().run_in_executor(self._at_work.checking, filled)

    async def _sentences(
        self, request: Request, paragraphs: Paragraphs, limits: Limits, settings: dict[str, Any]
    ) -> list[Translation]:
        given = {**self._languages, "break_loops": True, "keep_placeholders": True, **settings}
        key: Settings = tuple(sorted(given.items()))
        futures = self._at_work.batcher.submit(paragraphs.sentences, paragraphs.lengths, key)
        return await finished(request, futures, limits.seconds)

    async def stream(self, text: str, limits: Limits, **settings: Any) -> AsyncGenerator[str | Mended]:
        """The pieces of the translation of a text, as `Translator.stream` gives them.

        A sentence that holds placeholders is one piece, so that all of them come back, as they do in `translate`. Where
        another came as a loop the last piece is `Mended`: what `translate` gives of the whole text.

        All that can be refused is refused at once. As many texts stream at a time as there are threads. Where the
        iterator is closed the translation ends.

        Raises:
            RequestError: As `translate` does; while the pieces come, that it takes too long.
        """
        limits.check([text])
        paragraphs = await self._checked([text], partial(self._counted, [text]), settings)
        if self._at_work.streams >= self._at_work.threads + limits.waiting:
            raise RequestError(429, f"{self._at_work.streams} texts stream or wait already; come again")
        return self._pieces(paragraphs, limits.seconds, settings)

    async def _pieces(
        self, paragraphs: Paragraphs, seconds: float, settings: dict[str, Any]
    ) -> AsyncGenerator[str | Mended]:
        loop, found = asyncio.get_running_loop(), asyncio.Queue[str | Mended | Exception | None]()
        closed, at_work = Event(), self._at_work
        whole = {**self._languages, "break_loops": True, "keep_placeholders": True, **settings}
        looped = False

        def stream(sentence: str) -> Generator[str]:
            nonlocal looped
            if placeholders(sentence):  # whether all come back is known at its end
                yield self._translator.translate([sentence], **whole)[0].text
            elif (yield from self._translator.stream(sentence, **self._languages, **settings)):
                looped = True

        def work() -> None:
            end: Exception | None = None
            try:
                with closing(paragraphs.streamed(stream)) as pieces:
                    for piece in pieces:
                        if closed.is_set():
                            return
                        loop.call_soon_threadsafe(found.put_nowait, piece)
                if looped:
                    [best] = of_paragraphs(paragraphs, self._translator.translate(paragraphs.sentences, **whole))
                    if best.looped:  # the settings may forbid loops as far as it can be done
                        loop.call_soon_threadsafe(found.put_nowait, Mended(best.text))
            except BaseException as error:  # raised where the pieces are read
                end = as_exception(error)
            loop.call_soon_threadsafe(found.put_nowait, end)

        at_work.streams += 1
        future, until = at_work.streaming.submit(work), loop.time() + seconds
        try:
            while (piece := await asyncio.wait_for(found.get(), until - loop.time())) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        except asyncio.TimeoutError:
            raise RequestError(503, f"no translation within {seconds:g} seconds; come again") from None
        finally:
            at_work.streams -= 1
            closed.set()
            future.cancel()

    async def _checked(self, texts: Sequence[str], read: Callable[[dict[str, Any]], T], settings: dict[str, Any]) -> T:
        """What is read of a request, by a thread where that takes long; what `translate` would refuse is refused."""
        try:
            if sum(map(len, texts)) <= _BRIEF:
                return read(settings)
            return await asyncio.get_running_loop().run_in_executor(self._at_work.checking, read, settings)
        except RequestError:
            raise
        except ValueError as error:
            raise RequestError(400, str(error)) from error

    def _counted(self, texts: list[str], settings: dict[str, Any]) -> Paragraphs:
        """The texts as sentences, counted."""
        self._at_work.check(tuple(sorted((self._languages | settings).items())))
        return self._translator.paragraphs(texts, **self._languages, split=language_code(self._source))


class _AtWork:
    """The threads of a model."""

    def __init__(self, model: Model, threads: int, max_tokens: int, most_waiting: int, observer: Observer) -> None:
        self.batcher = Batcher(model.translator, threads, max_tokens, most_waiting, observer)
        self.check = lru_cache(partial(_check, model.translator))  # requests ask for the same again and again
        self.checking = ThreadPoolExecutor(1, "nmsparse-check")
        self.streaming = ThreadPoolExecutor(threads, "nmsparse-streams")
        self.threads, self.streams = threads, 0

    def close(self) -> None:
        self.batcher.close()
        self.checking.shutdown()
        self.streaming.shutdown()


def _check(translator: Translates, settings: Settings) -> None:
    """Refuses settings that `translate` would refuse."""
    translator.translate([], **dict(settings))


class Models:
    """The models of a server, at work from `start` to `close`.

    Args:
        models: The models. Where several translate a pair the first does.
        threads: How many texts or batches each translates at once.
        max_tokens: Most tokens of a batch.
    """

    def __init__(self, models: Iterable[Model], threads: int, max_tokens: int = 1024) -> None:
        self._models = list(models)
        if not self._models:
            raise ValueError("serve: there is no model; name at least one")
        self._threads, self._max_tokens = threads, max_tokens
        self._at_work: list[_AtWork] = []

    def start(self, limits: Limits, metrics: Metrics) -> None:
        """Begins to work."""
        self._at_work = [
            _AtWork(model, self._threads, self._max_tokens, limits.waiting, metrics) for model in self._models
        ]

    def close(self) -> None:
        """Finishes what was taken."""
        for each in self._at_work:
            each.close()

    @property
    def languages(self) -> dict[str, list[str]]:
        """All languages by their codes, and into which each is translated: into none, where it is a target alone."""
        found: dict[str, list[str]] = {}
        for model in self._models:
            for source in model.sources:
                known = found.setdefault(source, [])
                known += [target for target in model.targets if target != source and target not in known]
        return found | {target: [] for model in self._models for target in model.targets if target not in found}

    def route(self, source: str, target: str) -> Route:
        """The model that translates from one language into another.

        Raises:
            RequestError: There is none.
        """
        for model, at_work in zip(self._models, self._at_work, strict=True):
            if source in model.sources and target in model.targets and source != target:
                return Route(model, at_work, source, target)
        sources = list(dict.fromkeys(code for model in self._models for code in model.sources))
        targets = [code for model in self._models if source in model.sources for code in model.targets]
        if source == "auto":
            raise RequestError(400, f"source auto: no language is detected here; name one of {_some(sources)}")
        if source not in sources:
            raise RequestError(400, f"source {source!r} is not translated here; name one of {_some(sources)}")
        raise RequestError(
            400, f"{source} is not translated into {target!r} here; name one of {_some(dict.fromkeys(targets))}"
        )


def _some(codes: Iterable[str]) -> str:
    listed = list(codes)
    return ", ".join(listed[:10]) + (f" and {len(listed) - 10} more" if len(listed) > 10 else "")


def load_models(
    names: Sequence[str],
    threads: int,
    max_tokens: int = 1024,
    compute: str = "auto",
    load: Callable[..., Any] = Translator,
) -> Models:
    """Loads models.

    Args:
        names: Folders, or names on the Hub; before each its languages, as in ``en:de=outputs/demo/packed``, where the
            model does not name them itself as multilingual ones do.
        threads: How many texts or batches each translates at once.
        max_tokens: Most tokens of a batch.
        compute: As `Translator` takes it.
        load: What makes a translator of a name.

    Raises:
        PackedFormatError: A file is damaged.
        ValueError: A name has no form, its languages are unknown, a model does not load, or none of its pairs would
            ever be asked of it, because models before it translate them all.
    """
    models, taken = list[Model](), set[tuple[str, str]]()
    for name in names:
        model = _load(name, compute, load)
        pairs = set(product(model.sources, model.targets))
        if pairs <= taken:
            raise ValueError(f"serve: {name}: models before it translate all that it does; name it first, or drop it")
        taken |= pairs
        models.append(model)
    return Models(models, threads, max_tokens)


def _load(name: str, compute: str, load: Callable[..., Any]) -> Model:
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise ValueError(f"serve: a model is named as PATH or SOURCE:TARGET=PATH, got {name!r}")
    source, target, path = parts.groups()
    translator = load(path, compute=compute, threads=1)
    if source is None:
        codes = tuple(languages_of(translator.tokenizer))
        if not codes:
            raise ValueError(f"serve: {path} does not say its languages; name them, as in en:de={path}")
        return _told(Model(translator, codes, codes), [(True, True)])
    if source == target:
        raise ValueError(f"serve: {name}: a model translates from one language into another; name two")
    # T5 and multilingual models are told both, OPUS-MT of several targets the target, and models of one pair none.
    return _told(Model(translator, (source,), (target,)), [(True, True), (False, True), (False, False)])


def _told(model: Model, ways: Sequence[tuple[bool, bool]]) -> Model:
    """The model, with which languages it is told: the first way that it takes."""
    reasons = []
    for names_source, names_target in ways:
        languages = {
            "src_lang": model.sources[0] if names_source else None,
            "tgt_lang": model.targets[-1] if names_target else None,
        }
        try:
            model.translator.translate([], **languages)
        except ValueError as error:
            reasons.append(error)
        else:
            return Model(model.translator, model.sources, model.targets, names_source, names_target)
    raise reasons[0]
