"""A text that is given piece by piece, while a thread beside still works on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Thread

__all__ = ["pieces"]

Tokens = Sequence[int]

_HALF = "\N{REPLACEMENT CHARACTER}"  # what a character decodes to whose bytes are not all there


class _ClosedError(Exception):
    """Nobody reads any more."""


@dataclass(frozen=True)
class _State:
    tokens: Tokens
    is_last: bool


def pieces(translate: Callable[[Callable[[Tokens], None]], Tokens], text_of: Callable[[Tokens], str]) -> Iterator[str]:
    """The text that a translation becomes.

    Args:
        translate: Calls what it is given with the first tokens whenever some are sure, and returns all of them. It runs
            in a thread of its own, and ends with what that call raises.
        text_of: Decodes tokens.

    Returns:
        What the text grows by. A token's text is given when the next one is sure, for it may change with it. Closed
        early, the iterator ends the translation.

    Raises:
        ValueError: The tokenizer has changed text that was given already.
    """
    states: SimpleQueue[_State | BaseException] = SimpleQueue()
    closed = Event()

    def tell(tokens: Tokens) -> None:
        if closed.is_set():
            raise _ClosedError
        states.put(_State(tokens, is_last=False))

    def work() -> None:
        try:
            states.put(_State(translate(tell), is_last=True))
        except BaseException as error:  # raised where the pieces are read
            states.put(error)

    # No daemon: Python ends those as they come back from C++, whose frames do not bear it. A process that leaves the
    # iterator open ends with the translation.
    thread = Thread(target=work, name="nmsparse-stream")
    thread.start()
    given, before, count = "", "", 0
    try:
        while True:
            state = states.get()
            if isinstance(state, BaseException):
                raise state
            if len(state.tokens) == count and not state.is_last:
                continue
            count, text = len(state.tokens), text_of(state.tokens)
            # What the token before last became, if this one has left it as it was.
            sure = text if state.is_last else before.rstrip(_HALF) if text.startswith(before) else given
            if len(sure) > len(given) and sure.startswith(given):
                yield sure[len(given) :]
                given = sure
            if state.is_last:
                if given != text:
                    raise ValueError(f"stream: the tokenizer has changed text that was given; the whole is {text!r}")
                return
            before = text
    finally:
        closed.set()
        thread.join()
