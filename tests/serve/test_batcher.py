"""Which texts are translated together, and that each has its answer whatever becomes of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import wait as wait_for
from queue import SimpleQueue
from threading import Event
from typing import Any

import pytest

from hf_nmsparse.serve.batcher import Batcher
from hf_nmsparse.serve.errors import RequestError
from hf_nmsparse.translations import Translation

PLAIN = (("num_beams", 1),)


class Held:
    """A translator whose calls wait until they are let go, and an observer."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[list[str]] = SimpleQueue()
        self.settings: list[dict[str, Any]] = []
        self.go, self.queued, self.batches = Event(), 0, list[tuple[int, int]]()

    def translate(self, texts: list[str], **settings: Any) -> list[Translation]:
        self.settings.append(settings)
        self.calls.put(texts)
        assert self.go.wait(20)
        if any("bad" in text for text in texts):
            raise ValueError("a bad one")
        if any("exit" in text for text in texts):
            raise SystemExit
        return [Translation(text.upper(), ()) for text in texts]

    def waiting(self, change: int) -> None:
        self.queued += change

    def batch(self, texts: int, tokens: int, waited: Sequence[float], seconds: float) -> None:
        assert len(waited) == texts
        assert min(waited) >= 0 < seconds
        self.batches.append((texts, tokens))


Make = Callable[..., Batcher]


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
def make(held: Held) -> Iterator[Make]:
    made: list[Batcher] = []

    def batcher(threads: int = 1, max_tokens: int = 100, most_waiting: int = 50) -> Batcher:
        made.append(Batcher(held, threads, max_tokens, most_waiting, held))
        return made[-1]

    yield batcher
    held.go.set()
    for one in made:
        one.close()


def submit(batcher: Batcher, texts: str, settings: Any = PLAIN, tokens: int = 10) -> list[Future[Translation]]:
    return batcher.submit(texts.split(), [tokens] * len(texts.split()), settings)


def texts_of(futures: list[Future[Translation]]) -> list[str]:
    return [future.result(20).text for future in futures]


def test_the_first_does_not_wait_and_the_others_go_together(make: Make, held: Held) -> None:
    batcher = make()
    first = submit(batcher, "a")
    assert held.calls.get(timeout=20) == ["a"]
    rest = submit(batcher, "b") + submit(batcher, "c d")
    assert held.queued == 3
    held.go.set()
    assert texts_of(first + rest) == ["A", "B", "C", "D"]
    assert held.calls.get(timeout=20) == ["b", "c", "d"]
    batcher.close()
    assert held.batches == [(1, 10), (3, 30)]
    assert held.queued == 0


@pytest.mark.parametrize("text", ["a", "bad"])
def test_what_has_its_answer_is_counted(make: Make, held: Held, text: str) -> None:
    """A process that is killed as soon as it has answered leaves a count that holds the answer."""
    counted: SimpleQueue[int] = SimpleQueue()
    [future] = submit(make(), text)
    future.add_done_callback(lambda _: counted.put(len(held.batches)))  # in the thread that answers, as it does
    held.go.set()
    assert counted.get(timeout=20) == 1


def test_settings_keep_texts_apart(make: Make, held: Held) -> None:
    batcher, others = make(), (("num_beams", 4),)
    submit(batcher, "a")
    held.calls.get(timeout=20)
    futures = submit(batcher, "b") + submit(batcher, "c", others) + submit(batcher, "d")
    held.go.set()
    assert texts_of(futures) == ["B", "C", "D"]
    assert [held.calls.get(timeout=20) for _ in range(2)] == [["b", "d"], ["c"]]
    assert held.settings[1:] == [{"num_beams": 1}, {"num_beams": 4}]


def test_a_batch_has_a_bound_in_tokens(make: Make, held: Held) -> None:
    batcher = make(max_tokens=25)
    submit(batcher, "a")
    held.calls.get(timeout=20)
    futures = submit(batcher, "b", tokens=40) + submit(batcher, "c d e")
    held.go.set()
    assert texts_of(futures) == ["B", "C", "D", "E"]
    assert [held.calls.get(timeout=20) for _ in range(3)] == [["b"], ["c", "d"], ["e"]]


def test_idle_threads_share_the_texts_of_a_request(make: Make, held: Held) -> None:
    batcher = make(threads=2)
    while batcher._idle < 2:
        pass
    futures = submit(batcher, "a b c d")
    assert sorted(held.calls.get(timeout=20) for _ in range(2)) == [["a", "b"], ["c", "d"]]
    held.go.set()
    assert texts_of(futures) == ["A", "B", "C", "D"]


def test_what_is_cancelled_leaves_the_queue(make: Make, held: Held) -> None:
    batcher = make(most_waiting=3)
    [first] = submit(batcher, "a")
    held.calls.get(timeout=20)
    assert not first.cancel()  # it is under way
    gone, kept = submit(batcher, "b c"), submit(batcher, "d")
    assert all(future.cancel() for future in gone)
    more = submit(batcher, "e f")  # for which there is room again
    held.go.set()
    assert texts_of([first, *kept, *more]) == ["A", "D", "E", "F"]
    assert held.calls.get(timeout=20) == ["d", "e", "f"]
    with pytest.raises(CancelledError):
        gone[0].result(20)


@pytest.mark.parametrize("bad", ["bad", "exit"])
def test_a_text_that_fails_fails_alone(make: Make, held: Held, bad: str) -> None:
    batcher = make()
    submit(batcher, "a")
    held.calls.get(timeout=20)
    futures = submit(batcher, f"b {bad} c")
    held.go.set()
    wait_for(futures, 20)
    assert texts_of([futures[0], futures[2]]) == ["B", "C"]
    assert isinstance(futures[1].exception(), ValueError if bad == "bad" else RuntimeError)
    assert texts_of(submit(batcher, "d")) == ["D"]


def test_a_full_queue_takes_no_more(make: Make, held: Held) -> None:
    batcher = make(most_waiting=2)
    submit(batcher, "a")
    held.calls.get(timeout=20)
    submit(batcher, "b c d")  # an empty queue takes a request whole
    with pytest.raises(RequestError, match="3 sentences wait already") as refused:
        submit(batcher, "e")
    assert refused.value.status == 429
    assert refused.value.headers == {"Retry-After": "1"}


def test_closed_it_finishes_what_it_has(make: Make, held: Held) -> None:
    batcher = make()
    futures = submit(batcher, "a") + submit(batcher, "b")
    held.go.set()
    batcher.close()
    assert texts_of(futures) == ["A", "B"]
    with pytest.raises(RequestError, match="the server stops") as refused:
        submit(batcher, "c")
    assert refused.value.status == 503
