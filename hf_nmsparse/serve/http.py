"""HTTP/1.1 whose headers come whole, within a time and a length: uvicorn waits for the rest of one for ever."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["Http"]

_HEADER_SECONDS = 15.0
_HEADER_BYTES = 65_536


class Http(HttpToolsProtocol):
    """A connection, which is closed where a header does not come."""

    _timer: asyncio.TimerHandle | None = None
    _received = 0

    def connection_made(self, transport: Any) -> None:
        """A client is there."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(_HEADER_SECONDS, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """It sends something: the rest of a header, or what comes after one."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
            return
        self._received += len(data)
        if self._received > _HEADER_BYTES:
            self.transport.close()
        elif self._timer is None:
            self._timer = self.loop.call_later(_HEADER_SECONDS, self.transport.close)

    def _stop(self) -> None:
        self._received = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
