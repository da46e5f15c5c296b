"""What a client is told where a request is not answered: a status and one line."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["RequestError"]


class RequestError(ValueError):
    """A request that is refused.

    Args:
        status: The HTTP status.
        message: One line: what, where, got what, what to do.
        headers: Of the response.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
