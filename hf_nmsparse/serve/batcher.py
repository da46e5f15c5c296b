"""Texts of many requests put together: what comes while a batch is translated makes the next one.

A text that finds a thread idle is translated at once. There is no wait for company: under load it comes by itself.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Thread, main_thread
from typing import Any, Protocol

from hf_nmsparse.serve.errors import RequestError
from hf_nmsparse.terminal import named
from hf_nmsparse.translations import Translation

__all__ = ["Batcher", "Observer", "Settings", "Translates", "as_exception"]

_LOOK_SECONDS = 1.0  # how often idle threads look whether the process ends

Settings = tuple[tuple[str, Any], ...]
"""Keywords of `Translator.translate`: texts are translated together where they are equal."""


class Translates(Protocol):
    """What a batcher needs of a `Translator`. Several threads call it at once."""

    def translate(self, texts: list[str], **settings: Any) -> list[Translation]:
        """One translation for each text."""
        ...


class Observer(Protocol):
    """Who counts batches."""

    def waiting(self, change: int) -> None:
        """So many texts more wait."""
        ...

    def batch(self, texts: int, tokens: int, waited: Sequence[float], seconds: float) -> None:
        """A batch was translated."""
        ...


@dataclass(frozen=True)
class _Waiting:
    """A text in the queue."""

    text: str
    tokens: int
    settings: Settings
    future: Future[Translation] = field(default_factory=Future)
    since: float = field(default_factory=time.perf_counter)


def as_exception(error: BaseException) -> Exception:
    """An error of a model, which ends a request and not the server: where Rust panics it is no Exception."""
    return error if isinstance(error, Exception) else RuntimeError(named(error))


class Batcher:
    """A queue in front of a model, which some threads empty.

    Args:
        translator: The model, which translates on one thread for each call.
        threads: How many threads call it.
        max_tokens: Most tokens of a batch, but for a single text. While a batch is translated others wait for it.
        most_waiting: Most texts in the queue.
        observer: Who counts.
    """

    def __init__(
        self, translator: Translates, threads: int, max_tokens: int, most_waiting: int, observer: Observer
    ) -> None:
        self._translator, self._max_tokens, self._most_waiting = translator, max_tokens, most_waiting
        self._observer = observer
        self._queue: deque[_Waiting] = deque()
        self._changed = Condition()
        self._idle, self._closed = 0, False
        # No daemons: Python ends those as they come back from C++, whose frames do not bear it.
        self._threads = [Thread(target=self._work, name=f"nmsparse-batch-{number}") for number in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, texts: Sequence[str], tokens: Sequence[int], settings: Settings) -> list[Future[Translation]]:
        """Takes texts into the queue, all of them or none.

        Args:
            texts: The texts, which the translator takes with these settings.
            tokens: How many tokens each has.
            settings: How they are translated.

        Returns:
            For each its translation to come. Cancelled before it is begun it leaves the queue.

        Raises:
            RequestError: The queue is full, or the server stops.
        """
        added = [_Waiting(text, count, settings) for text, count in zip(texts, tokens, strict=True)]
        with self._changed:
            if self._closed:
                raise RequestError(503, "the server stops; come again", {"Retry-After": "10"})
            if len(self._queue) + len(added) > self._most_waiting:
                self._drop_cancelled()
            if self._queue and len(self._queue) + len(added) > self._most_waiting:
                message = f"{len(self._queue)} sentences wait already; come again"
                raise RequestError(429, message, {"Retry-After": "1"})
            self._queue.extend(added)
            self._observer.waiting(len(added))
            self._changed.notify_all()
        return [one.future for one in added]

    def close(self) -> None:
        """Translates what was taken, and ends the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _drop_cancelled(self) -> None:
        kept = deque(one for one in self._queue if not one.future.cancelled())
        self._observer.waiting(len(kept) - len(self._queue))
        self._queue = kept

    def _work(self) -> None:
        while batch := self._take():
            self._translate(batch)

    def _take(self) -> list[_Waiting]:
        """The next batch: the oldest text and others with its settings; empty where the threads are to end."""
        with self._changed:
            while main_thread().is_alive():  # it is not where the server was made to end without a `close`
                self._drop_cancelled()
                if self._queue:
                    if batch := self._taken():
                        return batch
                elif self._closed:
                    break
                else:
                    self._idle += 1
                    self._changed.wait(_LOOK_SECONDS)
                    self._idle -= 1
        return []

    def _taken(self) -> list[_Waiting]:
        settings, share = self._queue[0].settings, math.ceil(len(self._queue) / (self._idle + 1))
        batch, left, tokens = list[_Waiting](), deque[_Waiting](), 0
        for one in self._queue:
            fits = not batch or (len(batch) < share and tokens + one.tokens <= self._max_tokens)
            if one.settings != settings or not fits:
                left.append(one)
            elif one.future.set_running_or_notify_cancel():
                batch.append(one)
                tokens += one.tokens
        self._observer.waiting(len(left) - len(self._queue))
        self._queue = left
        return batch

    def _translate(self, batch: list[_Waiting]) -> None:
        began = time.perf_counter()
        try:
            found = self._translator.translate([one.text for one in batch], **dict(batch[0].settings))
        except BaseException as error:  # whatever it is, each text has its answer and the thread lives on
            if len(batch) == 1:
                self._count(batch, began)
                batch[0].future.set_exception(as_exception(error))
                return
            for one in batch:  # those of other requests are not lost with it
                self._translate([one])
            return
        self._count(batch, began)
        for one, translation in zip(batch, found, strict=True):
            one.future.set_result(translation)

    def _count(self, batch: list[_Waiting], began: float) -> None:
        """Before the texts have their answers: who has one finds it counted, even if this process is killed then."""
        seconds = time.perf_counter() - began
        waited = [began - one.since for one in batch]
        self._observer.batch(len(batch), sum(one.tokens for one in batch), waited, seconds)
