"""The fields of a request, whether it comes as JSON or as a form."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qsl

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from hf_nmsparse.serve.errors import RequestError
from hf_nmsparse.serve.limits import Limits, read_body

__all__ = ["read_fields"]

_ENCODED, _MULTIPART = "application/x-www-form-urlencoded", "multipart/form-data"
_FORMS = (_ENCODED, _MULTIPART)
_MOST_FIELDS = 300


async def read_fields(request: Request, limits: Limits) -> dict[str, Any]:
    """The fields of a JSON object, or of a form and of the query, where a field that comes again makes a list.

    Raises:
        RequestError: The body is too long or malformed, or of another type.
        ClientDisconnect: The client went away.
    """
    body = await read_body(request, limits)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in _FORMS or not body:
        parts = await _multipart(request, body) if kind == _MULTIPART and body else _encoded(body, "the body")
        return _collected([*_encoded(request.scope["query_string"], "the query"), *parts])
    if kind not in ("application/json", ""):
        raise RequestError(415, f"content-type: takes application/json, {' or '.join(_FORMS)}, got {kind!r}")
    return _object(body)


def _object(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise RequestError(400, f"the body is a JSON object, got {type(fields).__name__}")
    return fields


def _encoded(content: bytes, place: str) -> list[tuple[str, Any]]:
    """Names and values, in UTF-8 with escapes or, as curl sends it, without: starlette takes the latter for Latin-1."""
    try:
        return parse_qsl(content.decode(), keep_blank_values=True, errors="strict", max_num_fields=_MOST_FIELDS)
    except UnicodeDecodeError as error:
        raise RequestError(400, f"{place} is no UTF-8: {error}; encode it as that") from None
    except ValueError as error:
        raise RequestError(400, f"{place} is no form: {error}") from None


async def _multipart(request: Request, body: bytes) -> list[tuple[str, Any]]:
    async def replay() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        form = await Request(request.scope, replay).form(max_files=0, max_fields=_MOST_FIELDS)
    except HTTPException as error:
        raise RequestError(400, f"the body is no form: {error.detail}") from None
    return form.multi_items()


def _collected(items: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in items:
        fields[name] = [*_listed(fields[name]), value] if name in fields else value
    return fields


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
