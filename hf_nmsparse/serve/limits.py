"""How much a client may ask for and how long it is waited for, so that no client takes the server from the others."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields
from typing import Any, TypeVar, cast

from starlette.requests import ClientDisconnect, Request

from hf_nmsparse.serve.errors import RequestError

__all__ = ["Limits", "finished", "read_body"]

T = TypeVar("T")

_CHARACTER = 12  # bytes that JSON or a form takes for one at most: two escapes of six, or four of three
_AROUND = 65_536  # bytes of a body beside its texts


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        characters: Most characters in the texts of a request.
        texts: Most texts in it.
        waiting: Most sentences that wait for a model; a request beyond them is told to come again.
        seconds: How long a request may take from its last byte to its answer.
        body_seconds: How long its body may take to come.
        beams: Most beams, and with them alternatives.
    """

    characters: int = 10_000
    texts: int = 256
    waiting: int = 2_000
    seconds: float = 60.0
    body_seconds: float = 15.0
    beams: int = 8

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ValueError(f"limits: {field.name} needs to be above 0, got {value!r}")

    @property
    def body_bytes(self) -> int:
        """The longest body that is read, and the longest that texts within the limit can make."""
        return self.characters * _CHARACTER + _AROUND

    def check(self, texts: Sequence[str]) -> None:
        """Refuses texts beyond the limits.

        Raises:
            RequestError: As said.
        """
        if len(texts) > self.texts:
            raise RequestError(413, f"a request takes {self.texts} texts, got {len(texts)}; send several requests")
        characters = sum(map(len, texts))
        if characters > self.characters:
            raise RequestError(
                413, f"a request takes {self.characters} characters, got {characters}; send several requests"
            )


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a request; one that is too long or compressed is refused before it is read.

    Raises:
        RequestError: It is too long or compressed, or takes too long to come.
        ClientDisconnect: The client went away.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):  # which may hide any length
        message = f"content-encoding: takes a body as it is, got {encoding[:50]!r}; send it without compression"
        raise RequestError(415, message, {"Accept-Encoding": "identity", "Connection": "close"})
    said = request.headers.get("content-length", "0")
    # Closed, for what is left of the body is not read.
    too_long = RequestError(413, f"a body takes {limits.body_bytes} bytes; send less", {"Connection": "close"})
    if not said.isdecimal() or int(said[:20]) > limits.body_bytes:
        raise too_long

    async def read() -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limits.body_bytes:
                raise too_long
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), limits.body_seconds)
    except asyncio.TimeoutError:
        message = f"the body did not come within {limits.body_seconds:g} seconds; send it at once"
        raise RequestError(408, message, {"Connection": "close"}) from None


async def finished(request: Request, futures: Sequence[Future[T]], seconds: float) -> list[T]:
    """What some futures come to. Where nobody waits for it any more, those that have not begun are cancelled.

    Args:
        request: The request, whose body has been read.
        futures: What its answer is made of.
        seconds: How long to wait.

    Raises:
        RequestError: It took too long.
        ClientDisconnect: The client went away.
    """
    waiting = asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
    waiting.add_done_callback(_look)
    gone = asyncio.ensure_future(request.receive())  # nothing else comes after the body
    try:
        await asyncio.wait((waiting, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        cancelled = waiting.cancel()
        gone.cancel()
    if not cancelled:
        found = waiting.result()
        for one in found:
            if isinstance(one, BaseException):
                raise one
        return cast("list[T]", found)
    if gone.done() and not gone.cancelled():
        raise ClientDisconnect
    message = f"no translation within {seconds:g} seconds; come again when there is less to do"
    raise RequestError(503, message, {"Retry-After": "10"})


def _look(done: asyncio.Future[Any]) -> None:
    """Takes note of how a future ended, or the loop would log that nobody has when it was cancelled."""
    if not done.cancelled():
        done.exception()
