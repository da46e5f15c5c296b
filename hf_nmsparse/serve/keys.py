"""API keys: who may translate, where the server asks."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request

from hf_nmsparse.serve.errors import RequestError

__all__ = ["Keys"]


class Keys:
    """The keys of a server.

    Args:
        keys: They; without any everybody may translate.

    Raises:
        ValueError: One cannot be sent in a header.
    """

    def __init__(self, keys: Sequence[str] = ()) -> None:
        if not all(key.isascii() and key.isprintable() and key.strip() == key != "" for key in keys):
            raise ValueError("serve: an API key is of ASCII letters, digits and signs; give another")
        self._keys = [key.encode() for key in keys]

    @property
    def required(self) -> bool:
        """Whether a request needs one."""
        return bool(self._keys)

    def check(self, request: Request, field: Any = None) -> None:
        """Refuses a request without a key of these, in ``Authorization: Bearer`` or in its field ``api_key``.

        Raises:
            RequestError: As said.
        """
        if not self.required:
            return
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else field
        if not given:
            raise RequestError(403, "an API key is needed; send it as api_key or as Authorization: Bearer")
        sent = str(given).encode(errors="replace")
        if not sum(hmac.compare_digest(sent, key) for key in self._keys):  # all, so that the time says nothing of any
            raise RequestError(403, "the API key is unknown; ask whoever runs this server for one")
